# SPDX-License-Identifier: MIT
"""Kernels in CUDA C++ of a student's file in the ladder: ``run ladder --with gemm.cu``.

A kernel has the name of the function that it stands for, and the parameters of `SIGNATURES`.
`nogpu` compiles and executes it. A comment above it may choose its launch:

    // launch: grid (columns + 31) / 32, (rows + 31) / 32; block 32, 32
"""

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch

from torchpar.baselines.grader import OPERATORS, Loaded, Wrong
from torchpar.baselines.numpy_mlp import Array
from torchpar.errors import ConfigError
from torchpar.optional import INSTALL_NOGPU, has_nogpu

from .cases import LadderCase

SUFFIX = ".cu"
PRODUCT = "grid (columns + 15) / 16, (rows + 15) / 16; block 16, 16"


class Signature(NamedTuple):
    """The parameters of a kernel, and its launch unless a comment gives another one."""

    parameters: str
    launch: str = PRODUCT


SIGNATURES = {
    "maximum": Signature("const int* a, const int* b, int* c, int n", "grid rows; block columns"),
    "matmul_t": Signature("const float* x, float* c, int n, int k"),
    "matmul": Signature("const float* a, const float* b, float* c, int n, int m, int k"),
    "linear_sigmoid": Signature(
        "const float* x, const float* weight, const float* bias, float* c, int n, int m, int k"
    ),
}
NAMES = [name for name in OPERATORS if not name.endswith(("_cpu", "_numba", "_trivial"))]
LAUNCH = re.compile(r"//\s*launch\s*:(.*)")
EXAMPLE = f"// launch: {PRODUCT}"
INTEGERS = re.compile(
    r"^\s*#\s*define\s+(\w+)\s+\(?(\d+)\)?\s*(?://.*)?$|\bconst(?:expr)?\s+int\s+(\w+)\s*=\s*(\d+)\s*;",
    re.MULTILINE,
)
ARITHMETIC: Mapping[type, Callable[[int, int], int]] = MappingProxyType(
    {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Div: operator.floordiv,  # as of C's integers
        ast.Mod: operator.mod,
    }
)


class Size(NamedTuple):
    """The size of a launch."""

    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: tuple[int, ...] = (0,)

    @property
    def blocks(self) -> int:
        return math.prod(self.grid)

    def __str__(self) -> str:
        grid, block = ("×".join(map(str, one)) for one in (self.grid, self.block))
        return f"grid {grid}, block {block}"


@dataclass(eq=False)
class CudaKernel:
    """A function of the ladder's arguments that launches a student's kernel.

    Attributes:
        module: of `nogpu.cuda.load`.
        operator: of the ladder, which the kernel computes.
        parameters: the names of its sizes.
        launch: the text of its launch.
        constants: integers of the file, which the launch may name.
        samples: whether only some of its blocks are executed, so that others write nothing.
        unwritten: the bits of numbers of the last result that no thread has written.
    """

    name: str
    module: Any
    operator: str
    parameters: list[str]
    launch: str
    constants: Mapping[str, int] = field(default_factory=dict)
    samples: bool = False
    unwritten: int = field(default=0, init=False)

    def __call__(self, *arguments: Array) -> Array:
        """Launch the kernel, and return its result.

        Raises:
            Wrong: it does not write all of the result.
        """
        shape, sizes = sizes_of(self.operator, arguments)
        is_whole = self.operator == "maximum"
        result = torch.empty(shape, dtype=torch.int32 if is_whole else torch.float32)
        bits = result.numpy().view(np.int32)
        self.unwritten = int(bits[0, 0])  # what the emulator puts where nobody has written
        size = self.size(shape, sizes)
        kernel = self.module[self.name]
        given = [torch.from_numpy(t).clone() for t in arguments]  # aligned, as a GPU's memory is
        kernel[size.grid, size.block, *size.shared](*given, result, *sizes)
        for argument, t in zip(arguments, given, strict=True):
            argument[...] = t.numpy()  # which nobody may have changed
        left = bits == self.unwritten
        if left.any() and not self.samples:
            at = ", ".join(map(str, np.argwhere(left)[0]))
            many = f"{left.sum():,} of {left.size:,} numbers"
            raise Wrong(f"result[{at}] is never written; {many} are not")
        return result.numpy()

    def size(self, shape: tuple[int, ...], sizes: tuple[int, ...]) -> Size:
        """Return the size of the launch for a result and the kernel's sizes."""
        rows, columns = shape
        known = {"rows": rows, "columns": columns, **self.constants}
        return size_of(self.launch, known | dict(zip(self.parameters, sizes, strict=True)))

    def size_for(self, case: LadderCase) -> Size:
        """Return the size of the launch for a case."""
        return self.size(*sizes_of(self.operator, case.arguments))

    def called(self, case: LadderCase) -> str:
        """Say how a case launches the kernel."""
        shape, sizes = sizes_of(self.operator, case.arguments)
        given = ", ".join(f"{n}={v}" for n, v in zip(self.parameters, sizes, strict=True))
        return f"{self.size(shape, sizes)}, {given}"


@dataclass(frozen=True, kw_only=True)
class SampledCase(LadderCase):
    """A case of whose result only those numbers are checked that a sample of blocks has written.

    Attributes:
        kernel: that was launched.
    """

    kernel: CudaKernel

    def check(self, result: Array, rows: slice = slice(None)) -> None:
        left = result.view(np.int32) == self.kernel.unwritten
        super().check(np.where(left, self.expected, result), rows)


