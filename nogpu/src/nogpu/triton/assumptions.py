# SPDX-License-Identifier: MIT
"""Kernels whose assumptions, of ``tl.assume``, are assertions, compiled beside the real ones.

The compiler uses an assumption and drops it, so that nothing in the PTX says that it is false. The
second kernel does not store, so that little more than the assumptions is left of it. Assumptions on
scalar arguments that `conditions` finds true need none.
"""

import re
from typing import NamedTuple

import triton

from nogpu.triton.stages import Metadata, Stages

ASSUME = re.compile(r"^(\s*)llvm\.intr\.assume (%[\w.#]+) : i1", re.MULTILINE)
# What nothing else in a program depends on.
EFFECTS = re.compile(
    r"^\s*tt\.(?:store|descriptor_store|descriptor_scatter|descriptor_reduce|print|assert)\b.*\n",
    re.MULTILINE,
)
OPTIONS = ("num_warps", "num_ctas", "num_stages", "maxnreg", "enable_fp_fusion")
WRITES = re.compile(r"\b(?:st|atom|red|cp)\.(?!param|shared|local|async\.wait|async\.commit)")


class Assertions(NamedTuple):
    """A kernel that asserts what another one assumes.

    Attributes:
        writes: it changes memory.
    """

    ptx: str
    shared: int
    writes: bool


def assertions_of(stages: Stages, metadata: Metadata) -> Assertions | None:
    """Return the kernel that asserts what a kernel assumes; None if it assumes nothing."""
    if not ASSUME.search(stages.text):
        return None
    path = stages.path(f"{stages.name}.asserted.{stages.stage}", lambda: asserted(stages))
    if path is None:
        return None
    options = {name: getattr(metadata, name) for name in OPTIONS if hasattr(metadata, name)}
    try:
        compiled = triton.compile(str(path), options=options)
    except RuntimeError:  # a pass of Triton's that needs what was left out; the kernel is right
        return None
    ptx = compiled.asm["ptx"]
    return Assertions(ptx, compiled.metadata.shared, bool(WRITES.search(ptx)))


def asserted(stages: Stages) -> str:
    """Return the text of a stage in which assumptions are assertions."""
    text = EFFECTS.sub("", stages.text) if stages.stage == "ttir" else stages.text
    text = text.replace("tt.warp_specialize", "tt.was_warp_specialized")  # few operations are left
    return ASSUME.sub(r'\1tt.assert \2, "tl.assume" : i1', text)
