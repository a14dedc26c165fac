# SPDX-License-Identifier: MIT
"""Rules of an operator's Triton kernels, which the emulator of GPUs executes on this CPU."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

from torchpar.errors import ConfigError
from torchpar.optional import import_nogpu
from torchpar.parallel.launch.guard import WATCHED
from torchpar.testing.operators.attempts import OutcomeException
from torchpar.testing.operators.case import Case
from torchpar.testing.operators.gradients import pulled_back
from torchpar.testing.operators.rules import try_cases, try_rule
from torchpar.testing.operators.rules.side_effects import note_first_call
from torchpar.testing.rows import Row

if TYPE_CHECKING:
    from nogpu import Emulator

# The rows of what nogpu finds, in the order of its `fault_rows` and `resource_row`.
FOUND = ("races", "bounds", "uninitialised memory", "execution", "registers and spills")
NO_LAUNCH = (
    "no Triton kernel was launched; "
    'register a path for CPUs by op.register_kernel("cpu"), not by x.is_cuda'
)


def kernel_values(case: Case, gpu: "Emulator") -> None:
    """The results of the operator, whose kernels are executed under all schedules."""
    actual = case.op(*case.operands)
    if not gpu.launches:
        raise OutcomeException("not run", NO_LAUNCH)
    if case.reference is None:
        raise OutcomeException("not run", "no reference")
    case.close(actual, case.plain(*case.operands), lambda: case.wide.plain(*case.wide.operands))


def kernel_gradients(case: Case, gpu: "Emulator") -> str:
    """The gradients of the operator, with incoming gradients that are not all alike."""
    oracle = case.oracle
    case.op(*case.operands)
    of_values = len(gpu.launches)
    actual = pulled_back(case.smooth(case.op), case)
    case.close(actual, pulled_back(oracle, case), lambda: pulled_back(case.wide.oracle, case.wide))
    has_more = len(gpu.launches) > 2 * of_values
    return "" if has_more else "the backward launches no kernel"


KERNEL_GRADIENTS = "kernel gradients"
KERNEL_RULES: dict[str, Callable[..., str | None]] = {  # of a case, and of the emulator "gpu"
    "kernel values": kernel_values,
    KERNEL_GRADIENTS: kernel_gradients,
}
KERNEL_ROWS = (*KERNEL_RULES, *FOUND)
# These trace the operator, or compute by several ranks.
NOT_EMULATED = (
    "torch.compile",
    "torch.compile, dynamic",
    "torch.compile, each size dynamic",
    "torch.compile, data-dependent sizes",
    "torch.compile by Inductor",
    "torch.export, save and load",
    "functionalize, and a copied graph",
    "DTensor",
    "CUDA graph",
)


def emulating(arch: str | None) -> AbstractContextManager[object]:
    """Execute Triton kernels as compiled for ``arch``, if it is given."""
    if arch is None:
        return nullcontext()
    from nogpu import emulate

    return emulate(arch)


def emulated_rows(names: Sequence[str], cases: Sequence[Case], arch: str) -> list[Row]:
    """The rows of the rules, whose calls run the operator's kernels, and the kernels' own rows."""
    import_nogpu(f"emulate={arch!r}")
    from nogpu import ARCHITECTURES, emulate, fault_rows, resource_row

    if arch not in ARCHITECTURES:
        raise ConfigError(f"arch is {arch!r}, expected one of {', '.join(ARCHITECTURES)}")
    gpus: list[Emulator] = []
    rows = []
    with emulate(arch):
        note_first_call(names, cases[0])
    others = [name for name in names if name not in KERNEL_ROWS]
    for name in WATCHED.counted(others, "rows", len(names)):
        if name in NOT_EMULATED:
            rows.append(try_rule(name, cases))
            continue
        with emulate(arch) as gpu:
            rows.append(try_rule(name, cases))
        gpus.append(gpu)
    if not set(names) & set(KERNEL_ROWS):
        return rows
    for title, rule in KERNEL_RULES.items():
        with emulate(arch, schedules="all") as gpu:
            rows.append(try_cases(title, partial(rule, gpu=gpu), cases))
        gpus.append(gpu)
    faults = [fault for gpu in gpus for fault in gpu.report().faults]
    launched = any(gpu.launches for gpu in gpus)
    for title, outcome, detail in fault_rows(faults):
        rows.append(Row(title, outcome if launched else "not run", detail=detail))
    title, outcome, detail = resource_row(gpus)
    rows.append(Row(title, outcome, detail=detail))
    return [row for row in rows if row.rule in names]
