# SPDX-License-Identifier: MIT
"""The order of an operator's table does not depend on which rules are imported first."""

import importlib
import sys

import pytest

from torchpar.testing.operators import rules

FIRST = ("values", "same bits twice", "global settings", "schema", "layouts and sizes")
LAST = ("torch.compile by Inductor", "torch.export, save and load", "DTensor", "CUDA graph")
SUBJECTS = ("dtensor", "vmap", "autograd", "values")


@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_order_is_that_of_the_table(subject: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Import the rules anew, one subject first."""
    names = [name for name in sys.modules if name.startswith(rules.__name__)]
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("torchpar.testing.operators.rules", rules)  # which an import replaces
    importlib.import_module(f"{rules.__name__}.{subject}")
    anew = importlib.import_module(rules.__name__)
    assert anew is not rules
    assert list(anew.RULES) == list(rules.RULES)
    order = tuple(anew.RULES)
    assert order[: len(FIRST)] == FIRST
    assert order[-len(LAST) :] == LAST


def test_each_rule_is_entered_once() -> None:
    """Functions of a case in the files of the subjects, but for helpers, are in the table."""
    entered = {getattr(one, "func", one) for one in rules.RULES.values()}
    subjects = [rules.autograd, rules.compile, rules.dtensor, rules.modes, rules.schema]
    subjects += [rules.dynamic_sizes, rules.subclasses, rules.values, rules.vmap]
    subjects += [rules.larger_sizes, rules.side_effects]
    written = {
        function
        for module in subjects
        for name, function in vars(module).items()
        if callable(function)
        and getattr(function, "__module__", "") == module.__name__
        and list(getattr(function, "__annotations__", {})) == ["case", "return"]
        and not name.startswith("_")
    }
    assert written - entered == {rules.values.values_and_gradients}
    assert len(written & entered) > 20
