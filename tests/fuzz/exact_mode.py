# SPDX-License-Identifier: MIT
"""Samples of PyTorch's own operator tests (OpInfo), in `torchpar.exact.mode` and in plain PyTorch.

A trial takes one operator, one sample of float32, bfloat16, float16 or integers, and the results or
the gradients. A `ConfigError` is the
documented refusal. Where PyTorch refuses, the mode must refuse, too. Otherwise:

- shapes and dtypes are PyTorch's, integers are equal, NaN and infinity stand where they do in
  PyTorch or float64;
- an error against float64 is at most twice PyTorch's plus `ROUNDINGS` units of the last place;
- bits do not depend on threads, the default dtype, inference mode, activation checkpoints, or the
  other rows of the batch.

Some trials take steps of Muon. Its error against float64 is at most twice that of float32, plus the
rounding of singular values near 0. Its bits do not depend on threads, on the other matrices, on the
layout of gradients, on how the rate is given, or on a state that is saved and loaded between steps;
a trial takes two of these.

The last line's digest is of all bits. With `ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2` it
must be the same, for the same seed and `--trials`. With `ATEN_CPU_CAPABILITY=default` it is not:
PyTorch then draws other operands.
"""

import copy
import hashlib
import itertools
import math
import random
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from driver import Found, Refused, run
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import BinaryUfuncInfo, OpInfo, UnaryUfuncInfo
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from torchpar import exact
from torchpar.errors import ConfigError
from torchpar.optim import Muon
from torchpar.optim.newton_schulz import COEFFICIENTS

ROUNDINGS = 4  # of an element's function that is composed of several which round once
# NaN crashes some of MKL's.
LAPACK = ("eig", "lstsq", "svd", "qr", "solve", "inv", "lu_", "cholesky", "rank")
WEIGHT = 2.5  # the largest of the weights of a sum whose gradients are taken
SAMPLES = 24  # that are drawn from for one operator
SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 1e-40, 1e30, 0.5)
# Their results are memory that nobody wrote.
UNINITIALISED = {
    "empty",
    "empty_like",
    "empty_permuted",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
}
# Each of their rows is computed from all rows, though its number may be the same as without them.
MIXING = {"corrcoef", "cov", "nn.functional.batch_norm"}
# docs/exact.md says that its second result is another one.
DIFFERENT = {"torch.ops.aten._scaled_dot_product_flash_attention_for_cpu"}
OPERATORS = [
    op for op in op_db if op.supports_dtype(torch.float32, "cpu") and op.name not in DIFFERENT
]
_REPLACED = ("dot_product_attention", "group_norm", "functional.batch_norm")
REPLACED = [op for op in OPERATORS if op.name.endswith(_REPLACED)]
# Of the trials with floats, and how much larger other rows become.
FLOATS = {torch.float32: 0.7, torch.bfloat16: 0.15, torch.float16: 0.15}
LOUDER = {torch.float16: 2.0**8}
# Their statistics are float32, as docs/exact.md says.
NORMS = {"native_layer_norm", "native_group_norm"}
# Their errors are at most k·2⁻²⁷·max|a|·max|b| and half a unit, of 16 bits k·2⁻²⁰·max|a|·max|b|, as
# docs/exact.md says.
PRODUCTS = [
    "mm",
    "bmm",
    "matmul",
    "dot",
    "inner",
    "mv",
    "outer",
    "einsum",
    "tensordot",
    "linear",
    "conv",
    "kron",
    "attention",
]

Call = Callable[[], Any]
MUON = 0.05  # the share of trials of Muon
# An iteration multiplies a singular value near 0, and its rounding of 2⁻²⁴, by 3.4445.
SMALL = 4 * 3.4445**5 * 2.0**-24


def floats(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor) and t.is_floating_point()]


