# SPDX-License-Identifier: MIT
"""Let functions that `torch.compile` has compiled run uncompiled while an emulator is active.

PyTorch compiles nothing under a mode such as `torch_operators.Host`, and a function that must be
compiled as a whole would raise.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch


@contextmanager
def uncompiled() -> Iterator[None]:
    """Let compiled functions run as they were written; PyTorch's compiler is not imported for it.

    A program that calls `torch.compile` imports it.
    """
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        else:
            make, began = torch.compile, list[bool]()

            def compile(*args: Any, **options: Any) -> Callable[..., Any]:
                if not began:
                    began.append(True)
                    stack.enter_context(torch.compiler.set_stance("force_eager"))
                return make(*args, **options)

            stack.enter_context(patch.object(torch, "compile", compile))
        yield
