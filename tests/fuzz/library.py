# SPDX-License-Identifier: MIT
"""Random operators made by `torchpar.library.custom_op`, beside the same ones by
`torch.library.custom_op`.

Arguments are tensors, optional tensors, lists of tensors, numbers with defaults, and keyword-only
numbers; results are one tensor, several, a list or none; some operators write to an argument. Each
is called plainly, under `no_grad` and `inference_mode`, on meta tensors, by `torch.autograd.grad`
with and without compiled autograd, `vmap`, `torch.compile` and `opcheck`. Both answer alike, with
the same versions of written tensors, or both refuse. The documented refusals are those that
`REFUSALS` names; an operator by torchpar.library may answer where PyTorch's refuses, with a right
gradient.
"""

import itertools
import random
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from driver import Found, Refused, run
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import torchpar.library
from torchpar.library import player

# docs/citizen.md: what torchpar.library refuses and torch.library takes.
REFUSALS = ("keyword-only tensor", "writes to an argument", "cannot have a gradient")
counter = itertools.count()


class Made:
    """One function, and the operators that both libraries make of it."""

    def __init__(self, rng: random.Random):
        self.mutates = rng.random() < 0.3
        self.takes_list, self.optional = rng.random() < 0.4, rng.random() < 0.3
        self.factor, self.keyword = rng.choice([None, 2.0, -0.5]), rng.choice([None, 3])
        self.returns = (
            "none" if self.mutates and rng.random() < 0.6 else rng.choice(["one", "two", "list"])
        )
        self.has_fake, self.has_backward = (
            rng.random() < 0.9,
            not self.mutates and rng.random() < 0.7,
        )
        self.has_vmap = not self.mutates and rng.random() < 0.3
        number = next(counter)
        self.theirs = self.make(torch.library.custom_op, f"fuzz_torch::f{number}")
        # C++ plays the calls of operators that say they may be, and that write to no argument.
        trusted = partial(torchpar.library.triton_op, trusted=True)
        is_played = player.core.module is not None and not self.mutates
        ours = trusted if is_played else torchpar.library.custom_op
        self.ours = self.make(ours, f"fuzz_torchpar::f{number}")

    def source(self) -> str:
        args = ["x: Tensor"]
        args += ["ys: list[Tensor]"] * self.takes_list + ["z: Tensor | None"] * self.optional
        args += [f"factor: float = {self.factor}"] * (self.factor is not None)
        args += ["*", f"keyword: int = {self.keyword}"] if self.keyword is not None else []
        result = {
            "none": "None",
            "one": "Tensor",
            "two": "tuple[Tensor, Tensor]",
            "list": "list[Tensor]",
        }
        return f"def f({', '.join(args)}) -> {result[self.returns]}: return body({self.names()})"

    def names(self) -> str:
        names = ["x", "ys" if self.takes_list else "()", "z" if self.optional else "None"]
        names += [
            "factor" if self.factor is not None else "1.0",
            "keyword" if self.keyword is not None else "1",
        ]
        return ", ".join(names)

    def body(self, x: Tensor, ys: Any, z: Any, factor: float, keyword: int) -> Any:
        y = x * factor + keyword
        for other in ys:
            y = y + other.sum()
        y = y * z if z is not None else y
        if self.mutates:
            x.mul_(2).add_(factor)
        if self.returns == "none":
            return None
        return {"one": y, "two": (y, y.sum(-1)), "list": [y, y + 1]}[self.returns]

    def make(self, custom_op: Callable[..., Any], name: str) -> Any:
        scope = {"Tensor": Tensor, "body": self.body}
        exec(self.source(), scope)
        op = custom_op(name, scope["f"], mutates_args=("x",) if self.mutates else ())
        if self.has_fake:
            fake = {"Tensor": Tensor, "body": self.fake}
            exec(self.source(), fake)
            op.register_fake(fake["f"])
        if self.has_backward:
            op.register_autograd(self.backward, setup_context=self.setup_context)
        if self.has_vmap:
            op.register_vmap(self.vmap(op))
        return op

    def fake(self, x: Tensor, ys: Any, z: Any, factor: float, keyword: int) -> Any:
        y = torch.empty_like(x if z is None else x * z)
        empty = {
            "none": None,
            "one": y,
            "two": (y, y.new_empty(y.shape[:-1])),
            "list": [y, torch.empty_like(y)],
        }
        return empty[self.returns]

    def setup_context(
        self, ctx: Any, inputs: Any, output: Any, keyword_only_inputs: Any = None
    ) -> None:
        rest = list(inputs[1:])
        ctx.count = len(rest.pop(0)) if self.takes_list else None
        z = rest.pop(0) if self.optional else None
        ctx.factor = rest.pop(0) if self.factor is not None else 1.0
        ctx.optional = z is not None
        keyword = (keyword_only_inputs or {}).get(
            "keyword", self.keyword if self.keyword is not None else 1
        )
        ctx.keyword, ctx.dtype = keyword, inputs[0].dtype
        ctx.save_for_backward(
            *(() if z is None else (z, inputs[0])), *(inputs[1] if self.takes_list else ())
        )

    def backward(self, ctx: Any, *grads: Any) -> Any:
        saved = list(ctx.saved_tensors)
        z, x = (saved.pop(0), saved.pop(0)) if ctx.optional else (None, None)
        if self.returns == "two":
            first, second = grads
            g = first + second.unsqueeze(-1)
        elif self.returns == "list":
            g = grads[0][0] + grads[0][1]
        else:
            (g,) = grads
        through = g * z if z is not None else g
        found: list[Any] = [through * ctx.factor]
        if self.takes_list:
            found.append([through.sum().expand_as(y) for y in saved])
        if self.optional:
            base = None if z is None else x * ctx.factor + ctx.keyword + sum(y.sum() for y in saved)
            found.append(None if z is None else g * base)
        return tuple(found + [None] * (self.factor is not None))

    def vmap(self, op: Any) -> Callable[..., Any]:
        def rule(info: Any, in_dims: Any, *args: Any, **kwargs: Any) -> Any:
            results = []
            for i in range(info.batch_size):
                own = [
                    [t if d is None else t.select(d, i) for t, d in zip(a, dims, strict=True)]
                    if isinstance(a, (list, tuple))
                    else a
                    if dims is None
                    else a.select(dims, i)
                    for a, dims in zip(args, in_dims, strict=True)
                ]
                results.append(op(*own, **kwargs))
            if self.returns == "one":
                return torch.stack(results), 0
            stacked = [torch.stack(parts) for parts in zip(*results, strict=True)]
            return (stacked, [0, 0]) if self.returns == "list" else (tuple(stacked), (0, 0))

        return rule

    def arguments(self, rng: random.Random) -> tuple[tuple[Any, ...], dict[str, Any]]:
        shape = [rng.choice([1, 2, 3]) for _ in range(rng.randint(1, 3))]
        args: list[Any] = [torch.randn(shape, dtype=torch.float64)]
        if self.takes_list:
            args.append([torch.randn(shape, dtype=torch.float64) for _ in range(rng.randint(1, 3))])
        if self.optional:
            args.append(torch.randn(shape, dtype=torch.float64) if rng.random() < 0.6 else None)
        if self.factor is not None and rng.random() < 0.5:
            args.append(rng.choice([1.5, -3.0]))
        return tuple(args), {
            "keyword": 7
        } if self.keyword is not None and rng.random() < 0.5 else {}


