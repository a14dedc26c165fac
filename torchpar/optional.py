# SPDX-License-Identifier: MIT
"""Optional packages: nogpu, and PyTorch, without which the pure-Python baselines still run."""

import importlib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, NoReturn

from torchpar.errors import ConfigError

INSTALL_NOGPU = "in a checkout, pip install ./nogpu"  # it is not on PyPI


def import_nogpu(what: str) -> Any:
    """Import nogpu, which executes Triton kernels on a machine without a GPU.

    Args:
        what: the subject of the message, such as "--all".

    Raises:
        ConfigError: it is not installed.
    """
    if not has_nogpu():
        raise ConfigError(f"{what} needs nogpu; {INSTALL_NOGPU}")
    return importlib.import_module("nogpu")


def has_nogpu() -> bool:
    return is_installed("nogpu")


def is_installed(package: str) -> bool:
    """Whether a package is installed. A folder without ``__init__.py``, as the one that a checkout
    has of the name nogpu, does not count."""
    found = find_spec(package)
    return found is not None and found.origin is not None


def needs_torch(package: str, names: Sequence[str]) -> Callable[[str], NoReturn]:
    """A package's `__getattr__` where PyTorch is not installed, which its ``names`` need."""

    def missing(name: str) -> NoReturn:
        if name in names:
            raise ImportError(f"{package}.{name} needs PyTorch; pip install torch")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return missing
