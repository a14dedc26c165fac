# SPDX-License-Identifier: MIT
"""Random calls of torchpar's operators, beside PyTorch's own.

Shapes, dtypes, layouts, broadcasting, unusual, large and small numbers; gradients, forward mode,
vmap, meta tensors and, now and then, torch.compile. An error against float64 is at most twice
PyTorch's and some roundings. Where PyTorch refuses, the operator must, too. Where the operator
alone refuses, its one line must begin with its name, which is the documented refusal: no operator
but `maximum` promotes dtypes or broadcasts.
"""

import math
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from driver import Found, Refused, run
from torch import Tensor, nn

import torchpar
from torchpar.library import player
from torchpar.testing.operators.process_settings import SETTINGS, Settings

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
HALVES = (torch.float16, torch.bfloat16)
OTHERS = (torch.int64, torch.uint8, torch.bool, torch.int8, torch.complex64, torch.uint16)
SIZES = (0, 1, 2, 3, 5, 8, 17, 33, 129)
ORDERS = 4  # of the terms of a sum, in which PyTorch's error is taken, too
ROUNDINGS = 8  # units of the largest result: bias, exp, +, 1/, alpha, beta, and the store
REFUSALS = (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError)


def whole(*tensors: Tensor) -> list[Tensor]:
    """16-bit matrices with zeros up to multiples of 32, since AMX reads beyond the ends of rows."""
    return [
        nn.functional.pad(t, [count for size in t.shape[:-3:-1] for count in (0, -size % 32)])
        if t.dtype in HALVES
        else t
        for t in tensors
    ]


def product(a: Tensor, b: Tensor) -> Tensor:
    if a.dim() < 2 or b.dim() < 2 or a.shape[-1] != b.shape[-1]:
        return a @ b.mT  # which PyTorch refuses
    x, y = whole(a, b)
    return (x @ y.mT)[..., : a.shape[-2], : b.shape[-2]]


def symmetric_matmul(
    a: Tensor, b: Tensor, c: Any = None, *, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    ab = alpha * product(a, b)
    return ab if c is None else ab + beta * c


def linear_sigmoid(x: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
    fits = x.dim() and weight.dim() == 2 and x.shape[-1] == weight.shape[1]
    fits = fits and (bias is None or bias.shape == weight.shape[:1])
    if not fits or x.dtype not in HALVES:
        return nn.functional.linear(x, weight, bias).sigmoid()
    rows = x.shape[:-1].numel()
    x2, w2, *b2 = whole(x.reshape(rows, x.shape[-1]), weight, *([] if bias is None else [bias]))
    z = nn.functional.linear(x2, w2, *b2)[:rows, : len(weight)]
    return z.reshape(*x.shape[:-1], len(weight)).sigmoid()


# Each operator, PyTorch's, and the shapes of its arguments, with a letter for each size.
OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[str, ...]]] = {
    "maximum": (torch.ops.torchpar.maximum, torch.maximum, ("mnk", "mnk")),
    "matmul_t": (torch.ops.torchpar.matmul_t, lambda x: product(x, x), ("mnk",)),
    "symmetric_matmul": (torchpar.symmetric_matmul, symmetric_matmul, ("mnk", "mnk", "mnn")),
    "linear_sigmoid": (
        torchpar.linear_sigmoid,
        linear_sigmoid,
        ("mnk", "ok", "o"),
    ),
    "exact_matmul": (torchpar.exact_matmul, lambda a, b: a @ b.mT, ("mnk", "mok")),
}


def layout(t: Tensor, rng: random.Random, *, expanded: bool) -> Tensor:
    """The same numbers in another layout, or with ``expanded`` one of the rows in place of all."""
    kind = rng.choice(["contiguous", "transposed", "strided", "offset", "expanded", "negated"])
    if kind == "transposed" and t.dim() > 1:
        return t.mT.contiguous().mT
    if kind == "strided":
        return torch.stack([t, t], -1)[..., 0]
    if kind == "offset":
        return torch.cat([t.flatten()[:1], t.flatten()])[t.numel() > 0 :].view(t.shape)
    if kind == "expanded" and t.dim() and expanded:
        return t[:1].expand(t.shape) if len(t) else t
    if kind == "negated" and t.dtype == torch.float32:
        return torch.complex(t, -t).conj().imag
    return t


