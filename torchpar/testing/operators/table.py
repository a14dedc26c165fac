# SPDX-License-Identifier: MIT
"""Check an operator by the rules of each part of PyTorch, and print the table of outcomes."""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from textwrap import shorten
from typing import TYPE_CHECKING

import torch
from torch._library.triton import triton_ops_to_kernels

from torchpar.errors import ConfigError, first_line, in_columns
from torchpar.testing import kernels
from torchpar.testing.operators.case import (
    FALLS_BACK,
    INTERNAL,
    REFUSALS,
    Attempts,
    Calls,
    Case,
    Operator,
    Outcome,
    Sample,
)
from torchpar.testing.operators.rules import ONCE, RULES

if TYPE_CHECKING:
    from torchpar.ptx import Emulator

# From the best to the worst.
OUTCOMES = ("not run", "works", FALLS_BACK, "refuses", "crashes", "wrong")
LONGEST = 110  # characters of a message that is printed
BUILT_IN = ("aten", "prim", "prims", "profiler")  # namespaces of PyTorch's own operators


@dataclass(frozen=True)
class Row:
    """The outcome of a rule.

    Attributes:
        outcome: the worst outcome over all samples; export and Inductor try the first sample only.
            "works"; "falls back", if the result is right, but was computed without the operator;
            "refuses", by an error with a message; "wrong"; "crashes", by any other error; or "not
            run".
        detail: a message, or a remark.
        sample: the index of the first sample with this outcome.
    """

    rule: str
    outcome: str
    detail: str = ""
    sample: int = 0


