# SPDX-License-Identifier: MIT
"""The path of a call through autograd, torch.func and forward mode."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction

from torchpar.library.private import SingleLevelFunction
from torchpar.library.rules import Context

if TYPE_CHECKING:
    from torchpar.library.call_path import DispatchedOp

_T = TypeVar("_T")


class Call:
    """A call on its way through `Differentiable`, as flat leaves; it keeps no argument."""

    is_once = False  # whether `DifferentiableOnce` makes the call, for one transform of torch.func
    are_smooth: list[bool]  # for a transformed call: whether each result has a derivative

    # The defaults are those of a call without lists, whose result is one tensor.
    sizes: list[int | None] | None = None  # the lengths of the lists among the arguments
    output_sizes: list[int | None] | None = None  # the lengths of the lists among the results
    materializes = False  # whether `backward` makes zeros for results without a gradient

    def __init__(
        self,
        op: "DispatchedOp",
        keyset: torch.DispatchKeySet,
        kwargs: dict[str, object],
        transformed: bool,
        is_direct: bool = False,
    ):
        self.op, self.keyset, self.kwargs = op, keyset, kwargs
        self.transformed, self.is_direct = transformed, is_direct

    def flat(self, args: tuple[object, ...]) -> tuple[object, ...]:
        """The leaves of all positional arguments."""
        self.given = len(args)
        if len(args) < len(self.op._defaults):
            args += self.op._defaults[len(args) :]
        if not self.op._has_lists:
            return args
        leaves, self.sizes = flattened(args, self.op._are_lists)
        return leaves

    def compute(self, leaves: tuple[object, ...]) -> object:
        """The result of the operator: a tensor, or a tuple in which no lists are left."""
        if self.is_direct:
            output: Any = self.op._checked(self.op._trusted(*leaves, **self.kwargs))  # type: ignore[misc]
        else:
            args = leaves if self.sizes is None else nested(leaves, self.sizes)
            output = self.op._below(self.keyset, *args, **self.kwargs)
        if isinstance(output, Tensor):
            return output
        self.is_tuple = isinstance(output, tuple)
        leaves, self.output_sizes = flattened(output if self.is_tuple else (output,))
        return leaves

    def result(self, output: Any) -> object:
        """The operator's result of the output of `compute`."""
        if isinstance(output, Tensor):
            return output
        result = nested(output, self.output_sizes)
        return result if self.is_tuple else result[0]

    def set_up(self, ctx: "_FunctionContext", leaves: tuple[object, ...], output: Any) -> None:
        ctx._torchpar_call, self.count = self, len(leaves)
        # Zeros for results without a gradient; for a single result autograd makes them.
        self.materializes = isinstance(output, tuple) and len(output) > 1
        if self.transformed or self.materializes:
            self.results: list[dict[str, Any] | None] = [  # None for a number
                {"size": t.shape, "dtype": t.dtype, "device": t.device}
                if isinstance(t, Tensor)
                else None
                for t in (output if isinstance(output, tuple) else (output,))
            ]
        if self.materializes:  # autograd's zeros would be no DTensors (pytorch#173123)
            ctx.set_materialize_grads(False)
        needs = ctx.needs_input_grad
        if self.sizes is not None:
            needs = nested(needs[:-1], self.sizes)
        ctx.needs_input_grad = needs[: self.given]
        set_up = self.op._setup_context
        if set_up is None:
            return
        is_shadowed = self.materializes
        if is_shadowed:
            ctx.set_materialize_grads = self._set_materializes
        inputs, result = nested(leaves, self.sizes), self.result(output)
        if self.op._keywords:
            keywords = self.op._keyword_only(self.kwargs)
            set_up(ctx=ctx, inputs=inputs, keyword_only_inputs=keywords, output=result)
        else:
            set_up(ctx=ctx, inputs=inputs, output=result)
        if is_shadowed:
            del ctx.set_materialize_grads

    def _set_materializes(self, value: bool) -> None:
        self.materializes = value

    def backward(self, ctx: Context, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The gradients of the leaves."""
        if self.op._backward is None:
            name = self.op._qualname
            hint = "it has no backward; register one by register_autograd"
            raise RuntimeError(f"Trying to backward through {name}, but {hint}")
        if self.materializes and any(g is None for g in grads):  # a result was not used
            like = next((g for g in grads if g is not None), None)
            # Compiled autograd, whose ctx is of another class, cannot add None to a gradient.
            if like is None and isinstance(ctx, BackwardCFunction):
                return (None,) * self.count
            new_zeros = torch.zeros if like is None else like.new_zeros
            grads = [
                new_zeros(**result) if g is None and result else g
                for g, result in zip(grads, self.results, strict=True)
            ]
        gradients: Any = self.op._backward(ctx, *nested(grads, self.output_sizes))
        found: tuple[Any, ...] = gradients if isinstance(gradients, tuple) else (gradients,)
        count = len(self.op._positional)
        if len(found) == self.given:  # arguments at their defaults need no gradient
            found += (None,) * (count - self.given)
        if len(found) != count:
            expected = count if self.given == count else f"{self.given} or {count}"
            raise RuntimeError(
                f"{self.op._qualname}: backward returns an incorrect number of gradients: expected "
                f"{expected}, got {len(found)}, one for each positional argument"
            )
        if self.sizes is None and list not in map(type, found):
            return found
        leaves: list[Tensor | None] = []
        sizes = self.sizes or [None] * count
        for argument, size, gradient in zip(self.op._positional, sizes, found, strict=True):
            is_list = isinstance(gradient, list | tuple)
            if size is None and not (is_list and any(g is not None for g in gradient)):
                leaves.append(None if is_list else gradient)
            elif size is not None and (gradient is None or (is_list and len(gradient) == size)):
                leaves += [None] * size if gradient is None else gradient
            else:
                given = f"{len(gradient)} gradients" if is_list else "one gradient"
                expected = "one" if size is None else f"a list of {size}, one for each tensor"
                raise RuntimeError(
                    f"{self.op._qualname}: backward returns {given} for {argument.name}, expected "
                    f"{expected}"
                )
        return tuple(leaves)


def flattened(
    values: tuple[Any, ...], are_lists: Sequence[bool] | None = None
) -> tuple[tuple[object, ...], list[int | None] | None]:
    """The values, with the tensors of lists in the lists' places, and the lengths of the lists.

    A value that is no list has the length None; without lists, None stands for all lengths.
    ``are_lists`` tells which values are lists of tensors. Without ``are_lists``, a list
    whose elements are all tensors or None counts as a list of tensors.
    """
    if list not in map(type, values):
        return values, None
    chosen = map(_is_list_of_tensors, values) if are_lists is None else are_lists
    sizes = [
        len(value) if yes and isinstance(value, list) else None
        for value, yes in zip(values, chosen, strict=False)
    ]
    lists = [[value] if size is None else value for value, size in zip(values, sizes, strict=True)]
    return tuple(chain(*lists)), sizes


def _is_list_of_tensors(value: object) -> bool:
    return isinstance(value, list) and all(t is None or isinstance(t, Tensor) for t in value)


def nested(leaves: Iterable[_T], sizes: list[int | None] | None) -> tuple[_T | list[_T], ...]:
    """Put the leaves back into lists of ``sizes``: the inverse of `flattened`."""
    if sizes is None:
        return tuple(leaves)
    rest = iter(leaves)
    return tuple([next(rest) if size is None else list(islice(rest, size)) for size in sizes])


class _FunctionContext(Context, Protocol):
    """The ``ctx`` of `Differentiable`: a rule's context, and what only this module uses."""

    needs_input_grad: Any  # a bool for each leaf, until `Call.set_up` nests them
    to_save: tuple[Tensor, ...] | None
    non_differentiable: tuple[Tensor, ...] | None
    _torchpar_call: Call
    set_materialize_grads: Callable[[bool], None]

    def save_for_forward(self, *tensors: Tensor | None) -> None: ...


@contextmanager
def _forward_mode() -> Iterator[None]:
    """Turn forward mode on where PyTorch has turned it off; gradients stay as they are."""
    records = torch.is_grad_enabled()
    # To turn inference mode off turns gradients and forward mode on.
    with torch.inference_mode(False), torch.set_grad_enabled(records):
        yield


class _Rules:
    """The methods of `torch.autograd.Function` for an operator with its derivatives."""

    @staticmethod
    def forward(ctx: "_FunctionContext", *args: Any) -> Any:
        # The call is last, so that PyTorch's messages number the arguments as the operator does.
        leaves, call = args[:-1], args[-1]
        if not call.transformed:
            output = call.compute(leaves)
            call.set_up(ctx, leaves, output)
            return output
        if call.is_once:  # transforms below this one may differentiate, too
            with torch.enable_grad(), _forward_mode():
                output = call.compute(leaves)
        else:
            output = call.compute(leaves)
        call.set_up(ctx, leaves, output)
        ctx.save_for_forward(*(ctx.to_save or ()))
        constant = set(map(id, ctx.non_differentiable or ()))
        outputs = output if isinstance(output, tuple) else (output,)
        floats = [
            isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex()) for t in outputs
        ]
        call.are_smooth = [
            yes and id(t) not in constant for yes, t in zip(floats, outputs, strict=True)
        ]
        return output

    @staticmethod
    def backward(ctx: "_FunctionContext", *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return *ctx._torchpar_call.backward(ctx, grads), None

    @staticmethod
    def jvp(ctx: "_FunctionContext", *args: Tensor | None) -> object:
        tangents = args[:-1]
        saved = [
            t if t is None else forward_ad.unpack_dual(t, level=0).primal for t in ctx.saved_tensors
        ]
        call = ctx._torchpar_call
        needs = nested([t is not None for t in tangents], call.sizes)[: call.given]
        context = SimpleNamespace(**vars(ctx), saved_tensors=saved, needs_input_grad=needs)
        # PyTorch turns forward mode off here. The tangents of the transforms below would be 0.
        with _forward_mode():
            if call.op._jvp:
                return call.op._jvp(context, *nested(tangents, call.sizes))
            return _transposed_backward(context, tangents)


class Differentiable(_Rules, torch.autograd.Function):
    """An operator with its derivatives."""


class DifferentiableOnce(_Rules, SingleLevelFunction):
    """An operator with its derivatives for the transform that calls it.

    `torch.autograd.Function` would call the transforms again.
    """


def _transposed_backward(
    ctx: "_FunctionContext", tangents: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The tangents of the results, by the transpose of ``backward``, which is linear."""
    call = ctx._torchpar_call
    with torch.enable_grad():
        zeros = [
            torch.zeros(**result, requires_grad=is_smooth) if result else None
            for result, is_smooth in zip(call.results, call.are_smooth, strict=True)
        ]
        smooth = [t for t in zeros if t is not None and t.requires_grad]
        found: Sequence[Tensor] = [t.detach() for t in smooth]
        gradients = call.backward(ctx, zeros) if smooth else ()
        pairs = [
            (g, t)
            for g, t in zip(gradients, tangents, strict=False)
            if g is not None and t is not None
        ]
        if any(not g.requires_grad for g, _ in pairs):  # a constant, or another library's
            raise RuntimeError(
                f"{call.op._qualname}: backward returns a gradient that PyTorch cannot "
                "differentiate; return None for 0, or register jvp or formula"
            )
        if pairs:
            outputs, incoming = zip(*((_sum_to(call, g, t), t) for g, t in pairs), strict=True)
            found = torch.autograd.grad(
                outputs, smooth, incoming, create_graph=True, materialize_grads=True
            )
    rest = iter(found)
    return tuple(next(rest) if is_smooth else None for is_smooth in call.are_smooth)


def _sum_to(call: Call, g: Tensor, argument: Tensor) -> Tensor:
    """A gradient in the shape of the argument: autograd sums over broadcast dimensions, too."""
    try:
        return g.sum_to_size(argument.shape)
    except RuntimeError as e:
        raise RuntimeError(
            f"{call.op._qualname}: backward returns a gradient of shape {tuple(g.shape)}, expected "
            f"{tuple(argument.shape)}, the shape of the argument"
        ) from e
