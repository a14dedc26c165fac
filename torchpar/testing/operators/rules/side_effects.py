# SPDX-License-Identifier: MIT
"""Rule of what a call leaves behind in the process: settings, random numbers, and memory."""

import gc
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from torchpar.parallel.launch.guard import WATCHED
from torchpar.testing.operators.attempts import REFUSALS, Attempts, OutcomeException, outcome_of
from torchpar.testing.operators.case import Case, shapes_of
from torchpar.testing.operators.gradients import gradients
from torchpar.testing.operators.process_settings import EVERY, SETTINGS, Settings, kept
from torchpar.testing.operators.tensors import Memory, is_differentiable, normal_like

ROW = "settings left as they were"
SEED = 0x5EED_0F_0DD  # which no operator sets
CALLS = 4  # after which the memory of the first call must be free


def settings_left_as_they_were(case: Case) -> Attempts:
    """A call and its backward change no setting, draw no random number and keep no memory.

    Each is called twice, since a first call may import modules. All settings are restored between
    the two calls. `note_first_call` has seen what the operator's first call of all changed.
    """

    def check(compute: Callable[[], object], of_others: bool) -> None:
        with kept():
            _seed()
            if of_others:
                Settings(SETTINGS).put_others()
            given = Settings(EVERY)
            compute()
            given.restore()
            compute()
            changes = given.changes()
        _expect_none(changes)

    for label, compute in _computes(case).items():
        yield label, partial(check, compute, False)
        yield f"{label}, with other settings", partial(check, compute, True)
    yield "memory", partial(_check_memory, case)
    # Last, so that the row does not name the first call where each call changes a setting.
    for label, changes in case.changed_first.items():
        yield f"the first call of {label}", partial(_expect_none, changes)


def _computes(case: Case) -> dict[str, Callable[[], object]]:
    computes: dict[str, Callable[[], object]] = {
        "the forward": partial(case.takes, case.operands),
        "the backward": partial(_call, case),
    }
    if not _has_backward(case):
        del computes["the backward"]
    return computes


def _expect_none(changes: dict[str, str]) -> None:
    if changes:
        name, how = next(iter(changes.items()))
        more = f", and {len(changes) - 1} more" if len(changes) > 1 else ""
        changed = f"changes {name}" + f", from {how}" * bool(how) + more
        way = "; compute without them, or restore them"
        raise OutcomeException("wrong", f"{changed}{way}")


@contextmanager
def noted(changes: dict[str, str]) -> Iterator[None]:
    """Enter into ``changes`` what calls change, and restore all settings.

    The settings of `OF_THE_PROCESS`, which an import in a first call may change, are left out.
    """
    with kept():
        _seed()
        before = Settings(SETTINGS)
        try:
            yield
        finally:
            changes.update(before.changes())


def note_first_call(rows: Sequence[str], case: Case) -> None:
    """Call the operator and its backward before any row does, if `ROW` is one of the rows.

    Only there is seen what an operator changes once, as by a lazy initialization.
    """
    if ROW not in rows:
        return
    restore = Memory(case.operands).restore
    text = f"its first call on sample 0 of {shapes_of(case.operands)}"

    def forward() -> None:
        case.takes(case.operands)

    def backward() -> None:
        _call(case)

    for label, compute in {"the forward": forward, "the backward": backward}.items():
        with noted(case.changed_first.setdefault(label, {})), WATCHED.calling(case.name, text):
            outcome_of(compute, restore)  # the rows meet its errors again


def _seed() -> None:
    """Give the generators states that no seeding within a call would make."""
    torch.default_generator.manual_seed(SEED)
    random.seed(SEED)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(SEED % 2**32)


def _has_backward(case: Case) -> bool:
    try:
        with kept():
            return any(y.requires_grad for y in case.op(*_leaves(case)))
    except Exception:  # other rows say why
        return False


def _leaves(case: Case) -> list[Tensor]:
    leaves = iter(case.leaves())
    return [next(leaves) if is_differentiable(t) else t.clone() for t in case.operands]


def _call(case: Case) -> list[Tensor]:
    """Call the operator and its backward on copies of the operands; return all tensors."""
    xs = _leaves(case)
    ys = case.takes(xs)
    smooth = [y for y in ys if y.requires_grad]
    incoming = list(map(normal_like, smooth))
    found: Sequence[Tensor] = ()
    if smooth:
        with suppress(*REFUSALS, TypeError):  # the rows of gradients say why
            found = gradients(smooth, [x for x in xs if x.requires_grad], incoming)
    return [*xs, *ys, *incoming, *found]


def _memory(tensors: Sequence[Tensor]) -> list[StorageWeakRef]:
    strided = [t for t in tensors if type(t) is Tensor and t.layout == torch.strided]
    return [StorageWeakRef(t.untyped_storage()) for t in strided]


def _tensors() -> int:
    """The number of tensors that Python's objects hold."""
    gc.collect()
    return sum(issubclass(type(one), Tensor) for one in gc.get_objects())


def _check_memory(case: Case) -> None:
    """Call the operator several times; the memory of the first calls must be free."""
    _call(case)  # a first call may fill caches
    before = _tensors()
    calls = [_memory(_call(case)) for _ in range(CALLS)]
    grown = _tensors() - before
    # A cache of the last call does not grow.
    if all(any(not memory.expired() for memory in call) for call in calls[:-1]):
        raise OutcomeException(
            "wrong", "each call keeps the memory of an operand, a result or a gradient alive"
        )
    if grown >= CALLS:
        raise OutcomeException("wrong", f"{CALLS} calls leave {grown} tensors")
