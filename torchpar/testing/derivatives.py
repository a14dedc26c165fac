# SPDX-License-Identifier: MIT
"""Rules for derivatives and vmap, which are compared with those of a reference, or with numerical ones."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.gradcheck import GradcheckError
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from torchpar.testing.case import (
    LAYOUTS,
    Attempts,
    Case,
    Function,
    Layout,
    NotRun,
    Rules,
    Tensors,
    Wrong,
    close,
    expect_floating,
    gradients,
    normal_like,
    rolled,
)

RULES = Rules()


def _numerically(check: Callable[..., Any], case: Case) -> None:
    expect_floating(case, torch.float64)
    try:
        check(case.smooth(case.op), case.leaves())
    except GradcheckError as e:
        raise Wrong(str(e)) from e


RULES.add("gradcheck")(partial(_numerically, torch.autograd.gradcheck))
RULES.add("gradgradcheck")(partial(_numerically, torch.autograd.gradgradcheck))


def pulled_back(
    f: Function,
    case: Case,
    layout: Layout = lambda t: t,
    of_operands: Layout = lambda t: t,
    required: Sequence[int] | None = None,
    used: slice = slice(None),
) -> Tensors:
    """Gradients of ``f`` for normally distributed incoming ones, of any layout."""
    xs = case.leaves()
    chosen = xs if required is None else [xs[i] for i in required]
    for x in xs:
        x.requires_grad_(any(x is one for one in chosen))
    ys = f(*map(of_operands, xs))[used]
    return gradients(ys, chosen, [layout(normal_like(y)) for y in ys])


def _pulled_back_twice(f: Function, case: Case, layout: Layout) -> Tensors:
    xs = case.leaves()
    ys = f(*map(layout, xs))
    incoming = [normal_like(y).requires_grad_() for y in ys]
    first = torch.autograd.grad(
        ys, xs, list(map(layout, incoming)), create_graph=True, materialize_grads=True
    )
    total = sum((g.square().sum() for g in first), torch.zeros(()))
    return torch.autograd.grad(total, (*xs, *incoming), materialize_grads=True)


@RULES.add("incoming gradients of any layout")
def _(case: Case) -> Attempts:
    for name, layout in LAYOUTS.items():
        yield name, partial(case.transformed, partial(pulled_back, case=case, layout=layout))
        if "expanded" not in name:
            both = partial(pulled_back, case=case, layout=layout, of_operands=layout)
            yield f"{name}, and operands", partial(case.transformed, both)
            twice = partial(_pulled_back_twice, case=case, layout=layout)
            yield f"{name}, second derivatives", partial(case.transformed, twice)


@RULES.add("any of the gradients")
def _(case: Case) -> Attempts:
    """Some operands do not require a gradient, and some results have none."""
    operands, results = range(len(case.floating)), len(case.oracle(*case.floating))
    for i in operands:
        for required in dict.fromkeys([(i,), tuple(j for j in operands if j != i) or (i,)]):
            transform = partial(pulled_back, case=case, required=required)
            yield f"of operands {required}", partial(case.transformed, transform)
    for i in range(results) if results > 1 else ():
        transform = partial(pulled_back, case=case, used=slice(i, i + 1))
        yield f"of result {i}", partial(case.transformed, transform)


@RULES.add("changes after the call")
def _(case: Case) -> Attempts:
    """A tensor that the backward needs is changed in place: right gradients, or autograd's error."""

    def check(of_results: bool) -> None:
        expected, leaves = pulled_back(case.oracle, case), case.leaves()
        xs = [x.clone() for x in leaves]
        ys = case.smooth(case.op)(*xs)
        try:
            with torch.no_grad():
                for t in ys if of_results else xs:
                    t.add_(1)
            actual = gradients(ys, leaves, list(map(normal_like, ys)))
        except RuntimeError as e:
            if "modified by an inplace operation" not in str(e):
                raise
        else:
            case.compare(actual, expected)

    for what in ("operands", "results"):
        yield f"of {what}", partial(check, what == "results")


@RULES.add("forward mode")
def _(case: Case) -> Attempts:
    def pushed(f: Function, chosen: Sequence[int]) -> list[Tensor]:
        with forward_ad.dual_level():
            xs = [x.clone() for x in case.floating]
            for i in chosen:
                xs[i] = forward_ad.make_dual(xs[i], normal_like(xs[i]))
            ys = [forward_ad.unpack_dual(y) for y in f(*xs)]
            return [(torch.zeros_like(y.primal) if y.tangent is None else y.tangent).clone() for y in ys]

    everything = tuple(range(len(case.floating)))
    for chosen in dict.fromkeys([everything, *((i,) for i in everything)]):
        yield f"of operands {chosen}", partial(case.transformed, partial(pushed, chosen=chosen))


def _scalar(f: Function) -> Callable[..., Tensor]:
    """A scalar whose gradient differs from element to element."""
    return lambda *xs: sum((y + y.square()).sum() for y in f(*xs))  # type: ignore[return-value]


def _every(case: Case) -> tuple[int, ...]:
    return tuple(range(len(case.floating)))


def _vjp(f: Function, case: Case) -> Any:
    ys, pull, *_ = vjp(f, *case.floating)
    return pull(tuple(map(normal_like, ys)))


def _jvp(f: Function, xs: Tensors) -> Any:
    return jvp(f, xs, tuple(map(normal_like, xs)))


def _batched(f: Function, case: Case) -> Tensors:
    xs = case.leaves()
    ys = f(*xs)
    batches = [torch.stack([normal_like(y, seed) for seed in range(3)]) for y in ys]
    found = torch.autograd.grad(ys, xs, batches, allow_unused=True, is_grads_batched=True)
    return tuple(x.new_zeros(3, *x.shape) if g is None else g for x, g in zip(xs, found, strict=True))


