# SPDX-License-Identifier: MIT
"""Trial of an operator by the rules of each part of PyTorch."""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._library.triton import triton_ops_to_kernels
from torch.utils._pytree import tree_leaves

from torchpar.errors import ConfigError, first_line
from torchpar.library import player
from torchpar.library.tape import operators
from torchpar.parallel.launch.guard import WATCHED, is_readers
from torchpar.testing.operators.case import (
    Calls,
    Case,
    Operator,
    Sample,
    name_of,
    shapes_of,
)
from torchpar.testing.operators.kernel_rules import (
    KERNEL_GRADIENTS,
    KERNEL_ROWS,
    emulated_rows,
    emulating,
)
from torchpar.testing.operators.process_settings import kept
from torchpar.testing.operators.rules import (
    OF_DERIVATIVES,
    OF_GRADIENTS,
    RULES,
    WITHOUT_GRADIENTS,
    try_rule,
)
from torchpar.testing.operators.rules.side_effects import note_first_call, noted
from torchpar.testing.operators.table import OperatorTable
from torchpar.testing.operators.tensors import Memory
from torchpar.testing.rows import Row

BUILT_IN = ("aten", "prim", "prims", "profiler")  # namespaces of PyTorch's own operators


def check_operator(
    op: Callable[..., object],
    samples: Iterable[Sample | tuple[object, ...]],
    *,
    reference: Callable[..., object] | None = None,
    rules: Iterable[str] | None = None,
    emulate: str | None = None,
) -> OperatorTable:
    """Try an operator with every part of PyTorch, and compare the results with a reference.

    Without a reference, that of an operator of `torchpar.library` is the formula that it registers.
    Where it has none, values are compared with the operator's values on contiguous operands, and
    "gradcheck" and "gradgradcheck" with numerical derivatives; the other rules for derivatives are
    not run. The operator must not call a random generator.

    The table is not ok where no row compared a result, or where rows of gradients are asked for and
    none compared a gradient.

    Args:
        op: an operator of `torch.ops`, what `torch.library.custom_op` returns, or a function that
            calls one operator that does not belong to PyTorch. It must not write to its operands.
        samples: samples, or tuples of arguments. Derivatives are taken with respect to all floating
            operands. Give operands of float64, or of float32 if the operator takes no float64; in
            lower precision right rows can fail. For numerical derivatives samples of another dtype
            are cast to float64.
        reference: a differentiable function of the same arguments, of PyTorch's operators.
        rules: a name or names of rows, as the printed table has them; by default all. The name
            "without gradients" stands for all rows but those of derivatives, for an operator that
            has no backward.
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
    names = _names(rules, emulate)
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
    changed_first: dict[str, str] = {}
    with noted(changed_first):
        overload = find_overload(op, chosen[0])
    if overload is not None and overload._schema.is_mutable:
        way = "torch.library.opcheck takes it, and nogpu.check_kernel its kernel"
        raise ConfigError(
            f"{overload} writes to its operands, expected an operator that does not; {way}"
        )
    formula = _formula(op, overload) if reference is None else None
    cases = [Case(op, overload, reference or formula, one) for one in chosen]
    cases[0].changed_first["the forward"] = changed_first
    disabled = logging.root.manager.disable
    logging.disable()  # the compiler's logs of errors, which are in the table
    try:
        with warnings.catch_warnings(action="ignore"), _without_warnings_of_loops(), kept():
            if emulate is None:
                note_first_call(names, cases[0])
                counted = WATCHED.counted(names, "rows", len(names))
                rows = [try_rule(rule, cases) for rule in counted]
                notes = (*_flop_notes(overload), *_notes(overload, cases))
            else:
                rows, notes = emulated_rows(names, cases, emulate), ()
            if formula is not None:
                notes = ("the reference is the formula that the operator registers", *notes)
            played, missing = _played(cases[0], emulate), _missing_gradients(rows, cases)
            return OperatorTable(cases[0].name, rows, notes, played, missing)
    finally:
        logging.disable(disabled)


def _names(rules: Iterable[str] | None, emulate: str | None) -> list[str]:
    """The names of the rows that are asked for, each once."""
    known = [*RULES, *(KERNEL_ROWS if emulate is not None else ())]
    if rules is None:
        return known
    names: list[str] = []
    for name in [rules] if isinstance(rules, str) else rules:
        if name == WITHOUT_GRADIENTS:
            names += [one for one in known if one not in (*OF_DERIVATIVES, KERNEL_GRADIENTS)]
        elif name in known:
            names.append(name)
        else:
            expected = ", ".join(map(repr, [*known, WITHOUT_GRADIENTS]))
            way = "; rows of kernels need emulate=" * (name in KERNEL_ROWS)
            raise ConfigError(f"rule {name!r}, expected one of {expected}{way}")
    return list(dict.fromkeys(names))


def _formula(op: Callable[..., object], overload: Operator | None) -> Callable[..., object] | None:
    """The formula of an operator of `torchpar.library`, which takes the same arguments."""
    if overload is None or (_overload_of(op) is None and not hasattr(op, "overloads")):
        return None  # a function that calls the operator has arguments of its own
    found: Callable[..., object] | None = getattr(operators.get(overload.name()), "_formula", None)
    return found


def _missing_gradients(rows: Sequence[Row], cases: Sequence[Case]) -> str:
    """A sentence if rows of gradients were asked for, and none compared a gradient."""
    asked = [row for row in rows if row.rule in (*OF_GRADIENTS, KERNEL_GRADIENTS)]
    if not asked or any(row.outcome in ("works", "wrong") for row in asked):
        return ""
    if not any(map(_has_gradient, cases)):
        return ""
    refused = [row for row in asked if row.outcome != "not run"]
    row = (refused or asked)[0]
    way = "register a backward" if refused else "give a reference"
    reason = row.detail.partition("; ")[0]
    return (
        f"no row compared a gradient ({row.rule}: {row.outcome}, {reason}); {way}, or choose the "
        f'rules "{WITHOUT_GRADIENTS}"'
    )


def _has_gradient(case: Case) -> bool:
    try:
        return bool(case.floating) and any(case.is_smooth)
    except Exception:  # of the operator or the reference, which the rows have met
        return True


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


def _played(case: Case, emulate: str | None) -> str:
    """A sentence on whether C++ plays the operator's calls on a GPU."""
    op = None if case.overload is None else operators.get(case.overload.name())
    if op is None:
        return ""
    args, kwargs = case.arguments(case.operands)
    types = {t.device.type for t in case.operands}
    reason, tried = player.why_not(op), ""
    if not reason and ("cuda" in types or emulate is not None):  # else nothing is launched
        try:
            with emulating(emulate), WATCHED.calling(case.name, "its recording"):
                reason, tried = player.why_not_call(op, args, kwargs), "tried"
        except BaseException as e:  # the rules have met it, too
            if not is_readers(e):
                raise
    if reason:
        return f"C++ does not play its calls on a GPU: {reason}"
    condition = "" if tried else " if a tape can hold them, which --emulate sm_90 tries"
    return f"C++ plays its calls on a GPU, where python -m torchpar build has run{condition}"


