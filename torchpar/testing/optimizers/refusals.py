# SPDX-License-Identifier: MIT
"""Errors of an optimizer, as verdicts: a refusal, or a crash."""

import dis
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torchpar.parallel.launch.world import is_communication_error
from torchpar.testing.optimizers.trial import Failure

RAISE = dis.opmap["RAISE_VARARGS"]  # the instruction of each `raise`, however it is written


@contextmanager
def failures() -> Iterator[None]:
    """Turn errors into failures, and hide warnings, which every rank would print."""
    logging.disable()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except Failure:
        raise
    except Exception as e:
        message = " ".join(f"{type(e).__name__}: {e}".split())[:300]
        # Another rank has failed.
        lost = isinstance(e, RuntimeError) and is_communication_error(e)
        raise Failure(
            "hangs" if lost else "refuses" if is_refusal(e) else "crashes", message
        ) from None
    finally:
        logging.disable(logging.NOTSET)


def is_refusal(error: Exception) -> bool:
    """Whether an error is a refusal: raised on purpose, and if a RuntimeError, outside PyTorch.

    `torch._check`, by which others raise too, belongs to the module "torch" and counts as outside.
    """
    module = raising_module(error)
    if module is None:
        return False
    is_outside = not module.startswith("torch.") or module.startswith("torch.optim.")
    kinds = (ValueError, TypeError, NotImplementedError, *[RuntimeError] * is_outside)
    return isinstance(error, kinds)


def raising_module(error: Exception) -> str | None:
    """The module whose `raise` raised an error; None if an operation did.

    An operation, such as a call of PyTorch's native code, has no frame of its own. So the innermost
    frame is that of its caller, and was not at a `raise`.
    """
    traceback = error.__traceback__
    assert traceback is not None  # the error was caught
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    frame = traceback.tb_frame
    if frame.f_code.co_code[traceback.tb_lasti] != RAISE:
        return None
    return str(frame.f_globals.get("__name__", ""))