def operands(name: str, rng: random.Random, most: int = 3) -> list[Tensor]:
    """Random operands, whose sizes differ by up to 2^(2·most)."""
    _, _, shapes = OPERATORS[name]
    given = list(shapes)
    if name in ("symmetric_matmul", "linear_sigmoid") and rng.random() < 0.4:
        given.pop()
    sizes = {letter: rng.choice(SIZES) for letter in "nko"} | {"m": rng.choice((0, 1, 2, 3))}
    batch = rng.choice(["", "m", "m", "mm", "mmm"])
    dtype = rng.choice(FLOATS) if rng.random() < 0.8 else rng.choice(OTHERS)
    dtype = torch.float32 if name == "exact_matmul" and rng.random() < 0.9 else dtype
    tensors = []
    for letters in given:
        shape = [sizes[letter] for letter in letters.replace("m", batch)]
        if rng.random() < (0.3 if name == "maximum" else 0.04):  # broadcasting, or a wrong shape
            at = rng.randrange(len(shape))
            shape = (
                shape[at + 1 :]
                if rng.random() < 0.5
                else [*shape[:at], rng.choice((1, 4)), *shape[at + 1 :]]
            )
        own = (
            rng.choice(FLOATS + OTHERS)
            if rng.random() < (0.3 if name == "maximum" else 0.03)
            else dtype
        )
        t = torch.randn(shape, dtype=torch.float64) * 2.0 ** rng.randint(-most, most)
        t = (4 * t).to(own) if not own.is_floating_point else t.to(own)
        if own.is_floating_point and t.numel() and rng.random() < 0.2:
            t.view(-1)[rng.randrange(t.numel())] = rng.choice([math.nan, math.inf, -math.inf, -0.0])
        tensors.append(t)
    if name == "symmetric_matmul" and tensors[0].shape == tensors[1].shape:
        tensors[1] = tensors[0].clone()  # whose product is symmetric, as the operator requires
        c = tensors[-1]
        if (
            len(tensors) == 3
            and c.is_floating_point()
            and c.dim() > 1
            and c.shape[-1] == c.shape[-2]
        ):
            tensors[2] = torch.maximum(c, c.mT)
    return [layout(t, rng, expanded=name != "symmetric_matmul") for t in tensors]


def attempt(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except REFUSALS as error:
        return error


def attempt_unchanging(what: str, call: Callable[[], Any]) -> Any:
    """Attempt a call, which must leave the settings of the process as they are."""
    settings = Settings(SETTINGS)
    found = attempt(call)
    if changes := settings.changes():
        raise Found(f"{what}: the call changes {', '.join(changes)}")
    return found


def trial(rng: random.Random) -> str:
    name = rng.choice(list(OPERATORS))
    ours, torchs, _ = OPERATORS[name]
    # No product of two such numbers overflows or is subnormal, but in float16.
    is_wide = rng.random() < 0.15
    args = operands(name, rng, 40 if is_wide else 3)
    options: dict[str, float] = {}
    if name == "symmetric_matmul":
        options = {"alpha": rng.choice([1.0, -2.5, 0.5])} | (
            {"beta": rng.choice([1.0, 0.5])} if len(args) == 3 else {}
        )
    what = f"{name} of {[(tuple(t.shape), str(t.dtype)[6:], t.stride()) for t in args]}"
    before = [t.clone() for t in args]
    found = attempt_unchanging(what, lambda: ours(*args, **options))
    plain = attempt(lambda: torchs(*args, **options))
    if isinstance(found, Exception):
        line = str(found)
        if "INTERNAL ASSERT" in line or (
            not isinstance(plain, Exception) and not line.startswith(f"torchpar::{name}")
        ):
            raise Found(f"{what}: {type(found).__name__} {line}")
        raise Refused(line)
    if isinstance(plain, Exception):
        raise Found(f"{what}: PyTorch refuses ({plain})")
    if not all(equal_bits(*pair) for pair in zip(args, before, strict=True)):
        raise Found(f"{what}: an operand has changed")
    wide = [t.double() if t.is_floating_point() else t for t in args]
    ideal = torchs(*wide, **options)
    # PyTorch rounds a 16-bit product before or after it adds the bias, by layout and size.
    is_layer = name == "linear_sigmoid" and args[0].dtype in HALVES
    others = [nn.functional.linear(*args).sigmoid()] if is_layer else []
    rounding = rounding_of(args)
    judge(what, found, plain, ideal, name == "maximum", *others, rounding=rounding)
    if name == "exact_matmul" and found.dtype == torch.float32:
        judge_exact(what, found, ideal, *wide)
    if not equal_bits(found, ours(*args, **options)):
        raise Found(f"{what}: other bits in a second call")
    relaid = [layout(t, rng, expanded=False) for t in args]
    pair = [op(*relaid, **options) for op in (ours, torchs)]
    judge(what, *pair, ideal, name == "maximum", plain, *others, rounding=rounding)
    meta = ours(
        *(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in args),
        **options,
    )
    if (meta.shape, meta.dtype, strides(meta)) != (found.shape, found.dtype, strides(found)):
        raise Found(
            f"{what}: meta {meta.shape} {meta.stride()}, result {found.shape} {found.stride()}"
        )
    kind = rng.choice(
        [
            "value",
            "gradient",
            "forward",
            "vmap",
            "vmap",
            "compile" if rng.random() < 0.05 else "value",
        ]
    )
    # Derivatives of a saturated sigmoid are small differences of large numbers.
    if kind != "value" and not is_wide and all(t.is_floating_point() for t in args):
        CHECKS[kind](f"{what}, {kind}", name, args, options, rng)
    return kind


def equal_bits(a: Tensor, b: Tensor) -> bool:
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.isnan(), b.isnan())
        and bool(((a == b) | a.isnan()).all())
    )


