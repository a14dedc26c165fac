# SPDX-License-Identifier: MIT
"""The fastest way to X·Xᵀ on this kind of processor, from a table that ``torchpar tune`` measures:

    {"processor": "amd-avx512-vnni-bf16", "torch": "2.15.0", "date": "2026-11-23",
     "symmetric": [["float32", 1, 1024, 1024, "onednn", 256, 2.26], …]}

An entry is a dtype, a number of threads, the rows n and columns k of X, and the `Choice`. Tables lie beside
those of GPUs (`torchpar.kernels.folders`), named after the kind of processor.
"""

import json
import math
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from torchpar.ops import processor

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


def choice(dtype: torch.dtype, n: int, k: int) -> Choice:
    """The way to X·Xᵀ for X ``(n, k)`` on this processor, with the present number of threads."""
    if type(n) is not int or type(k) is not int or n < CHOSEN_FROM:  # a symbolic size is in no table
        return WHOLE
    return _choice(dtype, n, max(k, 1), torch.get_num_threads(), processor.uses_onednn())


@lru_cache(256)
def _choice(dtype: torch.dtype, n: int, k: int, threads: int, has_onednn: bool) -> Choice:
    """The entry of the nearest number of threads, at most an octave away, and the nearest problem."""

    def distance(entry: list[Any]) -> float:
        return 2 * _octaves(entry[2], n) + _octaves(entry[3], k)  # rows matter more

    name = str(dtype).removeprefix("torch.")
    own = [entry for entry in _entries() if entry[0] == name and _octaves(entry[1], threads) <= 1]
    nearest = min(own, key=lambda entry: (_octaves(entry[1], threads), distance(entry)), default=None)
    if nearest and distance(nearest) <= _FAR and (has_onednn or nearest[4] == "blas"):
        return Choice(*nearest[4:])
    if n < _WHOLE_BELOW:
        return WHOLE
    library = "onednn" if has_onednn and dtype == torch.float32 else "blas"
    gain = 1.5 * (n >= _GAIN_FROM and not processor.has_amx())
    return Choice(library, 128 if dtype == torch.float64 else 256, gain)


def _octaves(a: float, b: float) -> float:
    return abs(math.log2(a / b))


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
    _choice.cache_clear()
    _entries.cache_clear()


@cache
def _entries() -> list[Any]:
    loaded = load()
    return loaded[1]["symmetric"] if loaded else []


def check(table: Any) -> None:
    """Raise a ValueError that says what is wrong with a table."""
    kind = processor.processor_kind()
    try:
        if table["processor"] != kind:
            raise ValueError(f"the table is of {table['processor']!r}, expected {kind!r}")
        for dtype, threads, n, k, library, rows, gain in table["symmetric"]:
            known = isinstance(getattr(torch, dtype), torch.dtype) and library in LIBRARIES
            integers = all(type(size) is int for size in (threads, n, k, rows))
            if not (known and integers and min(threads, n, k) > 0 <= rows and 0 < gain < math.inf):
                entry = [dtype, threads, n, k, library, rows, gain]
                raise ValueError(f"{entry}, expected a dtype, threads, n, k, a library, rows and a gain")
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"not the layout of a table ({type(error).__name__}: {error})") from error