def tensors(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


def detached(value: Any, dtype: torch.dtype | None = None) -> Any:
    """Copies of all tensors, those of `FLOATS` in ``dtype``."""

    def copy(t: Tensor) -> Tensor:
        t = t.detach().clone()
        return t.to(dtype) if dtype and t.dtype in FLOATS else t

    return tree_map_only(Tensor, copy, value)


class Sample:
    """A call of an operator: its arguments, and what is computed of its result."""

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        slopes: bool,
    ):
        self.function, self.args, self.kwargs, self.slopes = function, args, kwargs, slopes

    def checkpointed(self, **options: bool) -> "Sample":
        """The same sample, of a function that the backward pass calls again."""
        function = partial(checkpoint, self.function, **options)
        return Sample(function, self.args, self.kwargs, self.slopes)

    def __call__(
        self, args: tuple[Any, ...] | None = None, dtype: torch.dtype | None = None
    ) -> list[Tensor]:
        """The result's tensors, or the gradients of Σ w·result for weights w that alternate."""
        torch.manual_seed(0)
        args, kwargs = detached((self.args if args is None else args, self.kwargs), dtype)
        if dtype is not None and kwargs.get("dtype") in FLOATS:
            kwargs["dtype"] = dtype
        if not self.slopes:
            return [t.detach() for t in tensors(self.function(*args, **kwargs))]
        inputs = [t.requires_grad_() for t in floats((args, kwargs))]
        results = [t for t in floats(self.function(*args, **kwargs)) if t.requires_grad]
        if not results:
            return []
        weights = [self.weights(t) for t in results]
        found = torch.autograd.grad(results, inputs, weights, allow_unused=True)
        return [t for t in found if t is not None]

    @staticmethod
    def weights(result: Tensor) -> Tensor:
        # Of the place in a row alone, so that gradients of rows do not depend on the number of
        # rows.
        row = result.shape[1:].numel() if result.dim() else 1
        places = torch.arange(result.numel()).remainder(max(row, 1)).remainder(5)
        return (places - 4 + WEIGHT).to(result.dtype).view(result.shape)


def draw(rng: random.Random) -> tuple[OpInfo, Sample | None, Call | None]:
    # Where the mode replaces a function of PyTorch's, and not an operator, more is at risk.
    op = rng.choice(REPLACED if rng.random() < 0.05 else OPERATORS)
    torch.manual_seed(rng.getrandbits(60))
    if op.error_inputs_func is not None and rng.random() < 0.15:
        errors = list(itertools.islice(op.error_inputs("cpu"), SAMPLES))
        if errors:
            sample = rng.choice(errors).sample_input
            return op, None, lambda: op(sample.input, *sample.args, **sample.kwargs)
    dtype = rng.choices(list(FLOATS), list(FLOATS.values()))[0]
    if not op.supports_dtype(dtype, "cpu"):
        dtype = torch.float32
    if rng.random() < 0.15:
        choices = [d for d in (torch.int64, torch.int32, torch.uint8, torch.int8, torch.bool)]
        choices = [d for d in choices if op.supports_dtype(d, "cpu")]
        dtype = rng.choice(choices) if choices else dtype
    draws = op.sample_inputs if rng.random() < 0.6 else op.reference_inputs
    samples = list(itertools.islice(draws("cpu", dtype, requires_grad=False), SAMPLES))
    if not samples:
        raise Refused("no samples")
    chosen = rng.choice(samples)
    args = detached((chosen.input, *chosen.args))
    if dtype in FLOATS and rng.random() < 0.25 and not any(name in op.name for name in LAPACK):
        spread(args, rng)
    slopes = op.supports_autograd and dtype in FLOATS and rng.random() < 0.3
    return op, Sample(op.op, args, detached(chosen.kwargs), slopes), None


