# SPDX-License-Identifier: MIT
"""Settings that a call changes, and memory that it keeps: the table names them, and restores."""

import os
import warnings
from collections.abc import Callable
from typing import Any

import faulty_operators as faulty
import numpy as np
import pytest
import torch
from samples import normal
from torch import Tensor

from torchpar.testing import check_operator
from torchpar.testing.operators.process_settings import EVERY, SETTINGS, Settings

SAMPLES = [(normal(5, 4), normal(6, 4, seed=1))]
RULE = "settings left as they were"


def test_a_right_operator_leaves_nothing() -> None:
    assert np.random.get_state()  # noqa: NPY002  # of the generator that the row watches
    table = check_operator(faulty.make("leaves_nothing"), SAMPLES, rules=RULE)
    assert table[RULE].outcome == "works", str(table)


@pytest.mark.parametrize("name", ["seed", "draw", "denormal", "precision"])
def test_the_kit_leaves_the_process_as_it_was(name: str) -> None:
    """Also where the operator does not, in the first call, by which the kit looks for it."""
    op = faulty.make(f"kit_{name}", **faulty.FAULTS[f"leaves_{name}"][0])
    before = Settings(EVERY)
    check_operator(lambda a, b: op(a, b), SAMPLES, rules=["values", "low precision", RULE])
    assert before.changes() == {}


OF_THE_PROCESS: dict[str, tuple[Callable[[], object], str]] = {
    "environment": (lambda: os.environ.update(TORCHPAR_LEFT="1"), "environment variables"),
    "directory": (lambda: os.chdir("/"), "the working directory, from "),
    "errors": (lambda: np.seterr(all="ignore"), "NumPy's handling of errors, from "),
    "filters": (lambda: warnings.simplefilter("error"), "the filters of warnings"),
}


@pytest.mark.parametrize("name", OF_THE_PROCESS)
@pytest.mark.parametrize("is_function", [False, True])
def test_what_an_earlier_row_has_changed_is_found_and_restored(
    name: str, is_function: bool
) -> None:
    """Each row begins with the settings before the operator's first call, also of a function."""
    change, words = OF_THE_PROCESS[name]
    label = f"earlier_{name}_{is_function}"
    op = faulty.make(label, kernel=faulty.kernel_after(lambda a: change()))
    before = Settings(EVERY)
    try:
        given = (lambda a, b: op(a, b)) if is_function else op
        table = check_operator(given, SAMPLES, reference=faulty.kernel, rules=["values", RULE])
        assert before.changes() == {}
    finally:
        before.restore()
    assert [row.outcome for row in table] == ["works", "wrong"], str(table)
    assert table[RULE].detail.startswith(f"the forward: changes {words}")


def test_a_compiler_may_name_the_place_of_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Inductor does in each compilation where no variable names one."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    monkeypatch.setenv(name, "")  # and restore it
    del os.environ[name]
    kernel = faulty.kernel_after(lambda a: os.environ.setdefault(name, "/tmp/cache"))
    op = faulty.make("compiling", kernel=kernel)
    assert check_operator(op, SAMPLES, rules=RULE)[RULE].outcome == "works"
    assert name in os.environ  # the compiler relies on it


LAZY: dict[str, tuple[Callable[[], object], str]] = {
    "denormal": (lambda: torch.set_flush_denormal(True), "flush-denormal, from False to True"),
    "seed": (lambda: torch.manual_seed(0), "PyTorch's random numbers"),
    # What an import may change is asked of later calls alone.
    "environment": (lambda: os.environ.update(TORCHPAR_LEFT="1"), ""),
}


@pytest.mark.parametrize("name", LAZY)
@pytest.mark.parametrize("part", ["forward", "function", "backward"])
def test_what_the_first_call_alone_changes_is_found(name: str, part: str) -> None:
    """The first of all calls, which is not of the row of settings, as in a lazy initialization."""
    change, words = LAZY[name]
    changes = iter([change])

    def once(t: Tensor) -> None:
        next(changes, lambda: None)()

    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        once(g)
        return faulty.backward(ctx, g)

    parts: Any = {"kernel": faulty.kernel_after(once)}
    if part == "backward":
        parts = {"backward": backward}
    op = faulty.make(f"lazy_{name}_{part}", **parts)
    given = (lambda a, b: op(a, b)) if part == "function" else op
    before = Settings(EVERY)
    try:
        table = check_operator(given, SAMPLES, reference=faulty.kernel, rules=["values", RULE])
        assert before.changes() == {}
    finally:
        before.restore()
    row = table[RULE]
    label = f"the first call of the {part.replace('function', 'forward')}: changes {words}"
    assert row.outcome == ("wrong" if words else "works"), str(table)
    assert not words or row.detail.startswith(label), row


def test_each_setting_that_can_be_changed_is_seen_and_restored() -> None:
    before = Settings(SETTINGS)
    try:
        before.put_others()
        changed = {name for name, setting in SETTINGS.items() if setting.other is not None}
        assert changed <= before.changes().keys()
        assert len(changed) >= 4
    finally:
        before.restore()
    assert before.changes() == {}
    assert torch.tensor([5e-324], dtype=torch.float64).mul(1).any()


def test_a_cache_of_the_last_call_is_no_growing_memory() -> None:
    last: dict[str, Tensor] = {}

    def caching(a: Tensor, b: Tensor) -> Tensor:
        last["a"] = a.detach()
        return faulty.kernel(a, b)

    op = faulty.make("caching", kernel=caching)
    assert check_operator(op, SAMPLES, rules=RULE)[RULE].outcome == "works"


def test_a_precision_that_was_set_before_is_seen_with_another() -> None:
    """The operator sets what the caller has set already, so that nothing changes at first."""
    op: Any = faulty.make("precise", **faulty.FAULTS["leaves_precision"][0])
    before = Settings(SETTINGS)
    torch.set_float32_matmul_precision("medium")
    try:
        (row,) = check_operator(op, SAMPLES, rules=RULE).rows
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        before.restore()
    assert (row.outcome, "with other settings: changes the float32" in row.detail) == (
        "wrong",
        True,
    ), row
