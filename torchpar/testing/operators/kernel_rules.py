# SPDX-License-Identifier: MIT
"""Rules of an operator's Triton kernels, which the emulator of GPUs executes on this CPU."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torchpar.errors import ConfigError
from torchpar.parallel.launch.guard import WATCHED
from torchpar.testing.operators.attempts import OutcomeException
from torchpar.testing.operators.case import Case
from torchpar.testing.operators.gradients import pulled_back
from torchpar.testing.operators.rules import try_cases, try_rule
from torchpar.testing.operators.table import RuleResult

if TYPE_CHECKING:
    from torchpar.ptx import Emulator, Fault


# The faults of `torchpar.ptx` by row; docs/ptx.md says what each means. Those of no row are of
# "execution".
FAULT_ROWS = {
    "races": (
        "race",
        "race between programs",
        "race between launches",
        "missing fence",
        "different values",
        "unfinished copy",
        "overwritten mbarrier",
    ),
    "bounds": ("out of bounds", "misaligned access"),
    "uninitialised memory": (
        "uninitialised memory",
        "uninitialised register",
        "undefined value",
    ),
}
OTHERS = "execution"  # deadlocks, endless loops, assertions, and what is not emulated
RESOURCES = "registers and spills"
NO_LAUNCH = (
    "no Triton kernel was launched; "
    'register a path for CPUs by op.register_kernel("cpu"), not by x.is_cuda'
)
EMPTY_GRID = "the grid has no programs"


def check_arch(arch: str) -> None:
    """Refuse an unknown architecture."""
    from torchpar.ptx.triton.emulator import ARCHITECTURES

    if arch not in ARCHITECTURES:
        raise ConfigError(f"arch is {arch!r}, expected one of {', '.join(ARCHITECTURES)}")


def fault_rows(faults: Sequence["Fault"]) -> Iterator[tuple[str, str, str]]:
    """Yield for each kind of faults the row, its outcome, and the first fault with its line."""
    named = {name for names in FAULT_ROWS.values() for name in names}
    for row, names in {**FAULT_ROWS, OTHERS: ()}.items():
        mine = [one for one in faults if (one.name in names if names else one.name not in named)]
        mine = [one for one in mine if one.kind != "note"]
        errors = [one for one in mine if one.kind == "error"]
        first = next(iter(errors or mine), None)
        yield row, "wrong" if errors else "works", "" if first is None else described(first)


def described(fault: "Fault") -> str:
    where = f"line {fault.line} of the PTX"
    if fault.source is not None:
        path, line = fault.source
        where = f"{Path(path).name}:{line}"
    kind = "" if fault.kind == "error" else f"{fault.kind}: "
    where += f", {fault.kernel}" if fault.kernel else ""  # a fault around the kernels has none
    return f"{where}: {kind}{fault.name}: {fault.message}"


def resource_row(gpus: Sequence["Emulator"]) -> tuple[str, str, str]:
    """The row of what each kernel takes of a multiprocessor, by ptxas."""
    from torchpar.ptx.report.resources import resources

    found: dict[str, str] = {}
    for launch in (launch for gpu in gpus for launch in gpu.launches):
        try:
            found[launch.kernel] = str(resources(launch.ptx, launch.arch))
        except (OSError, RuntimeError) as e:
            return RESOURCES, "not run", f"ptxas: {e}"
    if not found:
        return RESOURCES, "not run", NO_LAUNCH
    return RESOURCES, "works", "; ".join(f"{name}: {text}" for name, text in found.items())


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


KERNEL_RULES: dict[str, Callable[..., str | None]] = {  # of a case, and of the emulator "gpu"
    "kernel values": kernel_values,
    "kernel gradients": kernel_gradients,
}
KERNEL_ROWS = (*KERNEL_RULES, *FAULT_ROWS, OTHERS, RESOURCES)
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


def emulated_rows(names: Sequence[str], cases: Sequence[Case], arch: str) -> list[RuleResult]:
    """The rows of the rules, whose calls run the operator's kernels, and those of the kernels."""
    from torchpar.ptx import emulate

    check_arch(arch)
    gpus: list[Emulator] = []
    rows = []
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
        rows.append(RuleResult(title, outcome if launched else "not run", detail))
    rows.append(RuleResult(*resource_row(gpus)))
    return [row for row in rows if row.rule in names]