def sizes_of(
    operator: str, arguments: tuple[Array, ...]
) -> tuple[tuple[int, int], tuple[int, ...]]:
    """Return the shape of a result, and the sizes that a kernel takes."""
    n, k = arguments[0].shape
    if operator == "maximum":
        return (n, k), (n * k,)
    if operator == "matmul_t":
        return (n, n), (n, k)
    m = arguments[1].size // k
    return (n, m), (n, m, k)


# The file


def load(path: Path) -> Loaded:
    """Compile a file, and return its kernels that the ladder knows, by name.

    Raises:
        ConfigError: there is no such file, NVRTC refuses it, it has no kernel with a known name, or
            each of these has other parameters.
    """
    if not path.is_file():
        raise ConfigError(f"--with {path} is no file")
    if not has_nogpu():
        raise ConfigError(f"--with {path}: CUDA C++ is executed by nogpu; {INSTALL_NOGPU}")
    import nogpu.cuda
    from nogpu.cpp.nvrtc import CompileError

    try:
        module = nogpu.cuda.load(path)
    except (CompileError, ModuleNotFoundError, UnicodeDecodeError) as e:
        raise ConfigError(f"--with {path}: {e}") from None
    known = [one for name, one in module.declared.items() if name in NAMES]
    if not known:
        others = ", ".join(module.names) or "none"
        names = ", ".join(NAMES)
        raise ConfigError(f"--with {path}: name a kernel any of {names}; its kernels are: {others}")
    functions: dict[str, Callable[..., object]] = {}
    errors = []
    for one in known:
        try:
            functions[one.name] = kernel_of(module, one)
        except Wrong as e:
            errors.append(f"{path.name}, line {one.line}: {e}")
    if not functions:
        raise ConfigError("\n".join(errors))
    for error in errors:
        print(error, flush=True)
    return Loaded(functions, "\n".join(errors))


def kernel_of(module: Any, declared: Any) -> CudaKernel:
    """Return a kernel of a file.

    Raises:
        Wrong: it has other parameters, or a launch that cannot be read.
    """
    name, lines = declared.name, module.source.splitlines()
    about, expected = OPERATORS[name][0], SIGNATURES[OPERATORS[name][0]]
    asked = expected.parameters.split(", ")
    if declared.template:
        raise Wrong(f"{name} is a template; write it without, and numbers by #define")
    given = [one.type for one in declared.parameters]
    if len(given) != len(asked) or not all(
        accepts(text, one) for text, one in zip(asked, declared.parameters, strict=True)
    ):
        raise Wrong(f"{name} takes ({', '.join(given)}); expected {name}({expected.parameters})")
    before = [one.line for one in module.declared.values() if one.line < declared.line]
    above = lines[max(before, default=0) : declared.line]
    found = [match[1] for line in above if (match := LAUNCH.search(line))]
    constants = {a or b: int(c or d) for a, c, b, d in INTEGERS.findall(module.source)}
    names = [
        one.name or text.split()[-1] for text, one in zip(asked, declared.parameters, strict=True)
    ]
    sizes = [one for text, one in zip(asked, names, strict=True) if "*" not in text]
    launch = found[-1] if found else expected.launch
    kernel = CudaKernel(name, module, about, sizes, launch, constants)
    kernel.size((1, 1), (1,) * len(sizes))  # whether it can be read
    return kernel


def accepts(asked: str, declared: Any) -> bool:
    """Whether a parameter can be given what is asked; a size is an integer of any type."""
    if "*" in asked:
        expected = "int32" if asked.startswith(("int", "const int")) else "float32"
        return declared.is_pointer and declared.dtype in ("", expected)
    return not declared.is_pointer and not declared.dtype.startswith(("float", "bfloat"))


# Launches


def size_of(text: str, known: Mapping[str, int]) -> Size:
    """Return the size of a launch by its text, and the values of the names in it.

    Raises:
        Wrong: the text is none of a launch, or has another name.
    """
    parts: dict[str, tuple[int, ...]] = {}
    for part in text.split(";"):
        word, _, sizes = part.strip().partition(" ")
        if word in Size._fields:
            parts[word] = values(sizes, known)
        elif part.strip():
            raise Wrong(f"launch: {part.strip()!r} is not known; expected {EXAMPLE}")
    if not {"grid", "block"} <= set(parts):
        raise Wrong(
            f"launch: it has no {'block' if 'grid' in parts else 'grid'}; expected {EXAMPLE}"
        )
    return Size(**parts)


def values(text: str, known: Mapping[str, int]) -> tuple[int, ...]:
    """Return up to three integers, by sums, products and quotients of names and numbers."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
            return ARITHMETIC[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.Name) and node.id in known:
            return known[node.id]
        raise Wrong(
            f"launch: {ast.unparse(node)} is not known; known are {', '.join(known)}, and + - * / %"
        )

    try:
        tree = ast.parse(text.strip(), mode="eval").body
        return tuple(map(value, tree.elts if isinstance(tree, ast.Tuple) else [tree]))
    except (SyntaxError, ZeroDivisionError):
        raise Wrong(f"launch: {text.strip()!r} cannot be read; expected {EXAMPLE}") from None