def strides(t: Tensor) -> list[int]:
    """The strides that say where elements are: not those of an empty tensor, nor of axes of length
    1."""
    return [
        stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1 and t.numel()
    ]


def judge(
    what: str,
    found: Tensor,
    plain: Tensor,
    ideal: Tensor,
    exact: bool,
    *others: Tensor,
    rounding: float = 0.0,
) -> None:
    """Compare a result with PyTorch's and with that in float64.

    ``others`` are PyTorch's by other orders of the sums. Where the result is float64 itself,
    PyTorch's error is not known, and ``rounding`` bounds it.
    """
    if (found.shape, found.dtype) != (plain.shape, plain.dtype):
        raise Found(f"{what}: {found.shape} {found.dtype}, PyTorch {plain.shape} {plain.dtype}")
    if exact or not found.is_floating_point():
        if not equal_bits(found, plain):
            raise Found(
                f"{what}: {found.flatten()[:5].tolist()}, PyTorch {plain.flatten()[:5].tolist()}"
            )
        return
    if not found.numel():
        return
    finite = found.isfinite() & plain.isfinite() & ideal.isfinite()
    # A product of PyTorch's overflows before its last sum.
    unit = torch.finfo(found.dtype).eps * ideal.abs().nan_to_num(0, 0, 0).amax()
    better = plain.isinf() & ((found.double() - ideal).abs() <= 4 * unit)
    # The exact product of a row with an infinity is NaN; other rows have theirs.
    alike = finite | better | (found == plain) | (plain.isnan() & ideal.isnan() & found.isnan())
    for one in (plain, *others):
        alike |= found.isnan() & ~one.isfinite()
    if not (alike | ~ideal.to(found.dtype).isfinite()).all():
        raise Found(f"{what}: NaN or infinity at other places than PyTorch's")
    if not finite.any():
        return
    error, *torchs = ((t.double() - ideal)[finite].abs().max() for t in (found, plain, *others))
    largest = max(t.nan_to_num(0, 0, 0) for t in torchs)
    stored = torch.finfo(found.dtype).eps * ideal[finite].abs().max()
    if found.dtype == torch.float64:
        largest = largest + rounding
    if error > 2 * largest + ROUNDINGS * stored:
        raise Found(
            f"{what}: an error of {error:.3g}, PyTorch's is {largest:.3g}, a unit {stored:.3g}"
        )


def judge_exact(what: str, found: Tensor, ideal: Tensor, a: Tensor, b: Tensor) -> None:
    """The result is rounded once; operands are rounded to 2⁻³¹ of the largest of their row, or
    less."""
    if not found.numel() or not a.shape[-1]:
        return
    largest = a.abs().amax(-1, True) * b.abs().amax(-1, True).mT
    bound = 2.0**-24 * ideal.abs() + a.shape[-1] * 2.0**-29 * largest + 2.0**-149
    error = (found.double() - ideal).abs()
    if (wrong := (error > bound) & found.isfinite() & ideal.isfinite()).any():
        raise Found(
            f"{what}: an error of {error[wrong][0]:.3g}, expected at most {bound[wrong][0]:.3g}"
        )


