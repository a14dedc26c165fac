# SPDX-License-Identifier: MIT
"""Checks of a reader's functions: their values and gradients beside PyTorch's and float64's."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from torchpar.errors import ConfigError
from torchpar.testing.operators.compare import farthest


def place_of(code: object) -> str:
    """Return the name of a reader's function, layer or method, and its file: "windows in
    matmul_convolution.py"."""
    layer = getattr(code, "__self__", None)
    name = getattr(code, "__name__", type(code).__name__)
    of_layer = f"{type(layer).__name__}." if layer is not None else ""
    module = getattr(code if layer is None else type(layer), "__module__", "")
    file = getattr(sys.modules.get(module), "__file__", None) or "?"
    return f"{of_layer}{name} in {Path(file).name}"


def describe(value: object) -> str:
    """Return what kind of value a reader's function has returned, and its shape."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if value is None:
        return "None"
    shape = f" and shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
    return f"an object of type {type(value).__name__}{shape}"


@contextmanager
def unchanged(place: str, *inputs: object, what: str = "its input") -> Iterator[None]:
    """Refuse a block that changes a tensor of ``inputs``, of which later results would be wrong.

    Args:
        place: the reader's function that the block calls, as `place_of` names it.
        what: the inputs, for the message.

    Raises:
        ConfigError: a tensor has another shape or other numbers after the block.
    """
    tensors = [t for t in inputs if isinstance(t, Tensor)]
    copies = [t.detach().clone() for t in tensors]
    yield
    for now, before in zip(tensors, copies, strict=True):
        found = ""
        if now.shape != before.shape:
            found = f"its shape is {tuple(now.shape)}, expected {tuple(before.shape)}"
        elif not ((now == before) | (now.isnan() & before.isnan())).all():
            found = farthest(now, before)
        if found:
            raise ConfigError(f"{place} changes {what}: {found}; compute into a new tensor")


def result_of(
    function: Callable[..., Tensor],
    *arguments: object,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    **options: object,
) -> Tensor:
    """Call a reader's function, whose result goes into an operator, and return the result.

    Args:
        shape: of the result; by default any.

    Raises:
        ConfigError: it is no tensor of that shape and dtype, of which the operator would complain;
            or the function changes an argument.
    """
    with unchanged(place_of(function), *arguments):
        result: object = function(*arguments, **options)
    if (
        isinstance(result, Tensor)
        and (shape is None or tuple(result.shape) == tuple(shape))
        and result.dtype is dtype
    ):
        return result
    of_shape = "" if shape is None else f"shape {tuple(shape)} and "
    raise ConfigError(
        f"{place_of(function)} returns {describe(result)}, expected a tensor of {of_shape}{dtype}; "
        "mend what it returns"
    )


def exactly(function: Callable[..., Tensor], *arguments: object, expected: Tensor) -> Tensor:
    """Call a reader's function whose result can only be ``expected``, and return the result.

    Raises:
        ConfigError: as from `result_of`, or an element differs. The first one is named.
    """
    result = result_of(function, *arguments, shape=expected.shape, dtype=expected.dtype)
    if len(wrong := (result != expected.to(result.device)).nonzero()):
        at = tuple(wrong[0].tolist())
        raise ConfigError(
            f"{place_of(function)} is wrong: {list(at)} of shape {tuple(expected.shape)} is "
            f"{result[at].item()}, expected {expected[at].item()}; mend its formula"
        )
    return result


class Comparison(NamedTuple):
    """The error of a result, that of PyTorch's in its dtype, and the largest error of rounding.

    Attributes:
        exact: the result in float64.
    """

    error: float
    native: float
    most: float
    exact: Tensor


def error_of(
    result: Tensor,
    reference: Callable[..., Tensor],
    *inputs: Tensor,
    terms: int = 1,
    size: float = 0.0,
) -> Comparison:
    """Compare a result with ``reference(*inputs)`` in float64, as `compare` does.

    Errors of a result of another shape are infinite.

    Raises:
        ConfigError: nothing can be compared, because the result has no element, or PyTorch's own is
            not finite.
    """
    exact = reference(*(t.double() for t in inputs))
    if result.shape != exact.shape:
        return Comparison(math.inf, 0.0, 0.0, exact)
    if not exact.numel():
        raise ConfigError(f"a result of shape {tuple(exact.shape)} has nothing to compare")
    error, native = ((t - exact).abs().max().item() for t in (result, reference(*inputs)))
    if not math.isfinite(native):
        raise ConfigError(
            f"PyTorch's own result in {result.dtype} is off by {native}, so that no result could "
            "be wrong; take smaller inputs"
        )
    rounding = torch.finfo(result.dtype).eps * max(exact.abs().max().item(), size)
    return Comparison(error, native, 2 * native + terms**0.5 * rounding, exact)


def compare(
    part: str,
    result: Tensor,
    reference: Callable[..., Tensor],
    *inputs: Tensor,
    terms: int = 1,
    size: float = 0.0,
) -> dict[str, str | float]:
    """Print the errors of ``result`` and of PyTorch's ``reference(*inputs)``, and return them.

    An error is the largest distance from ``reference`` in float64. Sums of ``terms`` numbers in
    another order may differ by √terms roundings of the largest result, or of ``size``, the sum of
    the terms' magnitudes, which is larger where terms cancel.

    Raises:
        ConfigError: another shape, or an error above those roundings and twice PyTorch's error; or
            as from `error_of`.
    """
    if not isinstance(result, Tensor):
        raise ConfigError(f"{part} is {type(result).__name__}, expected a tensor; mend its formula")
    found = error_of(result, reference, *inputs, terms=terms, size=size)
    if result.shape != found.exact.shape:
        raise ConfigError(
            f"{part} is {tuple(result.shape)}, expected the shape {tuple(found.exact.shape)}; mend "
            "its formula"
        )
    print(
        f"{part}: error {found.error:.1e} against float64, PyTorch's {found.native:.1e}; "
        f"the largest number is {found.exact.abs().max():.3g}"
    )
    if not found.error <= found.most:
        off = f"{part} is off by {found.error:.1e}, expected {found.most:.1e} at most"
        raise ConfigError(
            f"{off}: {farthest(result, found.exact)}; mend its formula, and do not let it change "
            "its inputs"
        )
    return {"part": part, "error": found.error, "pytorch_error": found.native}


def compare_gradients(
    part: str,
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    terms: int = 1,
) -> list[dict[str, str | float]]:
    """Compare the gradients of Σ G ⊙ f with respect to each of the ``inputs``, as `compare` does.

    Args:
        function: of the inputs, differentiable by autograd; ``reference`` is PyTorch's.

    Raises:
        ConfigError: as from `compare`; or ``function`` has no gradient, or no inputs.
    """
    if not inputs:
        raise ConfigError(f"{part} has no inputs, expected one at least; name what it is of")

    def gradients(f: Callable[..., Tensor], *values: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in values]
        y = f(*leaves)
        if not y.requires_grad:
            raise ConfigError(
                f"{part} has no gradient, expected one; compute it by PyTorch's operators"
            )
        g = torch.linspace(-1, 2, y.numel(), device=y.device).to(y).view(y.shape)
        return torch.autograd.grad(y, leaves, g, materialize_grads=True)

    found = gradients(function, *inputs.values())
    return [
        compare(
            f"{part}, gradient of {name}",
            found[i],
            lambda *values, i=i: gradients(reference, *values)[i],
            *inputs.values(),
            terms=terms,
        )
        for i, name in enumerate(inputs)
    ]
