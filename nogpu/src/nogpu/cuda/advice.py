# SPDX-License-Identifier: MIT
"""Advice for scripts that say "cuda", and fail because there is no GPU."""

import traceback

from nogpu.libraries import is_library
from nogpu.numba.numba_stand_in import has_compiler, has_numba_cuda
from nogpu.record.faults import HostFault

INSTALL = "pip install 'numba-cuda[cu13]'"
NO_NUMBA_CUDA = (
    f"kernels of numba.cuda are executed here where numba-cuda is installed: {INSTALL}; with "
    "NUMBA_ENABLE_CUDASIM=1 Numba's simulator executes them on this CPU, and checks nothing"
)
NO_COMPILER = f"numba-cuda lacks its compiler, NVVM: {INSTALL}"
NEEDS_FLAG = "kernels of numba.cuda are executed here with --cuda-is-cpu"
SIMULATED = "kernels of numba.cuda are executed by Numba's simulator, and not checked"
NEEDS_CUDA = 'a script that launches kernels only for device="cuda" needs --cuda-is-cpu'


def says_cuda(error: BaseException) -> bool:
    """Whether an error is of a line that asks for a GPU, or says itself that there is none."""
    is_of_torch = isinstance(error, (AssertionError, RuntimeError))
    if is_of_torch and any(word in str(error) for word in ("NVIDIA driver", "CUDA")):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, AssertionError) and bool(frames) and "cuda" in (frames[-1].line or "")


def is_of_cpp(error: BaseException) -> bool:
    """Whether an error is that of a file of CUDA C++, or of a launch of its kernels."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and str(frames[-1].f_globals.get("__name__")).startswith("nogpu.cpp.")


def why_simulated() -> str:
    """Say that Numba's simulator has executed a program's kernels, and what would check them."""
    missing = "" if has_numba_cuda() else f"install numba-cuda ({INSTALL}), and "
    return f"{SIMULATED}; to have them checked, {missing}unset NUMBA_ENABLE_CUDASIM"


def advise_numba(error: BaseException, is_cpu: bool) -> str:
    """Say why a kernel of numba.cuda is not executed, and what to do; "" for other errors.

    Args:
        is_cpu: whether a GPU is emulated for numba.cuda, too, where numba-cuda is installed.
    """
    if not is_of_numba(error):
        return ""
    if not has_numba_cuda():
        return NO_NUMBA_CUDA
    if not is_cpu:
        return NEEDS_FLAG
    return "" if has_compiler() else NO_COMPILER


def advise(error: BaseException, is_cpu: bool = False) -> str:
    """Name the flag in an error; return the advice where nobody would see it there."""
    if isinstance(error, SystemExit):
        return NEEDS_CUDA
    note = advise_numba(error, is_cpu) or NEEDS_CUDA
    if note not in getattr(error, "__notes__", ()):  # pytest raises a fixture's error anew
        error.add_note(note)
    return ""


def is_of_numba(error: BaseException) -> bool:
    """Whether ``numba.cuda`` has raised an error because it finds no GPU.

    Numba may miss a library of CUDA, or the interface for GPUs of a tensor that is on the CPU.
    """
    kind, frames = type(error), list(traceback.walk_tb(error.__traceback__))
    if kind.__module__.startswith("numba.") and kind.__name__.endswith("SupportError"):
        return True
    names = [frame.f_globals.get("__name__", "") for frame, _ in frames]
    launches = any(
        name == "numba.cuda.dispatcher" and frame.f_code.co_name in ("__call__", "call")
        for name, (frame, _) in zip(names, frames, strict=True)
    )
    of_numba = bool(names) and names[-1].startswith("numba.cuda.")
    return launches or (of_numba and "cuda array interface" in str(error))


def fault_of_numba(error: BaseException, advice: str) -> HostFault:
    """Return the fault of a program that asks ``numba.cuda`` for a GPU."""
    frames = [
        (frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if not is_library(name := frame.f_globals.get("__name__", ""))
        if name.partition(".")[0] != "numba"
    ]
    place = frames[-1] if frames else None
    return HostFault("error", "a kernel of numba.cuda", advice, source=place)
