# SPDX-License-Identifier: MIT
"""A compiled kernel in Triton's cache: its first stage, and files of ours beside it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from triton.runtime.cache import get_cache_manager

from nogpu.report.assembly import words_of

ASSEMBLY = "tt.elementwise_inline_asm"
Kind = str | tuple["Kind", ...]  # of an argument
STAGES = ("ttir", "ttgir")  # of Triton's and of Gluon's kernels


class Function(Protocol):
    """A kernel's function, before it is compiled."""

    @property
    def arg_names(self) -> Sequence[str]: ...


class KernelSource(Protocol):
    """What Triton has compiled a kernel from.

    Attributes:
        signature: types of arguments by their names; of a tuple, a tuple.
        constants: values that it was compiled for, by the places of arguments.
        attrs: what else is known of arguments, such as divisibility, by their places.
    """

    name: str
    fn: Function
    signature: Mapping[str, Kind]
    constants: Mapping[tuple[int, ...], object]
    attrs: Mapping[tuple[int, ...], Iterable[tuple[str, object]]]


class Metadata(Protocol):
    """What Triton knows of a compiled kernel; further options differ by its version."""

    hash: str
    num_warps: int
    shared: int
    global_scratch_size: int
    profile_scratch_size: int


class Stages:
    """A compiled kernel in Triton's cache.

    Args:
        source, metadata: what Triton gives a launcher.
    """

    def __init__(self, source: KernelSource, metadata: Metadata):
        self.cache = get_cache_manager(metadata.hash)
        self.name = str(source.name)[:150]  # as Triton shortens it
        self.stage, self.text = "", ""
        for stage in STAGES:
            if not self.text and (text := self._kept(f"{self.name}.{stage}")):
                self.stage, self.text = stage, text

    def path(self, name: str, make: Callable[[], str]) -> Path | None:
        """Return the path of a file that is kept beside the kernel, and that is made once.

        It is None where the cache cannot be written.
        """
        with suppress(OSError):
            return Path(self.cache.get_file(name) or self.cache.put(make(), name, binary=False))
        return None

    def refused(self, ptx: str, arch: str) -> str:
        """Return what ptxas says against a kernel that has inline assembly; "" for others."""
        if ASSEMBLY not in self.text:
            return ""
        path = self.path(f"{self.name}.ptxas", lambda: words_of(ptx, arch))
        return words_of(ptx, arch) if path is None else path.read_text("utf-8")

    def _kept(self, name: str) -> str:
        path = self.cache.get_file(name)
        return "" if path is None else Path(path).read_text("utf-8")