def spread(args: Any, rng: random.Random) -> None:
    """Write unusual numbers, or rows of very different sizes, into the arguments."""
    for t in floats(args):
        if t.numel() == 0 or t.is_sparse or t.layout != torch.strided:
            continue
        if rng.random() < 0.5:
            t[tuple(rng.randrange(size) for size in t.shape)] = rng.choice(SPECIAL)
        elif t.dim():
            most = 8 if t.dtype == torch.float16 else 40
            t[rng.randrange(len(t))] *= 2.0 ** rng.randint(-most, most)


def result_of(call: Call, *contexts: Any) -> Any:
    """A result, or the error that took its place."""
    try:
        with exact.mode() if contexts == () else contexts[0]:
            return call()
    except (
        Exception
    ) as error:  # any error is a refusal of PyTorch's; of the mode's, `judge` looks at its kind
        return error


def trial(rng: random.Random) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if rng.random() < MUON:
            return muon(rng)
        op, sample, error = draw(rng)
        name = op.name + ("" if not op.variant_test_name else f" ({op.variant_test_name})")
        try:
            return refuses(error) if sample is None else compare(op, sample, rng)
        except Found as found:
            raise Found(
                f"{name}{', gradient' if sample and sample.slopes else ''}: {found}"
            ) from None


class Training:
    """Steps of Muon: first weights, gradients of each step, and arguments."""

    def __init__(self, rng: random.Random):
        torch.manual_seed(rng.getrandbits(60))
        sizes = (1, 2, 3, 8, 17, 32, 33, 40)
        shapes = [(rng.choice(sizes), rng.choice(sizes)) for _ in range(rng.randint(1, 4))]
        self.weights = [torch.randn(shape) for shape in shapes]
        scales = [rng.choice([1e-3, 1.0, 30.0]) for _ in range(rng.randint(1, 2))]
        self.gradients = [[torch.randn(shape) * scale for shape in shapes] for scale in scales]
        for step in self.gradients:
            g = rng.choice(step)
            if rng.random() < 0.5:  # of rank 1, or rows of very different sizes
                g[:] = g[:1]
            else:
                spread([g], rng)
                g.nan_to_num_(1.0, 1.0, -1.0)
        self.options = {
            "lr": rng.choice([0.1, 0.02]),
            "momentum": rng.choice([0.0, 0.9]),
            "weight_decay": rng.choice([0.0, 0.1]),
            "nesterov": rng.random() < 0.5,
        }

    def take(
        self, indices: list[int], change: Callable[[Tensor], Tensor], lr: Any, reloads: bool
    ) -> list[Tensor]:
        """The weights of some matrices after the steps in the mode."""
        weights = [self.weights[i].clone().requires_grad_() for i in indices]
        options = {**self.options, "lr": lr}
        with exact.mode():
            optimizer = Muon(weights, **options)
            for gradients in self.gradients:
                for p, i in zip(weights, indices, strict=True):
                    p.grad = change(gradients[i])
                optimizer.step()
                if reloads:
                    state = copy.deepcopy(optimizer.state_dict())
                    optimizer = Muon(weights, **options)
                    optimizer.load_state_dict(state)
        return [p.detach() for p in weights]

    def plain(self, i: int, dtype: torch.dtype) -> Tensor:
        """The weights of a matrix after the steps, by PyTorch in ``dtype``."""
        lr, mu, decay = (self.options[name] for name in ("lr", "momentum", "weight_decay"))
        w = self.weights[i].to(dtype)
        b, (n, m) = torch.zeros_like(w), w.shape
        for gradients in self.gradients:
            g = gradients[i].to(dtype)
            b = b + (1 - mu) * (g - b)
            x = g + mu * (b - g) if self.options["nesterov"] else b
            x = x.T if n > m else x
            x = x / x.norm().clamp(min=1e-7)
            for _ in range(5):
                r = x @ x.T
                x = COEFFICIENTS[0] * x + (COEFFICIENTS[1] * r + COEFFICIENTS[2] * r @ r) @ x
            x = x.T if n > m else x
            w = (1 - lr * decay) * w - lr * max(1.0, n / m) ** 0.5 * x
        return w


