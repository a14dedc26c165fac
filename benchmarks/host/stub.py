# SPDX-License-Identifier: MIT
"""Compile the stub of NVIDIA's driver, libcuda.c, and read the launches that it notes."""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("libcuda.c")
NAME = "libcuda.so.1"
Launch = tuple[Any, ...]  # function, grid, block, shared memory, number of attributes


def find_compiler() -> list[str]:
    """The C compiler, as words of a command, that Triton takes too; nothing if there is none."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang", "cc"]
    return next((words for name in names if shutil.which((words := shlex.split(name))[0])), [])


def build_stub(root: Path, name: str = NAME) -> Path:
    """Compile the stub into a folder of ``root`` for this source, unless it is there.

    Triton links its driver.c with the folder's libcuda.so.1, once for each folder.

    Args:
        name: of the file. With another name than the driver's, no loader takes it for the driver.
    """
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    path = root / f"stub-{digest}" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        target = path.with_name(f"{name}.{os.getpid()}")
        options = "-O2", "-shared", "-fPIC", "-w", f"-Wl,-soname,{name}", "-o", str(target)
        subprocess.run([*find_compiler(), str(SOURCE), *options], check=True)
        os.replace(target, path)
    return path


class _Note(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_ulonglong),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("attributes", ctypes.c_uint),
    )


class Stub:
    """The stub in this process, in the place of the driver if that is its name."""

    def __init__(self, path: Path):
        self._library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self.launch = ctypes.cast(self._library.cuLaunchKernelEx, ctypes.c_void_p).value

    def launches(self, call: Callable[[], object]) -> list[Launch]:
        """The launches of a call; at most 65,536."""
        count = ctypes.c_ulonglong.in_dll(self._library, "launches")
        is_noting = ctypes.c_uint.in_dll(self._library, "is_noting")
        count.value, is_noting.value = 0, 1
        try:
            call()
        finally:
            is_noting.value = 0
        notes = (_Note * count.value).in_dll(self._library, "notes")
        return [(n.function, (*n.grid,), (*n.block,), n.shared, n.attributes) for n in notes]
