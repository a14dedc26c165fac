# SPDX-License-Identifier: MIT
"""Compare contestants of one operator: every call is checked and timed, in turn.

The result of each timed call is compared with an oracle in float64. A contestant's largest error
may be twice the reference's, in the same dtype on the same inputs. These measures reject a result
that the call itself did not compute:

- Inputs are new in every round, so that a result kept from an earlier call is wrong.
- The inputs are NaN until shortly before the call, so that what a contestant computes early is NaN.
- Memory freed before the call holds NaN, and so does every earlier result, so that what a
  contestant leaves unwritten is NaN. For integers, the dtype's largest value stands for NaN.
- The result is copied right behind the call, in stream order, so that what is unfinished when the
  clock stops is unfinished in the copy.
- Inputs must come out as they went in, and share no memory with the result.

Caches are flushed before each sample.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .results import Result
from .timing import Rejected, flush, take_turns, time_calls

Implementation = Callable[..., Tensor]
Mode = Literal["forward", "backward", "full"]
MODES: tuple[Mode, ...] = ("forward", "backward", "full")
MIN_ROUNDS = 5
NEAR = 0.03  # ‖error‖/‖oracle‖: under 0.01 in correct bfloat16, over 0.3 for other inputs' result


class Work(NamedTuple):
    """The least that a call must do: bytes through memory, and floating-point operations."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class OperatorCase:
    """An operator on inputs of one shape and dtype.

    Attributes:
        operator: its name.
        shape: of the arguments, in words.
        inputs: ``inputs(seed)`` returns the operator's arguments and then the gradient of its
            result: new, dense, of ``dtype`` and on ``device``. Integers must be exact in float64
            and below the dtype's largest value; they have no gradients.
        oracle: computes the operator in float64.
        forward, backward: the work of either pass.
        modes: those that it has.
    """

    operator: str
    shape: str
    dtype: torch.dtype
    device: torch.device
    inputs: Callable[[int], Sequence[Tensor]]
    oracle: Implementation
    forward: Work
    backward: Work
    modes: Sequence[Mode] = MODES

    def work(self, mode: Mode) -> Work:
        full = Work(
            self.forward.bytes + self.backward.bytes, self.forward.flops + self.backward.flops
        )
        return {"forward": self.forward, "backward": self.backward, "full": full}[mode]