def muon(rng: random.Random) -> str:
    training = Training(rng)
    lr, every = training.options["lr"], [*range(len(training.weights))]
    found = training.take(every, torch.clone, lr, False)
    for i, one in enumerate(found):
        ideal, native = training.plain(i, torch.float64), training.plain(i, torch.float32)
        error, of_torch = ((t.double() - ideal).norm().item() for t in (one, native))
        steps = len(training.gradients) * lr * max(1.0, one.shape[0] / one.shape[1]) ** 0.5
        bound = 2 * of_torch + SMALL * steps * min(one.shape) ** 0.5 + 2.0**-22 * ideal.norm()
        if not error <= bound:
            raise Found(f"Muon of {tuple(one.shape)}: an error of {error:.2g}, above {bound:.2g}")
    dtype = rng.choice([torch.float32, torch.float64])
    take = partial(training.take, every, torch.clone, lr, False)
    others: dict[str, Callable[[], list[Tensor]]] = {
        "each matrix alone": lambda: [training.take([i], torch.clone, lr, False)[0] for i in every],
        "transposed memory": lambda: training.take(every, lambda g: g.T.contiguous().T, lr, False),
        "a rate in a tensor": lambda: training.take(
            every, torch.clone, torch.tensor(lr, dtype=dtype), False
        ),
        "a state that is loaded": lambda: training.take(every, torch.clone, lr, True),
        "2 threads": take,
    }
    for name in rng.sample(sorted(others), 2):
        with Threads(2) if name == "2 threads" else nullcontext():
            other = others[name]()
        if not same(found, other):
            raise Found(f"Muon, with {name}: {brief_all(other)}, without it: {brief_all(found)}")
    bits = hashlib.sha256()
    for t in found:
        bits.update(bytes_of(t))
    return bits.hexdigest()


def refuses(call: Call) -> str:
    plain = result_of(call, nullcontext())
    found = result_of(call)
    if isinstance(plain, Exception) and not isinstance(found, Exception):
        raise Found(f"PyTorch refuses ({type(plain).__name__}: {plain}), the mode returns {found}")
    return "an error"


def compare(op: OpInfo, sample: Sample, rng: random.Random) -> str:
    plain, found = result_of(sample, nullcontext()), result_of(sample)
    if isinstance(plain, Exception):
        if not isinstance(found, Exception):
            raise Found(
                f"PyTorch refuses ({type(plain).__name__}: {plain}), the mode returns {found}"
            )
        return "an error"
    if isinstance(found, ConfigError):
        raise Refused(str(found))
    if isinstance(found, Exception):
        raise Found(f"{type(found).__name__} where PyTorch answers: {found}")
    mine, torchs = ([(tuple(t.shape), t.dtype) for t in results] for results in (found, plain))
    if op.name in NORMS:
        mine, torchs = (one[:1] + [shape for shape, _ in one[1:]] for one in (mine, torchs))
    if mine != torchs:
        raise Found(f"shapes and dtypes {mine}, PyTorch's {torchs}")
    if (
        not found
        or any(t.layout != torch.strided or t.is_quantized for t in found)
        or op.name in UNINITIALISED
    ):
        return "not compared"
    with torch.random.fork_rng():
        judged = [t.to(p.dtype) for t, p in zip(found, plain, strict=True)]
        values(op, sample, plain, judged if op.name in NORMS else found)
        invariances(op, sample, found, rng)
    bits = hashlib.sha256()
    for t in found:
        bits.update(bytes_of(t))
    return bits.hexdigest()


def bytes_of(t: Tensor) -> bytes:
    t = t.resolve_conj().resolve_neg()
    t = (
        torch.where(t.isnan(), torch.full_like(t, math.nan), t) if t.is_floating_point() else t
    )  # NaN's bits vary
    flat = torch.empty(t.numel(), dtype=t.dtype).copy_(t.flatten())  # of a stride that is 1
    return flat.view(torch.uint8).numpy().tobytes()


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return [bytes_of(t) for t in one] == [bytes_of(t) for t in other]