@dataclass(frozen=True)
class OperatorTable:
    """The rows of an operator's table, which `str` prints.

    ``table["values"].outcome`` is the outcome of the row "values".

    Attributes:
        notes: sentences on what no row has tried, such as kernels for a GPU on a machine without.
    """

    name: str
    rows: list[Row]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether no row is wrong or crashes."""
        return not any(row.outcome in ("wrong", "crashes") for row in self.rows)

    def __getitem__(self, rule: str) -> Row:
        return {row.rule: row for row in self.rows}[rule]

    def __str__(self) -> str:
        table = [["rule", "outcome", "sample", "detail"]]
        cut = partial(shorten, width=LONGEST, placeholder="…")
        table += [[row.rule, row.outcome, str(row.sample), cut(row.detail)] for row in self.rows]
        return "\n".join([self.name, in_columns(table), *self.notes])

    def as_dict(self) -> dict[str, object]:
        """The table as JSON objects: ``name``, ``ok``, ``rows`` and ``notes``."""
        found = asdict(self)
        return {
            "name": found["name"],
            "ok": self.ok,
            "rows": found["rows"],
            "notes": list(self.notes),
        }


def check_operator(
    op: Callable[..., object],
    samples: Iterable[Sample | tuple[object, ...]],
    *,
    reference: Callable[..., object] | None = None,
    rules: Iterable[str] | None = None,
    emulate: str | None = None,
) -> OperatorTable:
    """Try an operator with every part of PyTorch, and compare the results with a reference.

    Without a reference, values are compared with the operator's values on contiguous operands, and
    "gradcheck" and "gradgradcheck" with numerical derivatives; the other rules for derivatives are
    not run. The operator must not call a random generator.

    Args:
        op: an operator of `torch.ops`, what `torch.library.custom_op` returns, or a function that
            calls one operator that does not belong to PyTorch. It must not write to its operands.
        samples: samples, or tuples of arguments. Derivatives are taken with respect to all floating
            operands. Give operands of float64 for numerical derivatives, else of float32; in lower
            precision right rows can fail.
        reference: a differentiable function of the same arguments, of PyTorch's operators.
        rules: a name or names of rows, as the printed table has them; by default all.
        emulate: "sm_80", "sm_90" or "sm_100": execute the operator's Triton kernels as compiled for
            this GPU, on samples on the CPU. All rules but those of compilers, of graphs and of
            DTensors run them, and further rows say what was wrong within a kernel. Give small
            samples, of a few thousand numbers: a launch takes milliseconds, and a table has
            hundreds of them.

    Returns:
        A table with one row for each rule, of its worst outcome.

    Raises:
        ConfigError: an unknown rule or architecture; no sample, or a sample that is not a tuple; an
            operator that writes to operands; a function that raises before it calls an operator.
    """
    known = [*RULES, *(KERNEL_ROWS if emulate is not None else ())]
    names = known if rules is None else [rules] if isinstance(rules, str) else list(rules)
    if unknown := [name for name in names if name not in known]:
        expected = ", ".join(map(repr, known))
        way = "; rows of kernels need emulate=" * (unknown[0] in KERNEL_ROWS)
        raise ConfigError(f"rule {unknown[0]!r}, expected one of {expected}{way}")
    if not isinstance(samples, Iterable):
        raise ConfigError(
            f"the samples are an object of type {type(samples).__name__}, expected a list"
        )
    chosen = [one if isinstance(one, Sample) else Sample(one) for one in samples]
    if not chosen or any(not isinstance(one.args, tuple | list) for one in chosen):
        raise ConfigError(
            "expected samples: objects of torchpar.testing.Sample, or tuples of arguments"
        )
    for what, function in ("operator", op), ("reference", reference):
        if not callable(function) and (what == "operator" or function is not None):
            given = f"the {what} is an object of type {type(function).__name__}"
            raise ConfigError(f"{given}, expected a callable")
    overload = find_overload(op, chosen[0])
    if overload is not None and overload._schema.is_mutable:
        raise ConfigError(f"{overload} writes to its operands, expected an operator that does not")
    name = str(overload) if overload is not None else getattr(op, "__name__", type(op).__name__)
    cases = [Case(op, overload, reference, one) for one in chosen]
    disabled = logging.root.manager.disable
    logging.disable()  # the compiler's logs of errors, which are in the table
    try:
        with warnings.catch_warnings(action="ignore"), _without_warnings_of_loops():
            if emulate is None:
                rows, notes = [_row(rule, cases) for rule in names], _notes(overload, cases)
            else:
                rows, notes = _emulated_rows(names, cases, emulate), ()
            return OperatorTable(name, rows, notes)
    finally:
        logging.disable(disabled)


@contextmanager
def _without_warnings_of_loops() -> Iterator[None]:
    """Hide that vmap calls an operator in a loop, which the table says, too.

    If an argument that has a default is left out, PyTorch writes it past Python's warnings.
    """
    set_enabled = torch._C._functorch._set_vmap_fallback_warning_enabled  # type: ignore[attr-defined]
    set_enabled(False)
    try:
        yield
    finally:
        set_enabled(True)


KERNEL_RULES: dict[str, Callable[[Case, "Emulator"], str | None]] = {
    "kernel values": kernels.kernel_values,
    "kernel gradients": kernels.kernel_gradients,
}
KERNEL_ROWS = (*KERNEL_RULES, *kernels.ROWS, kernels.OTHERS, kernels.RESOURCES)
# These trace the operator, or compute by several ranks.
NOT_EMULATED = (
    "torch.compile",
    "torch.compile, dynamic",
    "torch.compile by Inductor",
    "torch.export, save and load",
    "functionalize, and a copied graph",
    "DTensor",
    "CUDA graph",
)


def _emulated_rows(names: Sequence[str], cases: Sequence[Case], arch: str) -> list[Row]:
    """The rows of the rules, whose calls run the operator's kernels, and those of the kernels."""
    from torchpar.ptx import emulate

    kernels.check_arch(arch)
    gpus: list[Emulator] = []
    rows = []
    for name in names:
        if name in KERNEL_ROWS:
            continue
        if name in NOT_EMULATED:
            rows.append(_row(name, cases))
            continue
        with emulate(arch) as gpu:
            rows.append(_row(name, cases))
        gpus.append(gpu)
    if not set(names) & set(KERNEL_ROWS):
        return rows
    for title, rule in KERNEL_RULES.items():
        with emulate(arch, schedules="all") as gpu:
            found = [
                Row(title, *outcome_of(partial(rule, case, gpu)), i) for i, case in enumerate(cases)
            ]
        rows.append(_worst_of(found))
        gpus.append(gpu)
    faults = [fault for gpu in gpus for fault in gpu.report().faults]
    launched = any(gpu.launches for gpu in gpus)
    for title, outcome, detail in kernels.fault_rows(faults):
        rows.append(Row(title, outcome if launched else "not run", detail))
    rows.append(Row(*kernels.resource_row(gpus)))
    return [row for row in rows if row.rule in names]


