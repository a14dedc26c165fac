# SPDX-License-Identifier: MIT
"""Rules of sizes that a compiler does not know: dynamic sizes, and sizes that depend on data."""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from typing import Literal, NamedTuple

import torch

from torchpar.testing.operators.attempts import AttemptsAndRemark, OutcomeException
from torchpar.testing.operators.case import Case
from torchpar.testing.operators.compare import ALIKE, close, near, same_metadata
from torchpar.testing.operators.gradients import gradients, pulled_back
from torchpar.testing.operators.tensors import Function, Tensors, is_differentiable, normal_like

Kind = Literal["dynamic", "data-dependent"]
Dim = tuple[int, int]  # an operand, and one of its dimensions
PREFIX = "- 0/0: "  # of a guard that failed
# How the lines begin in which PyTorch's compiler says what an operator has fixed.
CAUSES = {
    PREFIX: ("wrong", "it is compiled again for other sizes than"),
    "- You marked": ("refuses", "it fixes a dynamic size"),
    "- Not all values": ("refuses", "it fixes a dynamic size"),
    "Could not guard on data-dep": ("refuses", "it asks for a size that depends on data"),
    "Could not extract specialized": ("refuses", "it asks for a size that depends on data"),
}
SIZE = re.compile(r"(?:L\['given'\]|given)\[0\]\[0\]\[(\d+)\]\.size\(\)\[(\d+)\]")


class Trial(NamedTuple):
    """Dimensions whose sizes are not known, and sizes that one graph must take.

    Attributes:
        groups: dimensions that have one size.
        calls: for each call the size of each group; the graph is compiled by the first call.
    """

    groups: Sequence[Sequence[Dim]]
    calls: Sequence[Sequence[int]]


def dynamic_sizes(case: Case) -> AttemptsAndRemark:
    return (yield from _of_each_size(case, "dynamic"))


def data_dependent_sizes(case: Case) -> AttemptsAndRemark:
    return (yield from _of_each_size(case, "data-dependent"))


def _of_each_size(case: Case, kind: Kind) -> AttemptsAndRemark:
    trials = dict(_trials(case, kind))
    if not trials:
        raise OutcomeException("not run", "no size of 2 or more")
    try:  # one compilation takes less time than many
        _compare(case.op, case, [*trials.values()], kind)
    except Exception:
        for label, trial in trials.items():
            yield label, partial(_try, case, trial, kind)
    else:
        yield "all of them", lambda: None
    return f"{len(trials)} choices of sizes"


def _trials(case: Case, kind: Kind) -> Iterator[tuple[str, Trial]]:
    """A trial for each size alone, for all dimensions of each size, and for all sizes."""
    by_size: dict[int, list[Dim]] = {}
    for i, t in enumerate(case.operands):
        for dim, size in enumerate(t.shape):
            if size > 1:  # compilers fix 0 and 1
                by_size.setdefault(size, []).append((i, dim))
    if not by_size:
        return
    others = [*by_size]
    dims = [(size, one) for size, same in by_size.items() for one in same]
    for size, (i, dim) in dims:
        calls = _calls(case, [[(i, dim)]], [size], others, kind)
        # Only a reference tells whether a compiler can find out that a size that depends on data
        # equals another size.
        if len(calls) > 1 or (kind == "data-dependent" and case.reference is not None):
            yield f"dimension {dim} of operand {i}", Trial([[(i, dim)]], calls)
    for size, same in by_size.items():
        if len(same) > 1 and len(calls := _calls(case, [same], [size], others, kind)) > 1:
            yield f"every size of {size}", Trial([same], calls)
    if len(dims) > 1:
        groups = [[one] for _, one in dims] if kind == "data-dependent" else [*by_size.values()]
        sizes = [size for size, _ in dims] if kind == "data-dependent" else others
        yield "all sizes", Trial(groups, _calls(case, groups, sizes, [], kind))


def _calls(
    case: Case,
    groups: Sequence[Sequence[Dim]],
    sizes: list[int],
    others: list[int],
    kind: Kind,
) -> list[list[int]]:
    """The given ``sizes`` of groups, and other sizes that eager mode takes.

    ``others`` are tried for a single group: a rule that compares two sizes errs where they happen
    to be equal.
    """
    twice = [2 * size for size in sizes]
    if not _is_taken(case, groups, twice):
        return [sizes]
    changed = []
    if len(sizes) == 1:
        chosen = [*others, 1, 0] if kind == "data-dependent" else others
        changed = [[size] for size in chosen if size != sizes[0]]
    return [sizes, twice, *(one for one in changed if _is_taken(case, groups, one))]


def _is_taken(case: Case, groups: Sequence[Sequence[Dim]], sizes: Sequence[int]) -> bool:
    try:
        case.takes(_resized(case.operands, groups, sizes))
    except OutcomeException:
        return False
    return True