def is_random(sample: Sample) -> bool:
    """Whether PyTorch's result depends on the seed."""
    first = sample()
    seeds = torch.manual_seed
    try:
        for another in range(1, 9):  # few elements can agree by chance
            torch.manual_seed = lambda seed, another=another: seeds(another)
            if not same(first, sample()):
                return True
        return False
    finally:
        torch.manual_seed = seeds


def may_differ(op: OpInfo, sample: Sample, one: Tensor, native: Tensor, rounded: Tensor) -> Tensor:
    """Where a result that is not finite may differ from PyTorch's."""
    operands = floats(sample.args)
    are_finite = all(t.isfinite().all() for t in operands)
    # In a gradient, which of them depends on the order.
    special = ~one.isfinite() & ~rounded.isfinite()
    # A value that is not finite makes all of the output NaN, or none of it.
    if "attention" in op.name:
        special |= one.isfinite() & rounded.isnan()
        # Of a query or a key that is NaN, PyTorch's output is 0 in some shapes.
        special |= one.isnan() & (not are_finite)
        rows = rounded.isfinite().all(-1, keepdim=True) if one.dim() else torch.tensor(False)
        return special | (one.isnan() & ~rows)
    if "conv" in op.name:  # a weight that is not finite times the zeros of the padding is NaN
        return special | (one.isnan() & (not are_finite))
    if "group_norm" in op.name:  # PyTorch adds products with a weight, ∞ − ∞
        return (special | (one.isinf() & native.isnan())) & (not are_finite)
    return special if sample.slopes else torch.zeros_like(special)


def values(op: OpInfo, sample: Sample, plain: list[Tensor], found: list[Tensor]) -> None:  # noqa: C901, PLR0912  # a case for each kind of argument
    if is_random(sample):
        return
    ideal = result_of(lambda: sample(dtype=torch.float64), nullcontext())
    if isinstance(ideal, Exception) or [t.shape for t in ideal] != [t.shape for t in plain]:
        ideal = plain
    elementwise = isinstance(op, (UnaryUfuncInfo, BinaryUfuncInfo)) and not sample.slopes
    operands = [
        t.abs().nan_to_num(0, 0, 0).max().item()
        for t in floats((sample.args, sample.kwargs))
        if t.numel()
    ]
    for at, (one, native, wide) in enumerate(zip(found, plain, ideal, strict=True)):
        if not one.is_floating_point():
            pair = picked(op, sample, one, native) if one is found[-1] else (one, native)
            if not one.is_complex() and not torch.equal(*pair):
                raise Found(f"{brief(one)}, PyTorch has {brief(native)}")
            continue
        if one.dtype not in FLOATS:
            continue
        eps, tiny = torch.finfo(one.dtype).eps, torch.finfo(one.dtype).tiny
        rounded = wide.to(one.dtype)
        agree = torch.isclose(one, native, rtol=0, atol=0, equal_nan=True)
        agree |= torch.isclose(one, rounded, rtol=0, atol=0, equal_nan=True)
        finite = one.isfinite() & (native.isfinite() | rounded.isfinite())
        special = may_differ(op, sample, one, native, rounded)
        if not (agree | finite | special).all():
            raise Found(
                f"special values: {brief(one)}, PyTorch has {brief(native)}, float64 {brief(wide)}"
            )
        judged = finite & wide.isfinite() & ~agree
        if not judged.any():
            continue
        wide = wide.double()
        error, torchs = (
            (one.double() - wide).abs(),
            (native.double() - wide).abs().nan_to_num(0, 0, 0),
        )
        size = wide.abs().clamp(min=tiny).nan_to_num(0, 0, 0)
        if not elementwise:
            torchs, size = torchs.max(), size.max()
        if sample.slopes and not is_large(wide, eps):
            size = size.new_tensor(WEIGHT)
        bound = 2 * torchs + ROUNDINGS * eps * size
        if any(word in op.name for word in PRODUCTS) and operands:
            terms = max(t.numel() for t in floats((sample.args, sample.kwargs)))
            narrow = any(t.dtype.itemsize == 2 for t in floats((sample.args, sample.kwargs)))
            bound = bound + terms * 2.0 ** (-20 if narrow else -27) * max(operands) ** 2
        if not elementwise and (judged & (error > bound)).any():
            bound = bound + ROUNDINGS * sensitivity(sample, at) + 2 * errors_nearby(sample, at)
        if (wrong := judged & (error > bound)).any():
            units = (error / size)[wrong].max() / eps
            numbers = [brief(t[wrong]) for t in (one, native, wide)]
            raise Found(
                f"an error of {units:.3g} units: {numbers[0]}, PyTorch {numbers[1]}, float64 "
                f"{numbers[2]}"
            )