def copied(value: Any, grad: bool = False) -> Any:
    return tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(grad), value)


def plain(op: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    result = op(*args, **kwargs)
    return result, x, x._version


def without_grad(op: Any, args: Any, kwargs: Any) -> Any:
    with torch.no_grad():
        return plain(op, args, kwargs)


def in_inference(op: Any, args: Any, kwargs: Any) -> Any:
    """The version of a tensor that was made outside is counted in inference mode, too."""
    with torch.inference_mode():
        result = op(*args, **kwargs)
    return tree_map_only(Tensor, torch.clone, result), args[0], args[0]._version


def on_meta(op: Any, args: Any, kwargs: Any) -> Any:
    result = op(*tree_map_only(Tensor, lambda t: t.to("meta"), args), **kwargs)
    return [(t.shape, t.dtype) for t in tree_leaves(result) if isinstance(t, Tensor)]


def gradient(op: Any, args: Any, kwargs: Any, last_only: bool = False) -> Any:
    args = copied(args, grad=True)
    leaves = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
    results = [t for t in tree_leaves(op(*args, **kwargs)) if isinstance(t, Tensor)]
    used = list(enumerate(results))[-1 if last_only else 0 :]
    total = sum((t * (i + 2)).sum() for i, t in used)
    return torch.autograd.grad(total, leaves, allow_unused=True)


def gradient_of_the_last_result(op: Any, args: Any, kwargs: Any) -> Any:
    return gradient(op, args, kwargs, last_only=True)


def by_compiled_autograd(op: Any, args: Any, kwargs: Any) -> Any:
    """Of all results and of the last, and both as without compiled autograd."""
    with torch._dynamo.compiled_autograd._enable(lambda graph: graph):
        found = [gradient(op, args, kwargs, last_only) for last_only in (False, True)]
    expected = [gradient(op, args, kwargs, last_only) for last_only in (False, True)]
    same = map(alike, tree_leaves(found), tree_leaves(expected))
    return found, all(same)


def saved_and_written(op: Any, args: Any, kwargs: Any) -> Any:
    """A write, in inference mode, to what a product has saved: its backward pass must refuse."""
    w = torch.ones_like(args[0]).requires_grad_()
    y = (w * args[0]).sum()
    with torch.inference_mode():
        op(*args, **kwargs)
    return torch.autograd.grad(y, w)


def batched(op: Any, args: Any, kwargs: Any) -> Any:
    stacked = tree_map_only(Tensor, lambda t: torch.stack([t, 2 * t, -t]), args)
    dims = tuple(
        tree_map_only(Tensor, lambda t: 0, a) if isinstance(a, (Tensor, list)) else None
        for a in args
    )
    return torch.vmap(lambda *a: op(*a, **kwargs), dims)(*stacked)


def compiled(op: Any, args: Any, kwargs: Any) -> Any:
    torch.compiler.reset()
    return torch.compile(lambda *a: op(*a, **kwargs), backend="aot_eager", fullgraph=True)(
        *args
    ), args[0]


def checked(op: Any, args: Any, kwargs: Any) -> Any:
    return sorted(
        torch.library.opcheck(op, args, kwargs, test_utils=["test_schema", "test_faketensor"])
    )


WAYS = [
    plain,
    plain,
    without_grad,
    in_inference,
    on_meta,
    gradient,
    gradient_of_the_last_result,
    by_compiled_autograd,
    saved_and_written,
    batched,
    checked,
]


def outcome(way: Callable[..., Any], op: Any, args: Any, kwargs: Any) -> Any:
    try:
        return way(op, copied(args), kwargs)
    except Exception as error:
        return error


def trial(rng: random.Random) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = Made(rng)
        args, kwargs = made.arguments(rng)
        way = compiled if rng.random() < 0.04 else rng.choice(WAYS)
        if player.core.module is not None:  # recorded in the first call, or in the second
            outcome(way, made.ours, args, kwargs)
            outcome(way, made.ours, args, kwargs)
        mine, torchs = (outcome(way, op, args, kwargs) for op in (made.ours, made.theirs))
    what = f"{way.__name__} of {made.source()}" + " which writes to x" * made.mutates
    if isinstance(mine, Exception):
        if isinstance(torchs, Exception):
            return "both refuse"
        if any(words in str(mine) for words in REFUSALS):
            raise Refused(str(mine))
        raise Found(f"{what}: {type(mine).__name__} {mine}; torch.library answers")
    if isinstance(torchs, Exception):
        # docs/citizen.md: without a fake, compilers look into a kernel that is made of PyTorch's
        # operators.
        looked_into = not made.has_fake and way in (on_meta, compiled, checked)
        # Derivatives that torch.library lacks are what torchpar.library is for; a write is never
        # among them.
        if not looked_into and (made.mutates or way in (plain, without_grad, in_inference)):
            raise Found(
                f"{what}: torch.library refuses ({torchs}), torchpar.library answers {mine}"
            )
        return "torchpar alone answers"
    pairs = list(zip(tree_leaves(mine), tree_leaves(torchs), strict=False))
    if len(tree_leaves(mine)) != len(tree_leaves(torchs)) or not all(
        alike(*pair) for pair in pairs
    ):
        raise Found(f"{what}: {mine}, torch.library {torchs}")
    return way.__name__


def alike(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor):
        return bool(a == b)
    return (
        isinstance(b, Tensor)
        and a.shape == b.shape
        and torch.allclose(a, b, rtol=1e-12, equal_nan=True)
    )


def ignored_defaults() -> None:
    """Let operators be called with a keyword argument's default in place of what was given."""
    right = torchpar.library.CustomOpDef.__call__

    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        return right(self, *args)

    torchpar.library.CustomOpDef.__call__ = wrong  # type: ignore[method-assign]


def twice() -> None:
    """Let an operator's rule give compiled autograd twice the gradients."""
    call: Any = torchpar.library.derivatives.Call
    backward = call.backward

    def doubled(*args: Any) -> Any:
        found = backward(*args)
        if not torch._dynamo.compiled_autograd.in_compiled_autograd_region:
            return found
        return tuple(g if g is None else 2 * g for g in found)

    call.backward = doubled


if __name__ == "__main__":
    sys.exit(run(trial, {"keywords": ignored_defaults, "twice": twice}))
