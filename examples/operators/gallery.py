# SPDX-License-Identifier: MIT
"""Check the operators of this folder, and write docs/gallery.md.

python examples/operators/gallery.py
"""

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

import torch

from torchpar.testing import OperatorTable, check_operator
from torchpar.testing.operators.rules import RULES as ALL_RULES

OPERATORS = ("softmax", "numba_kernel", "roi_align", "list_of_tensors")
SKIPPED = ("torch.compile by Inductor", "CUDA graph")
RULES = [rule for rule in ALL_RULES if rule not in SKIPPED]
PAGE = Path(__file__).parents[2] / "docs" / "gallery.md"
TEXT = """# A gallery of operators

This page is for people who want an example near to their own operator. After it you know which gaps
it would have by `torch.library`, and which file to copy.

Each file of [examples/operators](../examples/operators) takes a function, in Triton, Numba,
torchvision or PyTorch. The same lines make two operators of it: one by `torch.library`, and one by
`torchpar.library`. [From a function to an operator](citizen.md) explains each rule.
`torchpar.testing.check_operator` finds, before → after:

{table}

All other rules that were tried work before and after; Inductor and CUDA graphs are left out.
Before, a derivative in forward mode is 0 or missing, without an error. On a CPU `softmax` computes
by PyTorch; the tests also run its kernel in Triton's interpreter.

- DTensor refuses `roi_align`: no rule is registered. Its backward, an operator too, would need
  another.
- An operator that writes to an argument has no gradient, by `torch.library` and by
  `torchpar.library`.

`python examples/operators/gallery.py` writes this page. It needs
`pip install -e ./nogpu -e '.[examples,test]'`.
"""


def check(name: str, rules: Iterable[str] = RULES) -> tuple[OperatorTable, OperatorTable]:
    """The tables of an operator by `torch.library`, and by `torchpar.library`."""
    torch.manual_seed(0)
    module = import_module(name)
    before, after = (
        check_operator(op, module.samples(), reference=module.reference, rules=rules)
        for op in (module.before, module.after)
    )
    return before, after


def page(tables: dict[str, tuple[OperatorTable, OperatorTable]]) -> str:
    """The text of the page: for each rule and operator the two outcomes, if they differ."""
    links = [f"[{name}](../examples/operators/{name}.py)" for name in tables]
    lines = [f"| | {' | '.join(links)} |", "|---" * (1 + len(tables)) + "|"]
    for rule in (row.rule for row in next(iter(tables.values()))[0].rows):
        pairs = [(before[rule].outcome, after[rule].outcome) for before, after in tables.values()]
        if any(before != after for before, after in pairs):
            cells = [was if was == now else f"{was} → {now}" for was, now in pairs]
            lines.append(f"| {rule} | {' | '.join(cells)} |")
    return TEXT.format(table="\n".join(lines))


if __name__ == "__main__":
    for name in OPERATORS:
        import_module(name)  # a package that is missing ends here, and not after minutes of checks
    PAGE.write_text(page({name: check(name) for name in OPERATORS}))
