# SPDX-License-Identifier: MIT
"""The core in C: build it once, keep it in the cache, and load it.

It executes the common instructions of a warp, and leaves the others, and whatever may be a fault,
to `machine`. Without a C compiler `machine` executes all of them, and so it does with
NOGPU_EXECUTOR=python.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from nogpu.native.cache import cache_folder, writable
from nogpu.native.layout import CopiesStruct, check, table

SOURCES = tuple(
    Path(__file__).with_name(f"{name}.c")
    for name in ("blocks", "tma", "atomics", "knowledge", "simt", "definedness", "core")
)
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")


@lru_cache(1)
def library() -> ctypes.CDLL | None:
    """Return the compiled core, or None where Python executes everything."""
    if os.environ.get("NOGPU_EXECUTOR") == "python":
        return None
    try:
        compiler = _compiler()
        path = _path(" ".join(compiler))
        core = ctypes.CDLL(str(_kept(path) or _build(compiler, path)))
    except (OSError, ValueError) as e:
        message = f"no core in C, so that Python executes all instructions, slowly: {e}"
        print(f"nogpu: {message}", file=sys.stderr, flush=True)
        return None
    check(core)
    core.run.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32)
    core.run_threads.argtypes = (ctypes.c_void_p, ctypes.c_int64)
    core.function_of.restype = core.atomic_of.restype = ctypes.c_void_p
    core.read_copies.argtypes = core.write_copies.argtypes = (ctypes.c_void_p,)
    core.free_copies.argtypes = (ctypes.POINTER(CopiesStruct),)
    core.run_blocks.argtypes = (
        *(ctypes.c_void_p for _ in range(2)),
        ctypes.c_int64,
        ctypes.c_int32,
        ctypes.c_void_p,
    )
    core.run_blocks.restype = ctypes.c_int64
    core.free_runner.argtypes = core.clear_releases.argtypes = (ctypes.c_void_p,)
    core.begin_pages.argtypes = (ctypes.c_void_p,)
    core.add_times.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    core.add_times.restype = ctypes.c_void_p
    core.add_map.argtypes = (
        *(ctypes.c_void_p for _ in range(2)),
        ctypes.c_int64,
        *(ctypes.c_int32 for _ in range(2)),
    )
    core.add_release.argtypes = (
        ctypes.c_void_p,
        ctypes.c_uint64,
        ctypes.c_int64,
        *(ctypes.c_void_p for _ in range(2)),
    )
    core.read_many.argtypes = (
        *(ctypes.c_void_p for _ in range(3)),
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_int32,
        ctypes.c_void_p,
    )
    core.decode_matrix.argtypes = (
        *(ctypes.c_void_p for _ in range(3)),
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_int,
    )
    return core


def has_core() -> bool:
    """Whether the core in C executes the common instructions; without it Python executes all."""
    return library() is not None


def _compiler() -> list[str]:
    """Return the command of the C compiler, which CC may give with flags or a launcher.

    Raises:
        ValueError: there is none.
    """
    given = os.environ.get("CC", "")
    try:
        command = shlex.split(given)
    except ValueError as e:
        raise ValueError(f"CC is {given!r}, expected a command ({e})") from None
    found = shutil.which("cc") or shutil.which("gcc")
    if not command and found is None:
        raise ValueError("there is no C compiler, cc or gcc; install one, or set CC")
    return command or [str(found)]


def _path(compiler: str) -> Path:
    """Return where the core is kept, by its source and the machine's processor.

    Its file's name has the hash of its content, too, between this name and its suffix.
    """
    features = ""
    if (info := Path("/proc/cpuinfo")).exists():
        lines = info.read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    texts = (source.read_text("utf-8") for source in SOURCES)
    told = "\n".join([*texts, table(), compiler, platform.machine(), features, *FLAGS])
    return cache_folder("core") / f"core-{_hash(told.encode())}.so"


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _with_hash(path: Path, content: str) -> Path:
    return path.with_name(f"{path.stem}-{content}{path.suffix}")


def _kept(path: Path) -> Path | None:
    """Return the core of the cache, if its content is what was built: other files may crash."""
    for one in sorted(path.parent.glob(_with_hash(path, "*").name)):
        try:
            if _with_hash(path, _hash(one.read_bytes())) == one:
                return one
        except OSError:  # it cannot be read, or another process has removed it
            continue
        with suppress(OSError):
            one.unlink()
    return None


def _build(compiler: list[str], path: Path) -> Path:
    """Compile the core, and keep it in the cache.

    Raises:
        OSError: the compiler cannot be executed, or fails, or the core cannot be written.
    """
    print("nogpu: compiles its core, once", file=sys.stderr, flush=True)
    # In the system's folder, so that a build that is killed leaves nothing in the cache.
    with tempfile.TemporaryDirectory(prefix="nogpu-") as folder:
        made = Path(folder) / path.name
        whole = Path(folder) / "whole.c"
        whole.write_text(f'#include "{SOURCES[0]}"\n{table()}', "utf-8")
        command = [*compiler, *FLAGS, "-o", str(made), str(whole), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode or not made.exists():
            lines = done.stderr.strip().splitlines()
            said = next((line for line in lines if "error" in line), lines[-1] if lines else "")
            status = f"`{shlex.join(compiler)}` ends with status {done.returncode} and no core"
            raise OSError(f"{status}: {said}" if said else status)
        content = made.read_bytes()
    kept = _with_hash(writable(path.parent) / path.name, _hash(content))
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        copy = Path(folder) / kept.name
        copy.write_bytes(content)
        copy.replace(kept)  # at once, for other processes that look for it
    return kept
