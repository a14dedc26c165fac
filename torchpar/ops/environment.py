# SPDX-License-Identifier: MIT
"""This machine: its processor, its GPU, and the versions of what computes on it."""

import importlib.metadata
import os
import platform
import sys
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
