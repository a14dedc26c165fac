# SPDX-License-Identifier: MIT
"""Kernels of layers in a reader's file of CUDA C++: their names, parameters and launches."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

import nogpu.cuda
from nogpu.cpp.nvrtc import CompileError
from torchpar.errors import ConfigError

TILE, BLOCK = 16, 64  # threads of a side of a block, and of a block in one dimension


class Form(NamedTuple):
    """A kernel of a layer, as a file declares it and as it is launched.

    Attributes:
        parameters: in CUDA C++; their names are free.
        threads: the parameters that count threads along x and y. Two have blocks of 16 × 16
            threads, and one has blocks of 64.
    """

    parameters: str
    threads: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        return [one.split()[-1] for one in self.parameters.split(",")]

    def grid(self, arguments: tuple[object, ...]) -> tuple[int, ...]:
        given = dict(zip(self.names, arguments, strict=True))
        side = TILE if len(self.threads) > 1 else BLOCK
        return tuple(-(-given[name] // side) for name in self.threads)  # type: ignore[operator]

    @property
    def block(self) -> tuple[int, ...]:
        return (TILE, TILE) if len(self.threads) > 1 else (BLOCK,)


SIZES = "int n, int inputs, int outputs"
PAIR = "const float* g, const float* y, float* dx, int size"
FORMS = {
    "linear": Form(
        f"const float* x, const float* w, const float* b, float* y, {SIZES}", ("outputs", "n")
    ),
    "linear_input": Form(f"const float* g, const float* w, float* dx, {SIZES}", ("inputs", "n")),
    "linear_weight": Form(
        f"const float* g, const float* x, float* dw, {SIZES}", ("inputs", "outputs")
    ),
    "bias_by_one_thread": Form("const float* g, float* db, int n, int outputs", ("outputs",)),
    "bias_by_atomics": Form("const float* g, float* db, int n, int outputs", ("outputs", "n")),
    "relu": Form("const float* x, float* y, int size", ("size",)),
    "relu_backward": Form(PAIR, ("size",)),
    "sigmoid": Form("const float* x, float* y, int size", ("size",)),
    "sigmoid_backward": Form(PAIR, ("size",)),
    "bce": Form("const float* p, const float* t, float* loss, int size", ("size",)),
    "bce_backward": Form("const float* p, const float* t, float* dp, int size", ("size",)),
}
HELP = (
    "File of CUDA C++ with kernels that take the place of those here, one or more of: "
    + "; ".join(f"{name}({form.parameters})" for name, form in FORMS.items())
    + ". Blocks have 64 threads along the last size, and those of linear, linear_input, "
    "linear_weight and bias_by_atomics 16 × 16, of which x counts columns of the result and y rows."
)


class CudaKernel:
    """A kernel of a reader's file, launched by the sizes among its arguments."""

    def __init__(self, kernel: Any):
        self.kernel, self.form = kernel, FORMS[kernel.name]  # one of nogpu.cuda.load
        self.__name__ = kernel.name

    def __call__(self, *arguments: Tensor | int) -> None:
        """Launch the kernel.

        Raises:
            ConfigError: a launch that a GPU refuses, such as one of too much shared memory.
        """
        try:
            self.kernel[self.form.grid(arguments), self.form.block](*arguments)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{self.__name__}: {error}; mend the kernel") from None

    @property
    def place(self) -> str:
        """The file and the line where the kernel begins."""
        return f"{Path(self.kernel.module.path).name}:{self.kernel.declared.line}"

    @property
    def source(self) -> str:
        """The kernel's lines."""
        module, first = self.kernel.module, self.kernel.declared.line
        others = [one.line for one in module.declared.values() if one.line > first]
        end = min(others) - 1 if others else None
        return "\n".join(module.source.splitlines()[first - 1 : end])


def read(path: Path) -> Mapping[str, CudaKernel]:
    """Return the kernels of a file of CUDA C++, by name.

    Raises:
        ConfigError: a file that cannot be read or compiled, or a kernel with another name or other
            parameters.
    """
    try:
        module = nogpu.cuda.load(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--with {path}: {reason}; name a readable file of CUDA C++") from None
    except ModuleNotFoundError as error:
        raise ConfigError(f"--with {path}: {error}") from None
    except CompileError as error:
        first, *others = str(error).splitlines()
        more = f" ({len(others)} more)" if others else ""
        raise ConfigError(f"{first}{more}; mend it") from None
    if not module.names:
        raise ConfigError(
            f"{path.name} has no kernel, a function with __global__; write one of: "
            f"{', '.join(FORMS)}"
        )
    for one in module.declared.values():
        _check(path.name, one)
    return {name: CudaKernel(module[name]) for name in module.names}


def _check(file: str, declared: Any) -> None:
    """Check a kernel's name and the types of its parameters, as its file declares them.

    Raises:
        ConfigError: they are not those of a layer's kernel.
    """
    place, name = f"{file}:{declared.line}", declared.name
    if name not in FORMS:
        near = get_close_matches(name, FORMS, 1)
        meant = f", perhaps {near[0]}" if near else ""
        raise ConfigError(
            f"{place}: {name} is no kernel of a layer{meant}; name it one of: {', '.join(FORMS)}"
        )
    parameters = FORMS[name].parameters
    right = [one.replace("const ", "").split()[0] for one in parameters.split(", ")]
    found = [
        "int" if "int" in one.dtype and not one.is_pointer else one.type  # of any size
        for one in declared.parameters
    ]
    if found != right or declared.template:
        kind = f"template <{declared.template}> " if declared.template else ""
        shown = ", ".join(f"{one.type} {one.name}".strip() for one in declared.parameters)
        raise ConfigError(
            f"{place}: {kind}{name}({shown}), expected {name}({parameters}); mend its parameters"
        )
