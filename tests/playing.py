# SPDX-License-Identifier: MIT
"""Calls of operators and functions that C++ plays on CPU tensors, for tests."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest

from torchpar.library import CustomOpDef, build, player

MODULE = build.load()
"""None where the C++ path was not built."""
needs_cpp = pytest.mark.skipif(
    MODULE is None, reason="there is no C++ path of calls here; run python -m torchpar build"
)


@contextmanager
def playing(calls_python: bool = True) -> Iterator[None]:
    """Let C++ play the calls on CPU tensors, of the operators that are called in the block."""
    started: list[CustomOpDef] = []
    start = CustomOpDef._start_player

    def noted(op: CustomOpDef, args: Any) -> None:
        start(op, args)
        started.append(op)

    with (
        patch.object(player.core, "module", MODULE),
        patch.object(player.core, "devices", ("CPU",)),
        patch.object(player.core, "calls_python", calls_python),
        patch.object(CustomOpDef, "_start_player", noted),
    ):
        try:
            yield
        finally:
            for op in started:
                op._stop_player()


def played(call: Callable[[], Any]) -> tuple[Any, int, int]:
    """The result of a call, and how many tapes it played and missed."""
    before = MODULE.counts()
    result = call()
    after = MODULE.counts()
    return result, after[0] - before[0], after[1] - before[1]


def entered(call: Callable[[], object]) -> list[str]:
    """The Python functions of torchpar and Triton that a call enters.

    PyTorch enters its own, whoever's the operator is, as `torch.autograd.grad` does.
    """
    found: list[str] = []

    def note(frame: Any, event: str, argument: object) -> None:
        name = frame.f_globals.get("__name__", "")
        if event == "call" and name.partition(".")[0] in ("torchpar", "triton"):
            found.append(f"{name}.{frame.f_code.co_qualname}")

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found
