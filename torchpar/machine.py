# SPDX-License-Identifier: MIT
"""This machine: its processor, its GPU, its output, and the versions of what computes on it."""

import importlib.metadata
import io
import os
import platform
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGES = ("torch", "triton", "numpy")


def cpuinfo(key: str) -> str:
    """Return a field of /proc/cpuinfo for the first processor, such as "model name", or ""."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next(
        (line.partition(": ")[2] for line in lines if line.partition(":")[0].strip() == key), ""
    )


def stop_printing() -> None:
    """Let what is printed from now on go nowhere, as after a reader has closed the pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def printing(command: str) -> Iterator[None]:
    """Let the block print; end the process in one line where the output cannot be written.

    Where nobody reads on, such as head, that has read enough, the process ends without a line.

    Args:
        command: whose block it is, for the message.
    """
    if sys.stdout is None:  # it was closed
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until this process ends
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where there is only ASCII, print ? for others
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        stop_printing()
        sys.exit(128 + signal.SIGPIPE)
    except OSError as e:
        if e.filename is not None or _can_print():  # then it is another file's
            raise
        stop_printing()
        print(f"{command}: error: the output cannot be written: {e}", file=sys.stderr)
        sys.exit(1)


def _can_print() -> bool:
    try:
        print(flush=True)  # a flush alone would find an empty buffer
    except OSError:
        return False
    return True


def processor() -> str:
    """Return the processor's name, family and model."""
    name = cpuinfo("model name") or platform.processor() or platform.machine()
    kind = [f"{key} {cpuinfo(field)}" for key, field in (("family", "cpu family"), ("model",) * 2)]
    return ", ".join([name, *kind] if cpuinfo("cpu family") else [name])


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe() -> dict[str, str]:
    """Return what identifies this machine and its software, by name.

    The GPU is this process's current one. Without PyTorch there is no such line.
    """
    lines = {
        "host": platform.node(),
        "processor": f"{processor()}; {num_cores()} cores for this process",
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        lines["GPU"] = torch.cuda.get_device_name()
    lines["system"] = f"{platform.system()} {platform.release()}"
    lines["Python"] = platform.python_version()
    for package in PACKAGES:
        try:
            lines[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            lines[package] = "not installed"
    return lines