def _overload_of(op: Callable[..., object]) -> Operator | None:
    """The operator that an object stands for; None for a function that calls one."""
    for attribute in ("overload", "_opoverload"):
        op = getattr(op, attribute, op)
    return op if isinstance(op, torch._ops.OpOverload) else None


def find_overload(op: Callable[..., object], sample: Sample) -> Operator | None:
    """The operator in PyTorch's registry; None if only PyTorch's operators are called."""
    if (known := _overload_of(op)) is not None:
        return known
    error: BaseException | None = None
    tensors = [t for t in tree_leaves((sample.args, sample.kwargs)) if isinstance(t, Tensor)]
    memory = Memory(tensors)
    name = name_of(op)
    with Calls() as calls, WATCHED.calling(name, f"its call on sample 0 of {shapes_of(tensors)}"):
        try:
            op(*sample.args, **sample.kwargs)
        except BaseException as e:  # of an operator, the rules will meet it again
            if not is_readers(e):
                raise
            error = e
    memory.restore()
    found = next((func for func in calls.seen if func.namespace not in BUILT_IN), None)
    if found is None and error is not None:
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


def _flop_notes(overload: Operator | None) -> tuple[str, ...]:
    """A sentence on an operator of which `FlopCounterMode` knows no formula."""
    from torch.utils.flop_counter import flop_registry  # imports Triton

    if overload is None or overload.namespace in BUILT_IN:
        return ()
    if overload._overloadpacket in flop_registry:
        return ()
    way = "register_flops of torchpar.library, or triton_op(…, flops=…), takes a formula"
    return (f"FlopCounterMode counts 0 operations for it; {way}",)