def compare(
    case: OperatorCase,
    contestants: Mapping[str, Implementation],
    *,
    reference: str,
    libraries: Collection[str] = (),
    rivals: Collection[str] = (),
    beside: Mapping[str, tuple[OperatorCase, Implementation]] = MappingProxyType({}),
    finish: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({}),
    mode: Mode = "forward",
    rounds: int = 20,
    seconds: float = math.inf,
    calls: int = 1,
) -> list[Result]:
    """Check and time each of ``contestants``: a result for each. One that is not ok has a reason,
    no times.

    Args:
        reference: the contestant whose times, and errors, the others' are compared with.
        libraries: contestants whose errors are as they are. They must only be near the oracle, as
            the reference must.
        rivals: contestants whose lower quartile over each one's is a column, as the reference's is.
        beside: contestants of other cases, which take turns with these and are in their table, such
            as a call in another dtype. Their errors are as libraries' are.
        finish: for contestants that do a part of the operator, the rest of it, done before the
            result is checked and outside of the time.
        mode: "forward" (without a graph), "backward" (gradients of all arguments), or "full"
            (both). Of integers, "forward".
        rounds: samples of each contestant; one more comes first, checked and not timed.
        seconds: a contestant whose turns took so long has no further one, once it had `MIN_ROUNDS`.
        calls: calls of a sample; more than one is for the cost of small calls. Not for "backward".
    """
    checked = {
        name: _Checked(case, contestant, mode, calls, finish.get(name))
        for name, contestant in contestants.items()
    }
    inputs = _Inputs(case, mode)
    drawn = dict.fromkeys(checked, inputs)
    for name, (other, contestant) in beside.items():
        checked[name] = _Checked(other, contestant, mode, calls, None)
        drawn[name] = _Inputs(other, mode)
    times = take_turns(
        {name: partial(one.turn, drawn[name]) for name, one in checked.items()},
        rounds,
        seconds=seconds,
        least=MIN_ROUNDS,
        before=partial(_draw_all, list(dict.fromkeys(drawn.values()))),
        label=f"{case.operator} {case.shape} {mode}",
    )
    near = {reference, *libraries, *beside}
    for name in near & times.keys():
        if not (times[name].reason or checked[name].near_oracle):
            times[name].reason = "Rejected: the result is not what the oracle computes"
    allowed = checked[reference].errors
    for name in times.keys() - near:
        errors = checked[name].errors
        if times[name].reason:
            continue
        if times[reference].reason:
            times[name].reason = f"nothing to compare with: {reference} failed"
        # The reference may be off by the oracle's error more than it seems to, and the contestant
        # by less.
        elif not (errors <= 2 * (allowed + inputs.error) + inputs.error).all():
            times[name].reason = f"errors {errors.tolist()}, {reference}'s are {allowed.tolist()}"
    settings: dict[str, object] = {
        "rounds": max((len(one.rounds) for one in times.values()), default=0),
        "calls": calls,
        "float32_precision": torch.backends.cuda.matmul.fp32_precision,
    }
    labels = {
        "operator": case.operator,
        "mode": mode + ", warm" * (calls > 1),
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
    work = case.work(mode)
    results = []
    for name, one in checked.items():
        result = times[name].result(labels, name, times[reference], host_ms=one.host_ms)
        if p50 := result.p50_ms:
            result = result.plus(
                gb_per_s=work.bytes / p50 * 1e-6, gflop_per_s=work.flops / p50 * 1e-6
            )
        over = {
            f"over {other}": times[name].ratio_over(times[other]) for other in (reference, *rivals)
        }
        error = one.errors.max().item() if len(one.errors) else None
        memory = one.peak_memory_mb
        results.append(result.plus(**over, max_error=error, peak_memory_mb=memory, **settings))
    return results


class _Inputs:
    """The inputs of the current round, and the results that the oracle computes of them."""

    def __init__(self, case: OperatorCase, mode: Mode):
        self.case = case
        self.mode = mode
        poisoned = [torch.full_like(t, poison(t.dtype)) for t in case.inputs(0)]
        # What the calls take; poisoned between turns.
        self.live = [t.requires_grad_(t.is_floating_point()) for t in poisoned]
        self.error = torch.zeros(())  # the oracle's own, at most

    def draw(self, seed: int) -> None:
        *arguments, gradient = self.case.inputs(seed)
        self.drawn = [
            *(t.detach().requires_grad_(t.is_floating_point()) for t in arguments),
            gradient,
        ]
        wide = [t.detach().double().requires_grad_() for t in self.drawn]
        self.expected = [t.detach() for t in prepare(self.case.oracle, wide, self.mode)()]
        # Float64 is off by a rounding per operation on an element, of random signs. That counts in
        # float64 alone, where a reference may round exactly as the oracle does.
        roundings = self.case.work(self.mode).flops / sum(t.numel() for t in self.expected)
        off = _largest(self.expected) * (math.sqrt(roundings) * torch.finfo(torch.float64).eps / 2)
        self.error = off.maximum(self.error)


def _draw_all(inputs: Sequence[_Inputs], seed: int) -> None:
    for one in inputs:
        one.draw(seed)


@dataclass
class _Checked:
    """A contestant, its errors, and on a GPU its memory and the host's times."""

    case: OperatorCase
    contestant: Implementation
    mode: Mode
    calls: int
    finish: Callable[[Tensor], Tensor] | None
    errors: Tensor = field(default_factory=lambda: torch.empty(0))
    near_oracle: bool = True
    hosts: list[float] = field(default_factory=list)
    peak_memory_mb: float | None = None

    @property
    def host_ms(self) -> float | None:
        """The host's median time to issue a call to a GPU."""
        return torch.tensor(self.hosts).median().item() * 1e3 if self.hosts else None

    def turn(self, inputs: _Inputs, index: int) -> list[float]:
        """Time a contestant's calls on new inputs, and compare the result with the oracle's."""
        device, live, expected = self.case.device, inputs.live, inputs.expected
        on_gpu = device.type == "cuda"
        if on_gpu:
            # What does not wait for the current stream will find the inputs still NaN.
            flush(device)
        with torch.no_grad():
            for t, value in zip(live, inputs.drawn, strict=True):
                t.copy_(value)
        call = prepare(self.contestant, live, self.mode)
        freed = [
            torch.full_like(t, poison(self.case.dtype), dtype=self.case.dtype)
            for t in (*expected, *live)
        ]
        del freed
        flush(device)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
            allocated = torch.cuda.memory_allocated(device)
        timed = time_calls(call, device, self.calls)
        if on_gpu:
            peak = (torch.cuda.max_memory_allocated(device) - allocated) / 1e6
            self.peak_memory_mb = max(peak, self.peak_memory_mb or 0.0)
            self.hosts += [timed.host] * (index > 0)
        copies = [result.detach().clone() for result in timed.result]
        _check_memory(timed.result, live, inputs.drawn, expected)
        with torch.no_grad():
            for t in (*live, *timed.result):
                t.fill_(poison(t.dtype))
        seconds = timed.seconds()
        copies = [self.finish(copy) for copy in copies] if self.finish else copies
        differences = [result.double() - t for result, t in zip(copies, expected, strict=True)]
        errors = _largest(differences)
        self.errors = errors.maximum(self.errors) if len(self.errors) else errors
        for difference, t in zip(differences, expected, strict=True):
            self.near_oracle &= bool(difference.norm() <= NEAR * t.norm())
        return [seconds]


def poison(dtype: torch.dtype) -> float:
    """A value that no input holds, and no result of inputs."""
    return math.nan if dtype.is_floating_point else torch.iinfo(dtype).max


def prepare(
    contestant: Implementation, inputs: Sequence[Tensor], mode: Mode
) -> Callable[[], Sequence[Tensor]]:
    """The call to time on ``inputs``: arguments, then a gradient. What comes before it is done
    here."""
    *arguments, gradient = inputs
    if mode == "forward":
        arguments = [t.detach() for t in arguments]
        return lambda: [contestant(*arguments)]
    if mode == "full":
        return lambda: torch.autograd.grad(contestant(*arguments), arguments, gradient)
    result = contestant(*arguments)
    return lambda: torch.autograd.grad(result, arguments, gradient)


def _check_memory(
    results: Sequence[Tensor],
    live: Sequence[Tensor],
    drawn: Sequence[Tensor],
    expected: Sequence[Tensor],
) -> None:
    inputs = {t.untyped_storage().data_ptr() for t in live}
    for result, t in zip(results, expected, strict=True):
        if (result.shape, result.dtype, result.device) != (t.shape, live[0].dtype, t.device):
            raise Rejected(f"a result is {result.dtype} {tuple(result.shape)} on {result.device}")
        if result.untyped_storage().data_ptr() in inputs:
            raise Rejected("a result shares memory with an input")
    if not all(torch.equal(t, value) for t, value in zip(live, drawn, strict=True)):
        raise Rejected("an input was changed")


def _largest(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.abs().max() for t in tensors]).cpu()
