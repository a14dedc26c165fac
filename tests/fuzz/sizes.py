# SPDX-License-Identifier: MIT
"""Random sizes that a compiler does not know, of torchpar's operators beside PyTorch's own.

Sizes are dynamic for the whole call, marked as dynamic, chosen by masks, or names of an exported
program. Operands broadcast, and some are mapped by vmap. Values and gradients are judged as in
operators.py. An operator must be compiled no more often than PyTorch's, and may refuse only what
PyTorch's refuses.
"""

import io
import logging
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, NamedTuple

import torch
from driver import Found, Refused, run
from operators import HALVES, OPERATORS, REFUSALS, judge, rounding_of
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

SIZES = (2, 3, 4, 5)  # few, so that two often happen to be equal
MOST = 8
CALLS = 3  # of one graph

Shape = tuple[str, ...]  # a letter for each dimension, and "1" for one of size 1


class Trial(NamedTuple):
    """What is compiled, and the sizes of its calls.

    Attributes:
        shapes: of the operands.
        free: the letters whose sizes are not known, and differ from call to call.
        alone: a dimension of an operand that is not known, where all else is; None for letters.
        calls: the size of each letter, for each call.
        dims: the dimensions over which vmap maps, or None.
    """

    name: str
    way: str
    shapes: Sequence[Shape]
    free: str
    alone: tuple[int, int] | None
    calls: Sequence[dict[str, int]]
    dims: tuple[int | None, ...] | None
    dtype: torch.dtype
    options: dict[str, float]
    backend: str
    has_gradient: bool
    seed: int


def draw(rng: random.Random) -> Trial:
    name = rng.choice(["maximum", *OPERATORS])
    given = list(OPERATORS[name][2])
    if name in ("symmetric_matmul", "linear_sigmoid") and rng.random() < 0.4:
        given.pop()
    batch = rng.choice(["", "", "m", "mp"])
    shapes = [tuple(letters.replace("m", batch)) for letters in given]
    if name == "maximum":
        shapes = [broadcast(shape, rng) for shape in shapes]
    dims = None
    if rng.random() < 0.25:  # a dimension v more for some operands, anywhere
        dims = tuple(rng.choice([None, *range(len(shape) + 1)]) for shape in shapes)
        if all(dim is None for dim in dims) or name == "symmetric_matmul":
            dims = None
        else:
            shapes = [
                s if dim is None else (*s[:dim], "v", *s[dim:])
                for s, dim in zip(shapes, dims, strict=True)
            ]
    letters = sorted({letter for shape in shapes for letter in shape} - {"1"})
    free = "".join(letter for letter in letters if rng.random() < 0.6) or "".join(letters[:1])
    way = rng.choice(["dynamic", "marked", "chosen", "chosen", "exported", "exported, chosen"])
    first = {letter: rng.choice(SIZES) for letter in letters}
    # A size that depends on data may be 0 or 1 when the graph runs.
    sizes = (*SIZES, MOST, *((0, 1) if "chosen" in way else ()))
    calls = [
        first | {letter: rng.choice(sizes) for letter in free if number} for number in range(CALLS)
    ]
    alone = None
    if way == "chosen" and rng.random() < 0.3:
        i = rng.randrange(len(shapes))
        known = [dim for dim, letter in enumerate(shapes[i]) if letter != "1"]
        if known:
            alone, calls = (i, rng.choice(known)), [first]
    dtype = rng.choice([torch.float32, torch.float32, torch.float64, *HALVES])
    dtype = torch.float32 if name == "exact_matmul" else dtype
    options: dict[str, float] = {}
    if name == "symmetric_matmul":
        options = {"alpha": -2.5} | ({"beta": 0.5} if len(shapes) == 3 else {})
    has_gradient = dtype not in HALVES and name != "symmetric_matmul" and "exp" not in way
    return Trial(
        name=name,
        way=way,
        shapes=shapes,
        free=free,
        alone=alone,
        calls=calls,
        dims=dims,
        dtype=dtype,
        options=options,
        backend=rng.choice(["eager", "aot_eager", "aot_eager"]),
        has_gradient=has_gradient and rng.random() < 0.6,
        seed=rng.randrange(2**20),
    )


