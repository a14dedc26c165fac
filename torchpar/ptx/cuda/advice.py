# SPDX-License-Identifier: MIT
"""Advice for scripts that say "cuda", and fail because there is no GPU."""

import traceback

NEEDS_CUDA = 'a script that launches kernels only for device="cuda" needs --cuda-is-cpu'


def says_cuda(error: BaseException) -> bool:
    """Whether an error is of a line that asks for a GPU, or says itself that there is none."""
    is_of_torch = isinstance(error, (AssertionError, RuntimeError))
    if is_of_torch and any(word in str(error) for word in ("NVIDIA driver", "CUDA")):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, AssertionError) and bool(frames) and "cuda" in (frames[-1].line or "")


def advise(error: BaseException) -> str:
    """Name the flag in an error; return the advice where nobody would see it there."""
    if isinstance(error, SystemExit):
        return NEEDS_CUDA
    if NEEDS_CUDA not in getattr(error, "__notes__", ()):  # pytest raises a fixture's error anew
        error.add_note(NEEDS_CUDA)
    return ""
