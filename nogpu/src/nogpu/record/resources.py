# SPDX-License-Identifier: MIT
"""Registers and spills of a kernel, by ptxas of Triton's wheel."""

import re
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from triton.backends.nvidia.compiler import get_ptxas

from nogpu.data_sheets import DATA_SHEETS, PROGRAMS, REGISTERS, RESERVED, WARPS

MOST_REGISTERS = 255  # of a thread
REFUSAL = re.compile(r"^ptxas.*?\berror\s*:\s*(.*)", re.MULTILINE)  # which ptxas says
KERNEL = re.compile(r"^[ \t]*(?:\.\w+\s+)*\.entry\s+([\w$]+)[^{]*\{", re.MULTILINE)  # its head


class Resources(NamedTuple):
    """Registers of a thread, and bytes of its memory for registers that do not fit.

    Its stack has these bytes, and its arrays.
    """

    registers: int
    spilled_bytes: int
    stack_bytes: int = 0

    def __str__(self) -> str:
        spills = f"spills {self.spilled_bytes} bytes" if self.spilled_bytes else "no spills"
        return f"{self.registers} registers, {spills}"

    def resident_programs(self, warps: int, shared: int, arch: str) -> int:
        """Return how many programs a multiprocessor has at once: its theoretical occupancy.

        A quarter of the registers serves each fourth warp. A warp's registers come in units of 256,
        and shared memory in units of 128 bytes.

        Args:
            warps: of a program.
            shared: bytes of shared memory of a program.
            arch: such as "sm_90".
        """
        shared_of = {f"sm_{one.capability}": one.shared for one in DATA_SHEETS.values()}[arch]
        of_warp = -(-self.registers * 32 // 256) * 256
        warps_of_quarter = REGISTERS // 4 // max(of_warp, 1)
        return min(
            PROGRAMS,
            WARPS // warps,
            4 * warps_of_quarter // warps,
            shared_of // (-(-shared // 128) * 128 + RESERVED),
        )


class Assembled(NamedTuple):
    """The answer of ptxas to a text: its status, its messages, and the machine code."""

    status: int
    said: str
    code: bytes


def assemble(ptx: str, arch: str) -> Assembled:
    """Assemble PTX for ``arch``, such as "sm_90", unless the text names a target.

    Raises:
        OSError: there is no ptxas.
    """
    tool = get_ptxas(int(arch.removeprefix("sm_"))).path
    target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "kernel.ptx"
        name = target[1] if target else arch
        command = [tool, "-v", f"--gpu-name={name}", str(text), "-o", str(text.with_suffix(".o"))]

        def run(code: str) -> tuple[int, str]:
            text.write_text(code, "utf-8")
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            return done.returncode, done.stderr

        status, said = run(ptx)
        # NVRTC may be newer than this ptxas, and writes its own version of PTX.
        own = re.search(r"Unsupported \.version [\d.]+; current version is '([\d.]+)'", said)
        if own is not None:
            status, said = run(re.sub(r"^\.version .*", f".version {own[1]}", ptx, flags=re.M))
        code = text.with_suffix(".o")
        return Assembled(status, said, b"" if status else code.read_bytes())


def machine_code(ptx: str) -> bytes:
    """Return what ptxas makes of PTX that names its target, as a file.

    Raises:
        OSError: there is no ptxas.
        RuntimeError: ptxas refuses the text.
    """
    target = re.search(r"^\.target\s+(sm_\d+)", ptx, re.MULTILINE)
    assert target is not None
    made = assemble(ptx, target[1])
    _check(made)
    return made.code


def _check(made: Assembled) -> None:
    if made.status:
        errors = REFUSAL.findall(made.said) or made.said.strip().splitlines()
        raise RuntimeError(f"ptxas refuses the kernel: {errors[0]}")


def _alone(ptx: str, entry: str) -> str:
    """Return a module without its other kernels; lines keep their numbers."""
    for head in reversed(list(KERNEL.finditer(ptx))):
        if head[1] == entry:
            continue
        depth, end = 1, head.end()
        while depth and end < len(ptx):
            depth += {"{": 1, "}": -1}.get(ptx[end], 0)
            end += 1
        ptx = ptx[: head.start()] + re.sub(r"[^\n]", "", ptx[head.start() : end]) + ptx[end:]
    return ptx


@lru_cache(256)
def resources(ptx: str, arch: str, entry: str = "") -> Resources:
    """Assemble PTX for ``arch``, such as "sm_90", and return what the kernel takes.

    Args:
        entry: the kernel's name, if the text has several; the others may be refused.

    Raises:
        OSError: there is no ptxas.
        RuntimeError: ptxas refuses the kernel.
    """
    made = assemble(_alone(ptx, entry) if entry else ptx, arch)
    _check(made)
    said = made.said
    registers = re.search(r"Used (\d+) registers", said)
    spilled = re.search(r"(\d+) bytes spill stores", said)
    stack = re.search(r"(\d+) bytes stack frame", said)
    if registers is None:
        raise RuntimeError("ptxas does not say how many registers the kernel uses")
    of_memory = (int(found[1]) if found else 0 for found in (spilled, stack))
    return Resources(int(registers[1]), *of_memory)