def _resized(operands: Tensors, groups: Sequence[Sequence[Dim]], sizes: Sequence[int]) -> Tensors:
    """Contiguous operands with other sizes of some dimensions."""
    found = [*operands]
    for group, size in zip(groups, sizes, strict=True):
        for i, dim in group:
            times = -(-size // found[i].shape[dim])
            found[i] = torch.cat([found[i]] * max(times, 1), dim).narrow(dim, 0, size)
    # The strides of a copy of a part could be those of the whole, where sizes are 1.
    return tuple(t.new_empty(t.shape).copy_(t) for t in found)


def _try(case: Case, trial: Trial, kind: Kind) -> None:
    try:
        _compare(case.op, case, [trial], kind)
    except Exception as e:
        if case.reference is not None and not _is_possible(case, trial, kind):
            raise OutcomeException("not run", "the reference cannot be compiled once") from e
        if cause := _named(str(e)):
            raise cause from e
        raise


def _named(message: str) -> OutcomeException | None:
    """The line of a compiler's error that says which size an operator has fixed."""
    for line in map(str.strip, message.splitlines()):
        for words, (outcome, cause) in CAUSES.items():
            if line.startswith(words):
                named = SIZE.sub(r"size \2 of operand \1", line.partition("  #")[0])
                return OutcomeException(
                    outcome, f"{cause}: {named.removeprefix(PREFIX).removeprefix('- ')}"
                )
    return None


def _is_possible(case: Case, trial: Trial, kind: Kind) -> bool:
    """Whether the reference can be compiled once for the sizes of a trial."""
    try:
        _compare(case.plain, case, [trial], kind)
    except Exception:
        return False
    return True


def _compare(function: Function, case: Case, trials: Sequence[Trial], kind: Kind) -> None:
    """Compile all trials into one graph; compare values and gradients with eager mode."""
    has_gradient = _has_gradient(function, case)

    def of_trials(*given: tuple[Tensors, Tensors]) -> list[Tensors]:
        return [
            function(*(_chosen(operands, trial, masks) if masks else operands))
            for trial, (operands, masks) in zip(trials, given, strict=True)
        ]

    def results_of(
        call: Callable[..., list[Tensors]], sizes: Sequence[Sequence[int]]
    ) -> tuple[Tensors, Tensors]:
        given = [_given(case, trial, each, kind) for trial, each in zip(trials, sizes, strict=True)]
        leaves = [
            t.requires_grad_()
            for operands, _ in given
            for t in operands
            if has_gradient and is_differentiable(t)
        ]
        results = [y for ys in call(*given) for y in ys]
        smooth = [y for y in results if y.requires_grad]
        found = gradients(smooth, leaves, list(map(normal_like, smooth))) if smooth else ()
        return tuple(results), found

    torch._dynamo.reset()
    options = {"error_on_recompile": True, "capture_dynamic_output_shape_ops": True}
    try:
        with torch._dynamo.config.patch(options):
            compiled = torch.compile(of_trials, fullgraph=True, backend="aot_eager")
            for sizes in _calls_of(trials):
                expected, actual = results_of(of_trials, sizes), results_of(compiled, sizes)
                _alike(actual, expected)
                same_metadata(actual[0], expected[0])
    finally:
        torch._dynamo.reset()


def _alike(actual: tuple[Tensors, Tensors], expected: tuple[Tensors, Tensors]) -> None:
    """Compare numbers as other rows do, or by `ALIKE`: those rows judge the rounding of sums."""
    try:
        close(actual, expected)
    except OutcomeException:
        leaves = [t for pair in (actual, expected) for ts in pair for t in ts]
        if not all(map(is_differentiable, leaves)) or not near(actual, expected, ALIKE):
            raise


def _calls_of(trials: Sequence[Trial]) -> Iterator[list[Sequence[int]]]:
    """The sizes of each trial, for as many calls as the longest trial has."""
    for sizes in zip_longest(*(trial.calls for trial in trials)):
        yield [one or trial.calls[0] for one, trial in zip(sizes, trials, strict=True)]


def _has_gradient(function: Function, case: Case) -> bool:
    if not case.floating:
        return False
    try:
        pulled_back(case.smooth(function), case)
    except Exception:  # other rows say so
        return False
    return True


def _given(case: Case, trial: Trial, sizes: Sequence[int], kind: Kind) -> tuple[Tensors, Tensors]:
    """The operands of a call, and masks that choose as many of them as the sizes say."""
    if kind == "dynamic":
        operands = _resized(case.operands, trial.groups, sizes)
        for group in trial.groups:
            for i, dim in group:
                torch._dynamo.mark_dynamic(operands[i], dim)
        return operands, ()
    largest = [max(each) for each in zip(*trial.calls, strict=True)]
    operands = _resized(case.operands, trial.groups, largest)
    return operands, tuple(
        torch.arange(most, device=operands[group[0][0]].device) < size
        for group, most, size in zip(trial.groups, largest, sizes, strict=True)
    )


def _chosen(operands: Tensors, trial: Trial, masks: Tensors) -> Tensors:
    """Operands whose sizes depend on the values of ``masks``."""
    found = [*operands]
    for group, mask in zip(trial.groups, masks, strict=True):
        (index,) = mask.nonzero(as_tuple=True)
        for i, dim in group:
            found[i] = found[i].index_select(dim, index)
    return tuple(found)
