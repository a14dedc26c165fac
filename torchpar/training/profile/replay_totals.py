# SPDX-License-Identifier: MIT
"""Totals of a recorded step: tables of times, messages and bytes, and sentences on its bounds."""

from collections.abc import Sequence
from typing import Any

from torchpar.training.profile.recorded_ranks import (
    KINDS,
    MEMORY,
    Message,
    RankSteps,
    RecordedStep,
    Wait,
    innermost,
)

COMPUTING = ("data", "forward", "loss", "backward", "optimizer")
OUTSIDE, BESIDE = "outside", "before and after its part"
COST = 0.05  # the share of a step above which the page says that recording slows it down


class Totals:
    """Tables and sentences on one step.

    Args:
        limits: when the step begins on its first rank, and ends on its last.
    """

    def __init__(
        self,
        ranks: Sequence[RankSteps],
        steps: Sequence[RecordedStep],
        limits: tuple[float, float],
        waits: Sequence[Wait],
    ):
        self._ranks, self._steps, self._waits = ranks, steps, waits
        self._seconds = limits[1] - limits[0]
        self._by_kind = [_in_turn(step, limits) for step in steps]

    def tables(self) -> list[dict[str, Any]]:
        kinds = [kind for kind in KINDS if kind != "message"]
        rows = [
            [
                str(one.rank),
                *(f"{1e3 * times[k]:.3f}" for k in kinds),
                f"{1e3 * times['']:.3f}",
                f"{1e3 * times[OUTSIDE]:.3f}",
                f"{1e3 * self._seconds:.3f}",
            ]
            for one, times in zip(self._ranks, self._by_kind, strict=True)
        ]
        columns = ["rank", *(KINDS[k][0] for k in kinds), "other code", BESIDE, "sum"]
        tables = [
            {
                "title": "Milliseconds of the step of median duration",
                "columns": columns,
                "rows": rows,
            }
        ]
        messages = self._messages()
        if messages:
            columns = [
                "rank",
                "dimension",
                "operation",
                "count",
                "bytes",
                "ms",
                "share without a wait",
            ]
            tables.append(
                {"title": "Messages of the same step", "columns": columns, "rows": messages}
            )
        memory = self._memory()
        if memory:
            columns = ["rank", *MEMORY, "most at a time"]
            tables.append(
                {
                    "title": "Bytes, the most of each kind in a step",
                    "columns": columns,
                    "rows": memory,
                }
            )
        return tables

    def _messages(self) -> list[list[str]]:
        rows = []
        for one, step in zip(self._ranks, self._steps, strict=True):
            kinds = dict.fromkeys((m.dimension, m.operation) for m in step.messages)
            for kind in kinds:
                found = [m for m in step.messages if (m.dimension, m.operation) == kind]
                ms = 1e3 * sum((m.end or m.start) - m.start for m in found)
                hidden = self._hidden(step, found)
                rows.append(
                    [
                        str(one.rank),
                        kind[0] or "several",
                        kind[1],
                        str(len(found)),
                        f"{sum(m.bytes for m in found):,}",
                        f"{ms:.3f}",
                        f"{hidden:.0%}",
                    ]
                )
        return rows

    def _hidden(self, step: RecordedStep, messages: Sequence[Message]) -> float:
        """The share of the messages' time in which the rank does not wait."""
        total = sum((m.end or m.start) - m.start for m in messages)
        waiting = sum(
            max(0.0, min(box.end, m.end or m.start) - max(box.start, m.start))
            for m in messages
            for box in step.boxes
            if box.kind == "wait"
        )
        return max(0.0, 1 - waiting / total) if total else 1.0

    def _memory(self) -> list[list[str]]:
        rows = []
        for one, step in zip(self._ranks, self._steps, strict=True):
            if step.memory:
                most = [max(m[name] for _, m in step.memory) for name in MEMORY]
                at_once = max(sum(m.values()) for _, m in step.memory)
                rows.append([str(one.rank), *(f"{n:,}" for n in most), f"{at_once:,}"])
        return rows

    def remarks(self) -> list[str]:
        ms = 1e3 * self._seconds
        found = [
            "From the first rank's beginning to the last one's end, this step of median "
            f"duration takes {ms:.3f} ms. {self._cost()}"
        ]
        found += self._bubble()
        if self._waits:
            found.append(self._bound())
        else:
            longest = max(COMPUTING, key=lambda k: max(times[k] for times in self._by_kind))
            share = max(times[longest] for times in self._by_kind) / self._seconds
            found.append(f"No rank waits. The {KINDS[longest][0]} takes most, {share:.0%}.")
        return found

    def _cost(self) -> str:
        one = self._ranks[0]
        if not one.recorded or not one.plain:
            return ""
        (least, most), (least_plain, most_plain) = (
            (1e3 * min(seconds), 1e3 * max(seconds)) for seconds in (one.recorded, one.plain)
        )
        took = (
            f"On rank {one.rank} alone {len(one.recorded)} recorded steps took {least:.3f} to "
            f"{most:.3f} ms, and {len(one.plain)} others {least_plain:.3f} to {most_plain:.3f} ms."
        )
        if least > (1 + COST) * most_plain:  # beyond what steps differ anyway
            took += (
                f" So recording takes more than {COST:.0%} of a step, and shares of the time are "
                "less sure than in longer steps."
            )
        return took

    def _bubble(self) -> list[str]:
        stages = max((one.place.get("pp", 0) for one in self._ranks), default=0) + 1
        if stages == 1:
            return []
        by_stage: list[list[tuple[float, ...]]] = [[] for _ in range(stages)]
        kept, at_once = [0] * stages, [0] * stages
        for one, step, times in zip(self._ranks, self._steps, self._by_kind, strict=True):
            stage = one.place["pp"]
            by_stage[stage].append(tuple(times[k] / self._seconds for k in ("wait", "", OUTSIDE)))
            kept[stage] = max([kept[stage], *(m["activations"] for _, m in step.memory)])
            at_once[stage] = max(at_once[stage], _micro_batches_at_once(step))
        # Where each stage is one rank, it is called a rank.
        name = "rank" if stages == len(self._ranks) else "stage"
        shares = []
        for stage, found in enumerate(by_stage):
            # Rounded first, so that the sum is that of the shown parts.
            parts = [round(100 * sum(part) / len(found)) for part in zip(*found, strict=True)]
            waiting, other, outside = parts
            shares.append(
                f"on {name} {stage} {sum(parts)}% of the step ({waiting}% waiting, {other}% in "
                f"other code, {outside}% {BESIDE})"
            )
        m = 1 + max(
            b.key[2] for step in self._steps for b in step.boxes if b.kind == "forward" and b.key
        )
        ideal = (stages - 1) / (m + stages - 1)
        sentences = [
            f"The layers are cut into {stages} stages, and a batch into {m} micro-batches, so that "
            "the stages can work at the same time. A number in parentheses is a micro-batch's.",
            "The bubble is the time in which a rank waits or runs other code: "
            f"{', '.join(shares)}. With p = {stages} stages of equal work, m = {m} micro-batches, "
            f"and messages that take no time, it would be (p − 1)/(m + p − 1) = {ideal:.0%}: a "
            "stage has no work while the first micro-batch is on its way to it, and the last "
            "gradient on its way back.",
        ]
        if any(kept):
            each = ", ".join(
                f"on {name} {stage} of at most {count} micro-batch{'es' * (count > 1)} at a time, "
                f"{most:,} bytes"
                for stage, (count, most) in enumerate(zip(at_once, kept, strict=True))
            )
            sentences.append(
                "Activations are kept from a micro-batch's forward pass to its backward pass: "
                f"{each}."
            )
        return sentences

    def _bound(self) -> str:
        worst = max(self._waits, key=lambda wait: wait.end - wait.start)
        seconds = worst.end - worst.start
        waiting = sum(times["wait"] for times in self._by_kind) / len(self._by_kind)
        reason = (
            f"Rank {worst.late} {worst.begins} {1e3 * (worst.ready - worst.start):.3f} ms after "
            f"that wait began, and then it takes {1e3 * (worst.end - worst.ready):.3f} ms."
            if worst.late is not None
            else "All of its ranks had begun it before."
        )
        return (
            f"The ranks wait for {waiting / self._seconds:.0%} of the step on average. The message "
            f"that bounds the step most is the {worst.message.operation} of {worst.what}: rank "
            f"{worst.rank} waits {1e3 * seconds:.3f} ms for it, {seconds / self._seconds:.0%} of "
            f"the step. {reason}"
        )


def _micro_batches_at_once(step: RecordedStep) -> int:
    """The most micro-batches that are between their forward and their backward pass."""
    spans: dict[int, list[float]] = {}
    for box in step.boxes:
        if box.key is not None and box.kind in ("forward", "backward"):
            spans.setdefault(box.key[2], []).extend((box.start, box.end))
    ends = [(min(times), max(times)) for times in spans.values()]
    return max((sum(a <= start < b for a, b in ends) for start, _ in ends), default=0)


def _in_turn(step: RecordedStep, limits: tuple[float, float]) -> dict[str, float]:
    """Seconds of each kind, of the innermost box at each time.

    "" is for the time outside of boxes, and `OUTSIDE` for that before and after the rank's part.
    """
    totals = dict.fromkeys([*KINDS, "", OUTSIDE], 0.0)
    own = max(step.start, limits[0]), min(step.end, limits[1])
    for box, start, end in innermost(step, own):
        totals[box.kind if box else ""] += end - start
    totals[OUTSIDE] = own[0] - limits[0] + limits[1] - own[1]
    return totals
