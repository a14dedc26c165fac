# SPDX-License-Identifier: MIT
"""The attribute ``__nogpu__`` of a package, by which a library tells nogpu of itself.

    __nogpu__ = {"optimizers": {"torch.optim.Muon": "my_library.optim.Muon"}}

A launch is then said to be made by the line of the program that calls the library, as with PyTorch
and Triton, and not by a line within the library. "optimizers" names what a program may take in the
place of an optimizer that no CUDA graph can capture; it may be left out.
"""

import sys
from collections.abc import Mapping

# Their lines stand between a program's line and what it calls.
LIBRARIES = ("torch", "triton", "numba", __name__.partition(".")[0], "contextlib", "runpy", "copy")
ATTRIBUTE = "__nogpu__"


def is_library(module: str) -> bool:
    """Return whether the lines of ``module`` are those of a library, and not of the program."""
    package = module.partition(".")[0]
    return package in LIBRARIES or _told(sys.modules.get(package)) is not None


def instead_of_optimizer(kind: type) -> str:
    """Return the optimizer that a library offers in the place of ``kind``; "" if none does."""
    told = [*filter(None, map(_told, list(sys.modules.values())))]
    for one in kind.__mro__:
        # torch.optim.Muon is torch.optim._muon.Muon.
        parts = (part for part in one.__module__.split(".") if not part.startswith("_"))
        name = ".".join((*parts, one.__qualname__))
        for offers in told:
            if found := offers.get("optimizers", {}).get(name):
                return found
    return ""


def _told(package: object) -> Mapping[str, Mapping[str, str]] | None:
    """Return what a package says; None if it says nothing.

    Only its own attributes count: some objects in `sys.modules` make any attribute that is asked
    for.
    """
    try:
        found = object.__getattribute__(package, "__dict__").get(ATTRIBUTE)
    except AttributeError:  # it is no module
        return None
    return found if isinstance(found, Mapping) else None