def is_large(slopes: Tensor, eps: float) -> bool:
    """Whether gradients are more than what is left of terms of the weights' size that cancel each
    other."""
    return bool((slopes.abs() > eps / 2 * WEIGHT).any())


def sensitivity(sample: Sample, at: int) -> Tensor:
    """How much the result of this number changes in float64 if each operand is rounded once."""
    generator = torch.Generator().manual_seed(0)

    def rounded(t: Tensor) -> Tensor:
        if t.dtype not in FLOATS:
            return t
        eps = torch.finfo(t.dtype).eps
        return t.double() * (1 + eps * (torch.rand(t.shape, generator=generator) - 0.5))

    ideal = sample(dtype=torch.float64)[at]
    draws = [
        sample(tree_map_only(Tensor, rounded, sample.args), torch.float64)[at] for _ in range(4)
    ]
    return torch.stack([(draw - ideal).abs().nan_to_num(0, 0, 0) for draw in draws]).amax()


def errors_nearby(sample: Sample, at: int) -> Tensor:
    """PyTorch's largest error with operands near these: in one result its roundings may cancel by
    chance."""
    generator = torch.Generator().manual_seed(0)

    def moved(t: Tensor) -> Tensor:
        if t.dtype not in FLOATS:
            return t
        by = max(2.0**-10, 8 * torch.finfo(t.dtype).eps)
        return (t * (1 + by * (torch.rand(t.shape, generator=generator) - 0.5))).to(t.dtype)

    errors = []
    for _ in range(8):
        args = tree_map_only(Tensor, moved, sample.args)
        native, ideal = sample(args)[at], sample(args, torch.float64)[at]
        errors.append((native.double() - ideal).abs().nan_to_num(0, 0, 0).amax())
    return torch.stack(errors).amax()


def picked(op: OpInfo, sample: Sample, *indices: Tensor) -> tuple[Tensor, ...]:
    """The elements that indices of a sort name in place of these: PyTorch leaves equal elements
    anywhere."""
    at = {"sort": 1, "argsort": 1, "topk": 2}.get(op.name)
    operand = sample.args[0]
    if at is None or not operand.dim() or any(t.dtype != torch.int64 for t in indices):
        return indices
    dim = sample.kwargs.get("dim", sample.args[at] if len(sample.args) > at else -1)
    return tuple(operand.gather(dim, t).nan_to_num(-7.5, math.inf, -math.inf) for t in indices)


def brief(t: Tensor) -> str:
    return " ".join(str(t.flatten()[:6].tolist()).split())


