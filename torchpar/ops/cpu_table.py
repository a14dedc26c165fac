# SPDX-License-Identifier: MIT
"""The fastest way to each product on this kind of processor, from a table that ``torchpar tune`` measures:

    {"processor": "amd-avx512-vnni-bf16", "torch": "2.15.0", "date": "2026-11-23",
     "symmetric": [["float32", 1, 1024, 1024, "onednn", 256, 2.26], …],
     "bfloat16": [[1, 1.7], [2, 1.8]]}

An entry of "symmetric" is a dtype, a number of threads, the rows n and columns k of X, and the `Choice` for
X·Xᵀ. One of "bfloat16" is a number of threads, and how many times as fast a layer's products are in bfloat16
as in float32. Tables lie beside those of GPUs (`torchpar.kernels.folders`), named after the kind of
processor.
"""

import json
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

from torchpar.ops import processor

P = ParamSpec("P")
R = TypeVar("R")
THREADS_AT = {"symmetric": 1, "bfloat16": 0}  # the place of the threads in an entry
LIBRARIES = ("blas", "onednn")
CHOSEN_FROM = 128  # rows; whole products of fewer are the fastest everywhere
_WHOLE_BELOW = 512  # rows; without a table: halves of larger products gain on all measured processors
_GAIN_FROM = 768  # rows; likewise, compared with a whole product that is not made symmetric
_FAR = 9.0  # octaves from a measured problem: twice those of n, and those of k


class Choice(NamedTuple):
    """A way to X·Xᵀ.

    Attributes:
        library: which computes it, "blas" for PyTorch's, or "onednn".
        rows: of a block, each of which ends at the diagonal, and which are mirrored stripe by stripe; 0 if
            the whole product is computed, and mirrored at once.
        gain: how many times as fast it is as ``torch.mm(x, x.t())``.
    """

    library: str
    rows: int
    gain: float


WHOLE = Choice("blas", 0, 0.0)


_remembered: list[Any] = []


def remembered(function: Callable[P, R]) -> Callable[P, R]:
    """Cache the results of a function that depends on the table, until `forget`."""
    cached = lru_cache(256)(function)
    _remembered.append(cached)
    return cached  # type: ignore[return-value]


def choice(dtype: torch.dtype, n: int, k: int) -> Choice:
    """The way to X·Xᵀ for X ``(n, k)`` on this processor, with the present number of threads."""
    if type(n) is not int or type(k) is not int or n < CHOSEN_FROM:  # a symbolic size is in no table
        return WHOLE
    return _choice(dtype, n, max(k, 1), torch.get_num_threads(), processor.uses_onednn())


@remembered
def _choice(dtype: torch.dtype, n: int, k: int, threads: int, has_onednn: bool) -> Choice:
    def distance(entry: list[Any]) -> float:
        return 2 * _octaves(entry[2], n) + _octaves(entry[3], k)  # rows matter more

    name = str(dtype).removeprefix("torch.")
    own = [entry for entry in _of_threads("symmetric", threads) if entry[0] == name]
    nearest = min(own, key=distance, default=None)
    if nearest and distance(nearest) <= _FAR and (has_onednn or nearest[4] == "blas"):
        return Choice(*nearest[4:])
    return default(dtype, n, has_onednn)


def default(dtype: torch.dtype, n: int, has_onednn: bool = False) -> Choice:
    """The choice without a table."""
    if n < _WHOLE_BELOW:
        return WHOLE
    library = "onednn" if has_onednn and dtype == torch.float32 else "blas"
    gain = 1.5 * (n >= _GAIN_FROM and not processor.has_amx())
    return Choice(library, 128 if dtype == torch.float64 else 256, gain)


def _octaves(a: float, b: float) -> float:
    return abs(math.log2(a / b))


def _of_threads(name: str, threads: int) -> list[Any]:
    """The table's entries of the nearest number of threads, if that is at most an octave away."""
    entries, position = _entries()[name], THREADS_AT[name]
    nearest = min({entry[position] for entry in entries}, key=lambda n: _octaves(n, threads), default=None)
    near = nearest is not None and _octaves(nearest, threads) <= 1
    return [entry for entry in entries if near and entry[position] == nearest]


def bfloat16_gain() -> float:
    """How many times as fast a layer's products are in bfloat16 as in float32; 0 or 1 if unknown."""
    unknown = float(processor.has_bfloat16())
    return next((gain for _, gain in _of_threads("bfloat16", torch.get_num_threads())), unknown)


def file_name() -> str:
    return f"cpu-{processor.processor_kind()}.json"


def load() -> tuple[Path, dict[str, Any]] | None:
    """This processor's table as it was saved, and its path; a damaged one gives a warning, and None."""
    from torchpar.kernels import folders

    hint = "the defaults are used; `python -m torchpar tune --device cpu` writes a new table"
    return folders.read(file_name(), check, hint)


def save(table: dict[str, Any]) -> Path:
    """Write this processor's table, and use it from now on; return its path."""
    from torchpar.kernels import folders

    check(table)
    path = folders.write(file_name(), json.dumps(table).replace("], [", "],\n[") + "\n")
    forget()
    return path


def forget() -> None:
    """Read the table again when a product is chosen next."""
    for function in _remembered:
        function.cache_clear()


@remembered
def _entries() -> dict[str, list[Any]]:
    loaded = load()
    return loaded[1] if loaded else {"symmetric": [], "bfloat16": []}


def check(table: Any) -> None:
    """Raise a ValueError that says what is wrong with a table."""
    try:
        if table["processor"] != processor.processor_kind():
            raise ValueError(
                f"the table is of {table['processor']!r}, expected {processor.processor_kind()!r}"
            )
        for dtype, threads, n, k, library, rows, gain in table["symmetric"]:
            known = isinstance(getattr(torch, dtype), torch.dtype) and library in LIBRARIES
            sizes = all(type(size) is int and size > 0 for size in (threads, n, k))
            if not (known and sizes and type(rows) is int and rows >= 0 and 0 < gain < math.inf):
                entry = [dtype, threads, n, k, library, rows, gain]
                raise ValueError(f"{entry}, expected a dtype, threads, n, k, a library, rows and a gain")
        if not all(threads > 0 and gain > 0 for threads, gain in table["bfloat16"]):
            raise ValueError(f"bfloat16 is {table['bfloat16']}, expected numbers above 0")
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"not the layout of a table ({type(error).__name__}: {error})") from error