def broadcast(shape: Shape, rng: random.Random) -> Shape:
    """A shape that broadcasts to ``shape``."""
    found = tuple("1" if rng.random() < 0.2 else letter for letter in shape)
    return found[rng.randrange(len(found)) :] if rng.random() < 0.4 else found


def made(trial: Trial, sizes: dict[str, int]) -> list[Tensor]:
    """The operands of a call; where the call asks for less than is there, masks choose."""
    found = []
    for i, shape in enumerate(trial.shapes):
        generator = torch.Generator().manual_seed(trial.seed + i)
        size = [1 if letter == "1" else sizes[letter] for letter in shape]
        t = torch.randn(size, generator=generator, dtype=torch.float64)
        found.append(t.to(trial.dtype))
    if trial.name == "symmetric_matmul":  # whose product is to be symmetric
        found[1] = found[0].clone()
        found[2:] = [t + t.mT for t in found[2:]]
    return found


def called(trial: Trial, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of operands and masks, which calls an operator once."""
    if trial.alone is not None:
        places = [[trial.alone]]
    elif "chosen" in trial.way:
        places = [
            [(i, dim) for i, s in enumerate(trial.shapes) for dim, x in enumerate(s) if x == letter]
            for letter in trial.free
        ]
    else:
        places = []

    def call(*given: Tensor) -> Any:
        operands = list(given[: len(trial.shapes)])
        for mask, group in zip(given[len(operands) :], places, strict=True):
            (index,) = mask.nonzero(as_tuple=True)
            for i, dim in group:
                operands[i] = operands[i].index_select(dim, index)
        if trial.dims is None:
            return function(*operands, **trial.options)
        return torch.vmap(lambda *args: function(*args, **trial.options), trial.dims)(*operands)

    return call


def arguments(trial: Trial, sizes: dict[str, int], dtype: torch.dtype | None = None) -> list[Any]:
    """Operands, and the masks that choose the sizes of a call."""
    if "chosen" not in trial.way:
        operands, masks = made(trial, sizes), []
    elif trial.alone is not None:
        i, dim = trial.alone
        operands, size = made(trial, sizes), sizes[trial.shapes[i][dim]]
        # Twice as many are there.
        operands[i] = torch.cat([operands[i]] * 2, dim)
        masks = [torch.arange(2 * size) < size]
    else:
        operands = made(trial, sizes | dict.fromkeys(trial.free, MOST))
        masks = [torch.arange(MOST) < sizes[letter] for letter in trial.free]
    operands = [t.to(dtype or t.dtype) for t in operands]
    return [t.requires_grad_(trial.has_gradient) for t in operands] + masks


def outcome(call: Callable[..., Any], given: Sequence[Tensor], seed: int) -> list[Tensor]:
    """The result of a call, and its gradients."""
    result: Tensor = call(*given)
    leaves = [t for t in given if t.requires_grad]
    if not leaves:
        return [result]
    generator = torch.Generator().manual_seed(seed)
    incoming = torch.randn(result.shape, generator=generator, dtype=torch.float64)
    return [result, *torch.autograd.grad(result, leaves, incoming.to(result.dtype))]


def compiled(trial: Trial, function: Callable[..., Any]) -> tuple[list[list[Tensor]], int]:
    """The outcome of each call of one compiled function, and the number of its graphs."""
    torch._dynamo.reset()
    call, found = called(trial, function), []
    if "exported" in trial.way:
        program = exported(trial, call).module()
        return [outcome(program, arguments(trial, sizes), trial.seed) for sizes in trial.calls], 1
    counter = CompileCounterWithBackend(trial.backend)
    dynamic = True if trial.way == "dynamic" else None
    graph = torch.compile(call, fullgraph=True, backend=counter, dynamic=dynamic)
    for sizes in trial.calls:
        given = arguments(trial, sizes)
        if trial.way == "marked":
            for t, shape in zip(given, trial.shapes, strict=True):
                for dim, letter in enumerate(shape):
                    if letter in trial.free:
                        torch._dynamo.mark_dynamic(t, dim)
        found.append(outcome(graph, given, trial.seed))
    return found, int(counter.frame_count)


def exported(trial: Trial, call: Callable[..., Any]) -> torch.export.ExportedProgram:
    class Module(torch.nn.Module):
        def forward(self, *args: Tensor) -> Any:
            return call(*args)

    names = {letter: Dim(f"size_{letter}", min=2, max=64) for letter in trial.free}
    given = arguments(trial, trial.calls[0])
    dynamic = [
        {dim: names[letter] for dim, letter in enumerate(shape) if letter in names} or None
        for shape in trial.shapes
    ]
    shapes = None if "chosen" in trial.way else (tuple(dynamic),)
    program = torch.export.export(Module(), tuple(given), dynamic_shapes=shapes)
    if trial.seed % 2:
        return program.run_decompositions(decompose_custom_triton_ops=True)
    return program


def trial(rng: random.Random) -> str:
    drawn = draw(rng)
    ours, torchs, _ = OPERATORS[drawn.name]
    what = (
        f"{drawn.name} {drawn.way} of {[''.join(s) for s in drawn.shapes]}, not known are "
        f"{drawn.alone or drawn.free!r}, {drawn.calls}, vmap {drawn.dims}, {drawn.dtype}, "
        f"{drawn.backend}"
    )
    with quiet():
        try:
            theirs, most = compiled(drawn, torchs)
        except Exception as error:
            raise Refused(f"{what}: PyTorch refuses {type(error).__name__}") from error
        try:
            mine, graphs = compiled(drawn, ours)
        except (*REFUSALS, torch._dynamo.exc.TorchDynamoException) as error:
            raise Found(f"{what}: {cause(error)}") from error
    if graphs > most:
        raise Found(f"{what}: {graphs} graphs, PyTorch has {most}")
    call = called(drawn, torchs)
    for sizes, found, plain in zip(drawn.calls, mine, theirs, strict=True):
        wide = arguments(drawn, sizes, torch.float64)
        ideal = outcome(call, wide, drawn.seed)
        others = outcome(call, arguments(drawn, sizes), drawn.seed)
        rounding = rounding_of([t.flatten() for t in wide if t.is_floating_point()])
        for i, (one, other, best, eager) in enumerate(
            zip(found, plain, ideal, others, strict=True)
        ):
            is_exact = drawn.name == "maximum" and i == 0
            judge(f"{what}, {i}", one, other, best, is_exact, eager, rounding=rounding)
    return drawn.way


def cause(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if line.startswith(("- You marked", "- Not all"))]
    return f"{type(error).__name__}: {(named or lines or [''])[0]}"


@contextmanager
def quiet() -> Iterator[None]:
    """Hide warnings, and graphs that PyTorch prints where it refuses to export."""
    # A factor that is a symbol would be compiled twice.
    options = {"capture_dynamic_output_shape_ops": True, "specialize_float": True}
    with (
        torch._dynamo.config.patch(options),
        warnings.catch_warnings(action="ignore"),
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
    ):
        logging.disable()
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def compared() -> None:
    """Let `maximum` compare the shapes of its operands."""
    right, *others = OPERATORS["maximum"]

    def wrong(a: Tensor, b: Tensor) -> Any:
        return right(a, b) if a.shape == b.shape else right(*torch.broadcast_tensors(a, b))

    OPERATORS["maximum"] = (wrong, *others)


def unsummed() -> None:
    """Let a gradient of `maximum` that was broadcast along a dynamic size be a mean."""
    right, *others = OPERATORS["maximum"]

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, t: Tensor, size: Any) -> Tensor:
            ctx.size = size
            return t.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
            return g / ctx.size, None

    def wrong(a: Tensor, b: Tensor) -> Any:
        is_summed = a.dim() > b.dim() and torch.compiler.is_compiling()
        return right(a, Wrong.apply(b, a.shape[0]) if is_summed else b)

    OPERATORS["maximum"] = (wrong, *others)


if __name__ == "__main__":
    sys.exit(run(trial, {"compared": compared, "unsummed": unsummed}))