def reordered(name: str, tensors: Sequence[Tensor], order: int) -> list[Tensor]:
    """The operands whose products have the same terms in another of `ORDERS` orders: reversed, or
    shuffled. Few numbers of a sigmoid are not saturated, so that one order shows little of the
    error."""
    sums = 0 if name == "maximum" else 2
    if not order:
        return [t.flip(-1) if i < sums else t for i, t in enumerate(tensors)]

    def shuffled(t: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(order)
        return t[..., torch.randperm(t.shape[-1], generator=generator)] if t.dim() else t

    return [shuffled(t) if i < sums else t for i, t in enumerate(tensors)]


def rounding_of(tensors: Sequence[Tensor]) -> float:
    """A bound of the rounding of products of these operands in float64."""
    terms = max((t.shape[-1] for t in tensors if t.dim()), default=1)
    floats = [t for t in tensors if t.is_floating_point() and t.numel()]
    largest = max((t.abs().nan_to_num(0, 0, 0).max().item() for t in floats), default=0.0)
    return torch.finfo(torch.float64).eps * (terms * largest) ** 2


def slopes(
    function: Callable[..., Any], args: list[Tensor], options: Any, seed: int
) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in args]
    result = function(*leaves, **options)
    weights = torch.randn(
        result.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    if weights.dim() > 1 and weights.shape[-1] == weights.shape[-2]:
        weights = weights + weights.mT
    incoming = weights.to(result.dtype)
    kept = [*leaves, result, incoming]
    before = [t.detach().clone() for t in kept]
    found = torch.autograd.grad(result, leaves, incoming, retain_graph=True)
    if not all(equal_bits(*pair) for pair in zip(kept, before, strict=True)):
        raise Found("the backward writes to an operand, the result or the incoming gradient")
    again = torch.autograd.grad(result, leaves, incoming)
    if not all(equal_bits(*pair) for pair in zip(found, again, strict=True)):
        raise Found("the backward gives other bits in a second call")
    return found


def gradient(what: str, name: str, args: list[Tensor], options: Any, rng: random.Random) -> None:
    ours, torchs, _ = OPERATORS[name]
    if name == "symmetric_matmul":
        # Its gradient is that of the lower half, which tests/ops/test_symmetric_matmul.py defines.
        return
    seed = rng.randrange(99)
    slopes(ours, args, options, seed)  # C++ plays a backward pass after the first call
    results = [slopes(ours, args, options, seed), slopes(torchs, args, options, seed)]
    ideal = slopes(torchs, [t.double() for t in args], options, seed)
    # The gradient of a number that is broadcast adds up all elements.
    rounding = rounding_of([t.flatten() for t in args] if name == "maximum" else args)
    for i, (one, other, wide) in enumerate(zip(*results, ideal, strict=True)):
        if other.isfinite().all() and wide.isfinite().all():
            judge(f"{what} of argument {i}", one, other, wide, False, rounding=rounding)


def forward(what: str, name: str, args: list[Tensor], options: Any, rng: random.Random) -> None:
    ours, torchs, _ = OPERATORS[name]
    if name == "symmetric_matmul":
        return
    args = [
        t.resolve_neg().clone(memory_format=torch.contiguous_format) for t in args
    ]  # as make_dual requires
    tangents = tuple(torch.randn_like(t) for t in args)

    def derivative(
        function: Callable[..., Any], dtype: Any = None, order: int | None = None
    ) -> Tensor:
        pairs = [tuple(t.to(dtype or t.dtype) for t in ts) for ts in (args, tangents)]
        if order is not None:
            pairs = [tuple(reordered(name, ts, order)) for ts in pairs]
        return torch.func.jvp(lambda *a: function(*a, **options), *pairs)[1]

    one, other, wide = derivative(ours), derivative(torchs), derivative(torchs, torch.float64)
    if other.isfinite().all() and wide.isfinite().all():
        rounding = rounding_of([*args, *tangents])
        others = [derivative(torchs, order=order) for order in range(ORDERS)]
        judge(what, one, other, wide, False, *others, rounding=rounding)


def vmap(what: str, name: str, args: list[Tensor], options: Any, rng: random.Random) -> None:
    ours, torchs, _ = OPERATORS[name]
    dims = tuple(rng.choice([None, *range(t.dim() + 1)]) for t in args)
    if all(dim is None for dim in dims):
        return
    if name == "symmetric_matmul":  # A·Bᵀ must be symmetric in each sample
        return

    def samples(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [
            t if d is None else torch.stack([t, 2 * t, -t], d)
            for t, d in zip(tensors, dims, strict=True)
        ]

    def mapped(function: Callable[..., Any], batched: list[Tensor]) -> Tensor:
        return torch.vmap(lambda *a: function(*a, **options), dims)(*batched)

    one, other = (mapped(f, samples(args)) for f in (ours, torchs))
    wide = mapped(torchs, [t.double() for t in samples(args)])
    others = [mapped(torchs, samples(reordered(name, args, order))) for order in range(ORDERS)]
    rounding = rounding_of(samples(args))
    judge(what, one, other, wide, name == "maximum", *others, rounding=rounding)


def compiled(what: str, name: str, args: list[Tensor], options: Any, rng: random.Random) -> None:
    ours, torchs, _ = OPERATORS[name]
    torch.compiler.reset()
    backend = rng.choice(["eager", "aot_eager"])
    one = torch.compile(lambda *a: ours(*a, **options), backend=backend, fullgraph=True)(*args)
    judge(
        what,
        one,
        torchs(*args, **options),
        torchs(*(t.double() for t in args), **options),
        name == "maximum",
    )


CHECKS = {"gradient": gradient, "forward": forward, "vmap": vmap, "compile": compiled}


def transposed_vmap() -> None:
    """Let `matmul_t` compute Xᵀ·X of samples that are squares of 3 × 3 or larger."""
    _, torchs, shapes = OPERATORS["matmul_t"]
    right = OPERATORS["matmul_t"][0]

    def wrong(x: Tensor) -> Any:
        return (
            right(x.mT.contiguous()) if x.dim() > 1 and x.shape[-1] == x.shape[-2] > 2 else right(x)
        )

    OPERATORS["matmul_t"] = (wrong, torchs, shapes)


def last_bit() -> None:
    """Let `exact_matmul` be off by one unit in the last place."""
    right, *others = OPERATORS["exact_matmul"]

    def wrong(a: Tensor, b: Tensor) -> Tensor:
        return right(a, b) * (1 + 2.0**-23)

    OPERATORS["exact_matmul"] = (wrong, *others)


def behind() -> None:
    """Let a 16-bit row of `matmul_t` be NaN where the next row has a number that is not finite."""
    right, *others = OPERATORS["matmul_t"]

    def wrong(x: Tensor) -> Any:
        found = right(x)
        if x.dim() < 2 or x.dtype not in HALVES:
            return found
        before = ~x.isfinite().all(-1)[..., 1:, None]
        return torch.cat(
            [found[..., :-1, :].masked_fill(before, torch.nan), found[..., -1:, :]], -2
        )

    OPERATORS["matmul_t"] = (wrong, *others)


class Overwriting(torch.autograd.Function):
    """X·Xᵀ, whose backward takes the memory of the operand for its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return torch.ops.torchpar.matmul_t(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gradient = (g + g.mT) @ x
        # As a kernel does, of which autograd knows nothing.
        x.new_empty(0).set_(x.untyped_storage()).zero_()
        return gradient


def overwritten() -> None:
    """Let the backward of `matmul_t` overwrite an operand of float32."""
    right, *others = OPERATORS["matmul_t"]

    def wrong(x: Tensor) -> Any:
        is_one = x.requires_grad and x.dtype == torch.float32
        return Overwriting.apply(x) if is_one else right(x)

    OPERATORS["matmul_t"] = (wrong, *others)


def overflow() -> None:
    """Let `linear_sigmoid` compute exp(z)/(1 + exp(z)), which is NaN for large z."""
    right, *others = OPERATORS["linear_sigmoid"]

    def wrong(x: Tensor, weight: Tensor, bias: Any = None) -> Any:
        y = right(x, weight, bias)
        z = nn.functional.linear(x, weight, bias)
        return y.masked_fill(z > math.log(torch.finfo(torch.float32).max), torch.nan)

    OPERATORS["linear_sigmoid"] = (wrong, *others)


def limit() -> None:
    """Let `matmul_t` leave zeros beyond a number of elements, which is drawn."""
    right, *others = OPERATORS["matmul_t"]
    most = int(2 ** random.Random(1).uniform(8, 15))

    def wrong(x: Tensor) -> Any:
        y = right(x)
        return y.masked_fill(torch.arange(y.numel()).view(y.shape) >= most, 0)

    OPERATORS["matmul_t"] = (wrong, *others)


def minus_infinity() -> None:
    """Let `linear_sigmoid` be 1 at −∞."""
    right, *others = OPERATORS["linear_sigmoid"]

    def wrong(x: Tensor, weight: Tensor, bias: Any = None) -> Any:
        y = right(x, weight, bias)
        return y.masked_fill(nn.functional.linear(x, weight, bias).isneginf(), 1)

    OPERATORS["linear_sigmoid"] = (wrong, *others)


def five_dimensions() -> None:
    """Let `maximum` of five dimensions be the minimum."""
    right, *others = OPERATORS["maximum"]

    def wrong(a: Tensor, b: Tensor) -> Any:
        return torch.minimum(a, b) if max(a.dim(), b.dim()) > 4 else right(a, b)

    OPERATORS["maximum"] = (wrong, *others)


def seed() -> None:
    """Let `exact_matmul` seed PyTorch's generator."""
    right, *others = OPERATORS["exact_matmul"]

    def wrong(a: Tensor, b: Tensor) -> Any:
        torch.manual_seed(0)
        return right(a, b)

    OPERATORS["exact_matmul"] = (wrong, *others)


class Remembering:
    """What C++ keeps of an operator, with a fault in each tape that it gets."""

    def __init__(self, installed: Any):
        self.installed = installed

    def __getattr__(self, name: str) -> Any:
        return getattr(self.installed, name)


def let_players_keep(kind: type[Remembering]) -> None:
    right = player.Player.__init__

    def wrong(self: Any, op: Any) -> None:
        right(self, op)
        self.installed = kind(self.installed)

    player.Player.__init__ = wrong  # type: ignore[method-assign]


def stale_key() -> None:
    """With --by-cpp, play the tape of an operand's layout for its transposed layout, too."""

    class Stale(Remembering):
        def remember(self, values: Any, tape: Any) -> None:
            self.installed.remember(values, tape)
            others = [
                t.mT.contiguous().mT if isinstance(t, Tensor) and t.dim() > 1 else t for t in values
            ]
            self.installed.remember(tuple(others), tape)

    let_players_keep(Stale)


def wrong_stride() -> None:
    """With --by-cpp, exchange the last two strides of a view that a tape takes."""

    class Exchanged(Remembering):
        def remember(self, values: Any, tape: Any) -> None:
            for place, step in enumerate(tape[1] if tape else []):
                if step[0] != "view" or len(step[2]) < 2:
                    continue
                (rows, columns), (down, across) = step[2][-2:], step[3][-2:]
                last = (rows - 1) * down + (columns - 1) * across
                if down != across and (rows - 1) * across + (columns - 1) * down <= last:
                    strides = [*step[3][:-2], across, down]
                    tape[1][place] = (*step[:3], strides, *step[4:])
            self.installed.remember(values, tape)

    let_players_keep(Exchanged)


def dropped_gradient() -> None:
    """With --by-cpp, leave out the last gradient of a tape."""

    class Dropped(Remembering):
        def remember_backward(self, *given: Any) -> None:
            *others, tape = given
            if tape:
                kept = [place for place, slot in enumerate(tape[2]) if slot >= 0]
                tape[2][kept[-1]] = -1
            self.installed.remember_backward(*others, tape)

    let_players_keep(Dropped)


if __name__ == "__main__":
    faults = {
        "stale-key": stale_key,
        "wrong-stride": wrong_stride,
        "dropped-gradient": dropped_gradient,
        "transposed": transposed_vmap,
        "last-bit": last_bit,
        "behind": behind,
        "overwritten": overwritten,
        "overflow": overflow,
        "limit": limit,
        "minus-infinity": minus_infinity,
        "five-dimensions": five_dimensions,
        "seed": seed,
    }
    sys.exit(run(trial, faults))