def find_overload(op: Callable[..., object], sample: Sample) -> Operator | None:
    """The operator in PyTorch's registry; None if only PyTorch's operators are called."""
    for attribute in ("overload", "_opoverload"):
        op = getattr(op, attribute, op)
    if isinstance(op, torch._ops.OpOverload):
        return op
    error = None
    with Calls() as calls:
        try:
            op(*sample.args, **sample.kwargs)
        except Exception as e:  # of an operator, the rules will meet it again
            error = e
    found = next((func for func in calls.seen if func.namespace not in BUILT_IN), None)
    if found is None and error is not None:
        name = getattr(op, "__name__", type(op).__name__)
        raise ConfigError(
            f"{name} calls no operator on the first sample and raises {first_line(error)}; "
            "expected an operator, or a function that calls one"
        ) from error
    return found


def _notes(overload: Operator | None, cases: list[Case]) -> tuple[str, ...]:
    """A sentence on the operator's kernels for GPUs, if none has run."""
    if (
        overload is None
        or overload.namespace in BUILT_IN
        or any(t.is_cuda for t in cases[0].operands)
    ):
        return ()
    name = overload.name()
    is_triton = name in triton_ops_to_kernels
    if not is_triton and not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
        return ()
    reason = "the samples are on no GPU" if torch.cuda.is_available() else "no GPU"
    kind = "Triton" if is_triton else "CUDA"
    way = 'emulate="sm_90", or --emulate sm_90, executes Triton kernels on this CPU'
    return (f"{reason}: the operator's {kind} kernels were not run; {way}",)


def _row(name: str, cases: Sequence[Case]) -> Row:
    tried = cases[:1] if name in ONCE else cases
    return _worst_of(
        [Row(name, *outcome_of(partial(RULES[name], case)), i) for i, case in enumerate(tried)]
    )


def _worst_of(rows: Sequence[Row]) -> Row:
    return max(rows, key=lambda row: (OUTCOMES.index(row.outcome), -row.sample))


def outcome_of(attempt: Callable[[], Attempts | str | None]) -> tuple[str, str]:
    """The outcome of a rule or of one of its attempts, and what happened."""
    try:
        returned = attempt()
        return _worst(returned) if isinstance(returned, Iterator) else ("works", returned or "")
    except Outcome as e:
        outcome, message = e.args
        return outcome, _headline(message)
    except REFUSALS as e:
        return "crashes" if INTERNAL in str(e) else "refuses", _message(e)
    except Exception as e:
        return "crashes", f"{type(e).__name__}: {_message(e)}"


def _worst(attempts: Attempts) -> tuple[str, str]:
    """The worst outcome of attempts, the first attempt with it, and the number of such attempts."""
    found = []
    while True:
        try:
            label, attempt = next(attempts)
        except StopIteration as end:
            remark = end.value or ""
            break
        found.append((label, *outcome_of(attempt)))
    if not found:
        return "not run", "nothing to try"
    label, outcome, detail = max(found, key=lambda one: OUTCOMES.index(one[1]))
    if outcome == "works":
        return outcome, remark
    alike = sum(one[1] == outcome for one in found)
    return outcome, f"{label}{': ' * bool(detail)}{detail} ({alike} of {len(found)})"


def _message(e: BaseException) -> str:
    """The first line of an error's note or message. Of the compiler's errors the first counts."""
    if type(e).__name__ == "TorchRuntimeError":
        while e.__context__:
            e = e.__context__
    return _headline(
        "\n".join([*getattr(e, "__notes__", []), str(getattr(e, "inner_exception", e))])
    )


def _headline(message: str) -> str:
    return next((" ".join(line.split()) for line in message.splitlines() if line.strip()), "")