def _checkpointed(f: Function, case: Case) -> Tensors:
    return pulled_back(lambda *xs: checkpoint(f, *xs, use_reentrant=False), case)


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "batched gradients": _batched,
    "checkpoint": _checkpointed,
    "torch.func: vjp": _vjp,
    "torch.func: jvp": lambda f, case: _jvp(f, case.floating),
    "torch.func: jacrev": lambda f, case: jacrev(f, _every(case))(*case.floating),
    "torch.func: jacfwd": lambda f, case: jacfwd(f, _every(case))(*case.floating),
    "torch.func: hessian": lambda f, case: hessian(_scalar(f), _every(case))(*case.floating),
    "torch.func: jacrev of jacfwd": lambda f, case: jacrev(jacfwd(f, _every(case)), _every(case))(
        *case.floating
    ),
    "torch.func: jvp of jvp": lambda f, case: _jvp(lambda *xs: _jvp(f, xs)[1], case.floating),
}


def _transformed(transform: Callable[..., Any], case: Case) -> None:
    case.transformed(partial(transform, case=case))


for _name, _transform in TRANSFORMS.items():
    RULES.add(_name)(partial(_transformed, _transform))


# vmap


def _stacked(results: Sequence[Tensors]) -> Tensors:
    return tuple(map(torch.stack, zip(*results, strict=True)))


def _vmap(case: Case, in_dims: tuple[int | None, ...]) -> None:
    samples = [
        tuple(t if dim is None else rolled(t, k) for t, dim in zip(case.operands, in_dims, strict=True))
        for k in range(3)
    ]
    batches = [
        t if dim is None else batch.movedim(0, dim)
        for t, dim, batch in zip(case.operands, in_dims, _stacked(samples), strict=True)
    ]
    expected = _stacked([case.plain(*one) for one in samples])
    close(vmap(case.op, in_dims)(*batches), expected)
    close(vmap(case.op, in_dims, out_dims=-1)(*batches), [y.movedim(0, -1) for y in expected])
    case.expect_call(lambda: vmap(case.op, in_dims)(*batches))


@RULES.add("vmap over one operand")
def _(case: Case) -> Attempts:
    for i, t in enumerate(case.operands):
        for dim in range(t.dim() + 1):
            in_dims = tuple(dim if i == j else None for j in range(len(case.operands)))
            yield f"in_dims {in_dims}", partial(_vmap, case, in_dims)


@RULES.add("vmap over all operands")
def _(case: Case) -> Attempts:
    count = len(case.operands)
    for in_dims in ((0,) * count, (-1,) * count, tuple(-(i % 2) for i in range(count))):
        yield f"in_dims {in_dims}", partial(_vmap, case, in_dims)


@RULES.add("vmap of vmap")
def _(case: Case) -> None:
    rows = [[tuple(rolled(t, 2 * i + j) for t in case.operands) for j in range(2)] for i in range(3)]
    batches = _stacked([_stacked(row) for row in rows])
    close(
        vmap(vmap(case.op))(*batches), _stacked([_stacked([case.plain(*one) for one in row]) for row in rows])
    )
    case.expect_call(lambda: vmap(vmap(case.op))(*batches))


OF_BATCHES: dict[str, Callable[[Function, Tensors], Any]] = {
    "vmap of jvp": lambda f, xs: vmap(lambda *x: jvp(f, x, tuple(t.cos() for t in x)))(*xs),
    "vmap of vjp": lambda f, xs: vmap(lambda *x: vjp(f, *x)[1](f(*x)))(*xs),
    "jacfwd of vmap": lambda f, xs: jacfwd(vmap(f), tuple(range(len(xs))))(*xs),
    "hessian of vmap": lambda f, xs: hessian(_scalar(vmap(f)))(*xs),
    "vmap of vmap of grad": lambda f, xs: vmap(vmap(grad(_scalar(f))))(*(torch.stack([x, x]) for x in xs)),
}


@RULES.add("vmap and gradients")
def _(case: Case) -> Attempts:
    expect_floating(case)

    def check(transform: Callable[[Function, Tensors], Any]) -> None:
        samples = [tuple(rolled(t, k).requires_grad_() for t in case.floating) for k in range(3)]
        f = _scalar(case.smooth(case.plain))
        expected = _stacked([torch.autograd.grad(f(*xs), xs, materialize_grads=True) for xs in samples])
        batches = tuple(t.detach().requires_grad_() for t in _stacked(samples))
        close(transform(case.smooth(case.op), batches), expected)
        case.expect_call(lambda: transform(case.smooth(case.op), batches))

    def of_vmap(f: Function, xs: Tensors) -> Tensors:
        return torch.autograd.grad(_scalar(vmap(f))(*xs), xs, materialize_grads=True)

    def check_with_reference(transform: Callable[[Function, Tensors], Any]) -> None:
        if case.reference is None:
            raise NotRun("no reference")
        samples = _stacked([tuple(rolled(t, k) for t in case.floating) for k in range(3)])
        expected = transform(case.smooth(case.plain), samples)
        close(transform(case.smooth(case.op), samples), expected)
        case.expect_call(lambda: transform(case.smooth(case.op), samples))

    for name, transform in OF_BATCHES.items():
        yield name, partial(check_with_reference, transform)
    yield "vmap of grad", partial(check, lambda f, xs: vmap(grad(_scalar(f), _every(case)))(*xs))
    yield "gradients of vmap", partial(check, of_vmap)