class DefaultDtype:
    """Another default dtype for a time."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.before = dtype, torch.get_default_dtype()

    def __enter__(self) -> None:
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: Any) -> None:
        torch.set_default_dtype(self.before)


class Threads:
    """Another number of threads for a time."""

    def __init__(self, threads: int):
        self.threads, self.before = threads, torch.get_num_threads()

    def __enter__(self) -> None:
        torch.set_num_threads(self.threads)

    def __exit__(self, *_: Any) -> None:
        torch.set_num_threads(self.before)


def invariances(op: OpInfo, sample: Sample, found: list[Tensor], rng: random.Random) -> None:
    circumstances: dict[str, tuple[Any, Any]] = {
        "2 threads": (Threads(2), None),
        "a default dtype of bfloat16": (DefaultDtype(torch.bfloat16), DefaultDtype(torch.bfloat16)),
        "a default dtype of float64": (DefaultDtype(torch.float64), DefaultDtype(torch.float64)),
    }
    if not sample.slopes:
        circumstances["inference mode"] = (torch.inference_mode(), torch.inference_mode())
    for name, (context, for_torch) in circumstances.items():
        with context:
            other = result_of(sample)
        if not isinstance(other, Exception) and same(found, other):
            continue
        if for_torch is not None:
            plain = result_of(sample, for_torch)
            dtypes = None if isinstance(plain, Exception) else [t.dtype for t in plain]
            if dtypes != [t.dtype for t in found]:
                continue  # PyTorch's own result depends on it
        raise Found(f"with {name}: {brief_all(other)}, without it: {brief_all(found)}")
    if sample.slopes:
        # Not reentrant, which takes tensors alone, and none in lists.
        other = result_of(sample.checkpointed(use_reentrant=False))
        if isinstance(other, Exception) or not same(found, other):
            raise Found(f"with a checkpoint: {brief_all(other)}, without: {brief_all(found)}")
    rows(op, sample, found, rng)


def brief_all(value: Any) -> str:
    return repr(value) if isinstance(value, Exception) else ", ".join(map(brief, value))


def rows(op: OpInfo, sample: Sample, found: list[Tensor], rng: random.Random) -> None:  # noqa: C901  # a case for each kind of argument
    """Compare the bits of a row in a batch of one, and beside rows of other sizes.

    Whether an operator maps rows to rows is tried in plain PyTorch with float64.
    """
    sizes = {len(t) for t in floats(sample.args) if t.dim()}
    size = max(sizes, default=0)
    if (
        op.name in MIXING
        or size < 2
        or not found
        or any(t.dim() == 0 or len(t) != size for t in found)
        or is_random(sample)
    ):
        return
    kept = rng.randrange(size)
    # Whether all operands of this length are batches, or the first one is.
    everywhere = rng.random() < 0.5
    first = next(t for t in floats(sample.args) if t.dim() and len(t) == size)

    def changed(change: Callable[[Tensor], Tensor]) -> Any:
        def one(t: Tensor) -> Tensor:
            of_batch = t.dim() and len(t) == size and (everywhere or t is first)
            return change(t.detach()) if of_batch else t

        return tree_map_only(Tensor, one, sample.args)

    def louder(t: Tensor) -> Tensor:
        t = t.clone()
        if t.is_floating_point():
            row = t[kept].clone()
            t *= LOUDER.get(t.dtype, 2.0**20) * (
                1
                + torch.rand(t.shape, generator=torch.Generator().manual_seed(0)).round(decimals=1)
            )
            t[kept] = row
        return t

    for name, args, place in (
        ("alone", changed(lambda t: t[kept : kept + 1].clone()), slice(0, 1)),
        ("beside rows 2²⁰ times larger", changed(louder), slice(kept, kept + 1)),
    ):
        expected = result_of(lambda: sample(dtype=torch.float64), nullcontext())
        wide = result_of(lambda args=args: sample(args, dtype=torch.float64), nullcontext())
        if isinstance(expected, Exception) or isinstance(wide, Exception):
            continue
        before, after = [t[kept : kept + 1] for t in expected], [t[place] for t in wide if t.dim()]
        if len(before) != len(after) or not all(
            a.shape == b.shape
            and torch.allclose(a.double(), b.double(), rtol=1e-12, atol=0, equal_nan=True)
            and torch.equal(a.double().signbit()[a == 0], b.double().signbit()[a == 0])
            for a, b in zip(before, after, strict=True)
        ):
            continue  # other rows matter
        eps = max((torch.finfo(t.dtype).eps for t in floats(found)), default=0.0)
        if sample.slopes and not any(is_large(t, eps) for t in before):
            continue
        other = result_of(lambda args=args: sample(args))
        if isinstance(other, ConfigError):
            continue
        if isinstance(other, Exception):
            raise Found(f"row {kept} {name}: {other!r}")
        mine, theirs = [t[kept : kept + 1] for t in found], [t[place] for t in other]
        if not same(mine, theirs):
            raise Found(
                f"row {kept} {name} has {brief_all(theirs)}, in the batch {brief_all(mine)}"
            )


def draw_from(*names: str) -> None:
    """Draw operators of these names alone: a fault in one of hundreds is drawn seldom."""
    global MUON
    MUON = 0.0
    REPLACED[:] = OPERATORS[:] = [op for op in OPERATORS if op.name in names]


def unfaithful_exp() -> None:
    """Let `exp` be wrong by 16 units of the last place."""
    from torchpar.exact import registry

    draw_from("exp", "expm1", "sigmoid", "softmax", "logsumexp")

    right = registry.EXACT_RULES["exp"]
    registry.EXACT_RULES["exp"] = lambda x: right(x) * (1 + 2.0**-19)


def dependent_rows() -> None:
    """Let the rows of a `sum` depend on the largest number of all rows."""
    from torchpar.exact import registry

    draw_from("sum", "mean", "var", "nansum")

    right = registry.EXACT_RULES["sum"]

    def rule(x: Tensor, *args: Any, **options: Any) -> Tensor:
        unit = x.detach().abs().max() * 2.0**-20 if x.numel() and x.is_floating_point() else 1
        return right((x / unit).round() * unit if x.is_floating_point() else x, *args, **options)

    registry.EXACT_RULES["sum"] = rule


def no_recomputed_functions() -> None:
    """Let the backward pass call PyTorch's attention and group norm again, not the mode's."""
    from torchpar.exact import dispatch

    draw_from(*(op.name for op in REPLACED))

    dispatch.within = lambda mode: {}


def rounded_updates() -> None:
    """Let Muon round its updates to bfloat16, as it does outside of the mode."""
    global MUON
    from torchpar.optim import newton_schulz

    MUON = 1.0

    newton_schulz.dtype_of_updates = lambda: torch.bfloat16


def fewer_bits_beside_others() -> None:
    """Let the bits of Muon depend on the other matrices of a batch."""
    global MUON
    from torchpar.optim import matrices

    MUON = 1.0

    right = matrices._orthogonalize_batch

    def wrong(straight: list[Tensor], transposed: list[Tensor], *args: Any) -> list[Tensor]:
        count = len(straight) + len(transposed)
        return [t * (1 + 2.0**-23 * (count > 1)) for t in right(straight, transposed, *args)]

    matrices._orthogonalize_batch = wrong


def coarse_products() -> None:
    """Let products of 16 bits keep one of their three digits."""
    from torchpar.ops import exact_digits

    draw_from("mm", "matmul", "addmm", "bmm", "nn.functional.linear")
    del FLOATS[torch.float32], FLOATS[torch.bfloat16]

    right = exact_digits.digits

    def digits(x: Tensor, e: Tensor) -> Tensor:
        found = right(x, e)
        if found.shape[-2] == 3:
            found[..., 1:, :] = 0
        return found

    exact_digits.digits = digits


FAULTS = {
    "exp": unfaithful_exp,
    "rows": dependent_rows,
    "checkpoint": no_recomputed_functions,
    "rounded-muon": rounded_updates,
    "batched-muon": fewer_bits_beside_others,
    "digits": coarse_products,
}

if __name__ == "__main__":
    sys.exit(run(trial, FAULTS))
