# SPDX-License-Identifier: MIT
"""Trial of a rule: its attempts, and the worst outcome among them."""

from collections.abc import Callable, Generator, Iterator

from torchpar.errors import message_of
from torchpar.parallel.launch.guard import is_readers

Attempt = tuple[str, Callable[[], None]]  # a label, and a trial
Attempts = Iterator[Attempt]
AttemptsAndRemark = Generator[Attempt, None, str]
REFUSALS = (RuntimeError, NotImplementedError, ValueError)  # a TypeError is a mistake in a rule
INTERNAL = "INTERNAL ASSERT FAILED"  # in a message of PyTorch: a crash, not a refusal
FALLS_BACK = "falls back"  # the result is right, but was computed without the operator
# From the best to the worst.
OUTCOMES = ("not run", "works", FALLS_BACK, "refuses", "crashes", "wrong")


class OutcomeException(Exception):
    """An outcome, such as "wrong" or "not run", and what happened. Rules raise it, as tests do."""


def outcome_of(
    attempt: Callable[[], Attempts | str | None], restore: Callable[[], object] | None = None
) -> tuple[str, str]:
    """The outcome of a rule or of one of its attempts, and what happened.

    ``restore`` is called after each attempt, so that all attempts begin with the same memory.
    """
    try:
        returned = attempt()
        if isinstance(returned, Iterator):
            return _worst(returned, restore)
        return "works", returned or ""
    except OutcomeException as e:
        outcome, message = e.args
        return outcome, _headline(message)
    except REFUSALS as e:
        return "crashes" if INTERNAL in message_of(e) else "refuses", _message(e)
    except BaseException as e:
        if not is_readers(e):
            raise
        return "crashes", named(e)
    finally:
        if restore is not None:
            restore()


def _worst(attempts: Attempts, restore: Callable[[], object] | None) -> tuple[str, str]:
    """The worst outcome of attempts, the first attempt with it, and the number of such attempts."""
    found = []
    while True:
        try:
            label, attempt = next(attempts)
        except StopIteration as end:
            remark = end.value or ""
            break
        found.append((label, *outcome_of(attempt, restore)))
    if not found:
        return "not run", "nothing to try"
    label, outcome, detail = max(found, key=lambda one: OUTCOMES.index(one[1]))
    if outcome == "works":
        return outcome, remark
    alike = sum(one[1] == outcome for one in found)
    return outcome, f"{label}{': ' * bool(detail)}{detail} ({alike} of {len(found)})"


def named(e: BaseException) -> str:
    """The class of an error, and what `_message` says of it."""
    return f"{type(e).__name__}: {_message(e)}"


def _message(e: BaseException) -> str:
    """The first line of an error's note or message; a compiler's first error counts."""
    if type(e).__name__ == "TorchRuntimeError":
        while e.__context__:
            e = e.__context__
    return _headline(
        "\n".join([*getattr(e, "__notes__", []), message_of(getattr(e, "inner_exception", e))])
    )


def _headline(message: str) -> str:
    return next((" ".join(line.split()) for line in message.splitlines() if line.strip()), "")
