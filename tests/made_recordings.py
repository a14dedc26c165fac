# SPDX-License-Identifier: MIT
"""Recordings of steps that nobody ran: of a pipeline by rule, and odd ones.

A tensor's pass takes a unit of time forward and two backward, and a message a fifth of a unit.
"""

from collections.abc import Mapping, Sequence
from typing import Any

UNIT, TRAVEL = 400.0, 80.0  # microseconds
WEIGHTS, ACTIVATION = 400_000, 250_000  # bytes
KINDS = {
    "forward": {"name": "forward pass", "color": "#3f87c9"},
    "backward": {"name": "backward pass", "color": "#dd7733"},
    "optimizer": {"name": "optimizer", "color": "#ad6cc2"},
    "wait": {"name": "waiting", "color": "#888888"},
    "message": {"name": "message", "color": "#46a36b"},
}
MEMORY = {"weights": "#3f87c9", "gradients": "#dd7733", "activations": "#46a36b"}
LOOP = "https://example.com/train_pipeline.py#L188"


def order(schedule: str, rank: int, ranks: int, parts: int) -> list[tuple[str, int]]:
    """The passes of a rank: all forward ones first (gpipe), or each backward one soon (1f1b)."""
    ahead = parts if schedule == "gpipe" else min(parts, ranks - rank)
    passes = [("forward", n) for n in range(ahead)]
    for n in range(parts):
        passes.append(("backward", n))
        if ahead + n < parts:
            passes.append(("forward", ahead + n))
    return passes


def timed(schedule: str, ranks: int, parts: int) -> dict[tuple[int, str, int], tuple[float, float]]:
    """When each pass begins and ends, by rank, direction and part of the batch."""
    orders = [order(schedule, rank, ranks, parts) for rank in range(ranks)]
    free, found = [0.0] * ranks, {}
    while any(orders):
        for rank, left in enumerate(orders):
            while left:
                kind, part = left[0]
                before = rank - 1 if kind == "forward" else rank + 1
                needs = (before, kind, part)
                if 0 <= before < ranks and needs not in found:
                    break
                begin = free[rank]
                if needs in found:
                    begin = max(begin, found[needs][1] + TRAVEL)
                free[rank] = begin + UNIT * (1 + (kind == "backward"))
                found[(rank, kind, part)] = begin, free[rank]
                left.pop(0)
    return found


def box(kind: str, name: str, pid: int, ts: float, dur: float, **args: Any) -> dict[str, Any]:
    row = int(kind == "message")
    event = {"ph": "X", "cat": kind, "name": name, "pid": pid, "tid": row, "ts": ts, "dur": dur}
    return event | {"args": args}


def pipeline(
    ranks: int = 2, parts: int = 4, schedule: str = "1f1b", steps: int = 1, layers: int = 1
) -> dict[str, Any]:
    """A recording of steps of a pipeline, each stage of which has some layers."""
    times = timed(schedule, ranks, parts)
    length = max(end for _, end in times.values()) + 2 * UNIT
    events: list[dict[str, Any]] = []
    for rank in range(ranks):
        name = {"name": f"rank {rank}", "text": f"stage {rank + 1} of {ranks}"}
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": name})
        for tid, row in enumerate(("compute", "messages")):
            args = {"name": row}
            event = {"ph": "M", "name": "thread_name", "pid": rank, "tid": tid, "args": args}
            events.append(event)
    for step in range(steps):
        zero = step * (length + 50)
        for rank in range(ranks):
            events += of_rank(times, rank, ranks, zero, zero + length, layers, step)
    seconds = [
        sum(e["dur"] for e in events if e.get("cat") == kind and e["pid"] == rank) / 1000 / steps
        for rank in range(ranks)
        for kind in ("forward", "backward", "wait")
    ]
    cells = [f"{one:.3f}" for one in seconds]
    rows = [[f"{rank}", *cells[3 * rank : 3 * rank + 3]] for rank in range(ranks)]
    columns = ["rank", "forward", "backward", "waiting"]
    share = 100 * sum(seconds[2::3]) / (length / 1000) / ranks
    facts = {
        "replay": 1,
        "title": f"train_pipeline.py, {schedule}",
        "command": f"torchrun --nproc_per_node={ranks} examples/train_pipeline.py --replay a.html",
        "about": ["AMD EPYC, family 26, model 2", "clock: one machine's, error below 1 µs"],
        "kinds": KINDS,
        "memory": MEMORY,
        "steps": [[n * (length + 50), n * (length + 50) + length] for n in range(steps)],
        "tables": [{"title": "Milliseconds a step", "columns": columns, "rows": rows}],
        "remarks": [f"The ranks wait for {share:.1f}% of the step: this is the pipeline's bubble."],
        "unit": "ms",
    }
    return {"traceEvents": events, "otherData": facts}


def of_rank(
    times: Mapping[tuple[int, str, int], tuple[float, float]],
    rank: int,
    ranks: int,
    zero: float,
    end: float,
    layers: int,
    step: int,
) -> list[dict[str, Any]]:
    """The events of a rank in a step that begins at ``zero``."""
    mine = sorted((span, kind, part) for (one, kind, part), span in times.items() if one == rank)
    events, free, held = [], zero, 0
    line = {"line": "examples/train_pipeline.py:188", "url": LOOP}

    def memory(ts: float, gradients: int) -> None:
        args = {"weights": WEIGHTS, "gradients": gradients, "activations": held * ACTIVATION}
        events.append({"ph": "C", "name": "memory", "pid": rank, "ts": ts, "args": args})

    memory(zero, 0)
    for (begin, stop), kind, part in mine:
        begin, stop = zero + begin, zero + stop
        forward = kind == "forward"
        before, after = (rank - 1, rank + 1) if forward else (rank + 1, rank - 1)
        tensor = f"{'activation' if forward else 'gradient'} of micro-batch {part}"
        of = f"{step}.{kind}.{part}"
        if begin > free:
            text = f"Rank {rank} waits for the {tensor}, which rank {before} sends."
            events.append(
                box("wait", "wait", rank, free, begin - free, text=text, id=f"{of}.{before}")
            )
        facts = {"tensor": tensor, "bytes": ACTIVATION}
        if 0 <= before < ranks:
            text = f"Rank {rank} receives the {tensor} from rank {before}."
            args = facts | {"id": f"{of}.{before}", "role": "recv", "operation": "recv"}
            at = min(max(free, begin - TRAVEL), begin)
            events.append(box("message", f"recv {part}", rank, at, begin - at, text=text, **args))
        text = f"The {kind} pass of micro-batch {part}: y = relu(x Wᵀ + b), x (64, 512)."
        name = f"{kind} {part}"
        events.append(box(kind, name, rank, begin, stop - begin, text=text, **line))
        for n in range(layers if layers > 1 else 0):
            each = (stop - begin) / layers
            events.append(
                box(kind, f"layers.{n}", rank, begin + n * each, each, text="y = x Wᵀ", **line)
            )
        if 0 <= after < ranks:
            text = f"Rank {rank} sends the {tensor} to rank {after}."
            args = facts | {"id": f"{of}.{rank}", "role": "send", "operation": "send"}
            events.append(box("message", f"send {part}", rank, stop, TRAVEL, text=text, **args))
        held += 1 if forward else -1
        memory(stop, 0 if forward else WEIGHTS)
        free = stop
    rest = end - UNIT / 2 - free
    events.append(box("wait", "wait", rank, free, rest, text="The other ranks are not done."))
    facts = {"id": f"{step}.all", "role": "all", "tensor": "gradients", "bytes": WEIGHTS}
    facts["operation"] = "all_reduce"
    events.append(box("message", "all_reduce", rank, free, end - UNIT / 2 - free, **facts))
    events.append(box("optimizer", "SGD", rank, end - UNIT / 2, UNIT / 2, text="W = W - lr G"))
    return events


def tiny(*events: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """A recording of these events alone."""
    return {"traceEvents": [*events], "otherData": {"replay": 1, **facts}}


def hostile() -> dict[str, Any]:
    """One rank, no message and no memory, and texts that are markup or of other alphabets."""
    text = "</script><script>alert(1)</script> & <b>{{data}}</b> $& 𝛁 勾配"
    color = "red;} body { background: url(https://example.com/x)"
    return tiny(
        {"ph": "M", "name": "process_name", "pid": 7, "args": {"name": text, "text": text}},
        box("odd", text, 7, 0.0, 10.0, text=text, line=text, url="javascript:alert(1)"),
        box("odd", "inner", 7, 0.0, 5.0),
        box("odd", "empty", 7, 10.0, 0.0),
        {"ph": "i", "cat": "fault", "name": text, "pid": 7, "tid": 0, "ts": 4.0, "args": {}},
        title=text,
        command=text,
        about=[text],
        remarks=[text],
        kinds={"odd": {"name": text, "color": color}},
        tables=[{"title": text, "columns": [text], "rows": [[text]]}],
    )


def fault() -> dict[str, Any]:
    """A launch of two programs whose two accesses of one word race, in cycles; one has warps."""
    mark = {"ph": "i", "cat": "fault", "name": "race", "tid": 0}
    return tiny(
        *(
            {"ph": "M", "name": "process_name", "pid": n, "args": {"name": f"program {n}"}}
            for n in (0, 1)
        ),
        *(
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": n, "args": {"name": f"warp {n}"}}
            for n in range(3)
        ),
        box("global memory", "st.global", 0, 100.0, 40.0, text="writes y[0]"),
        box("global memory", "ld.global", 1, 160.0, 40.0, text="reads y[0]"),
        mark | {"pid": 0, "ts": 100.0, "args": {"id": "race", "text": "the write"}},
        mark | {"pid": 1, "ts": 160.0, "args": {"id": "race", "text": "the read"}},
        kinds={
            "global memory": {"name": "global memory", "color": "#3f87c9"},
            "fault": {"name": "fault", "color": "#dd3333"},
        },
        title="race.py",
        unit="cycles",
    )


def both() -> Sequence[Mapping[str, Any]]:
    """Two schedules of one pipeline, for one page."""
    return [pipeline(4, 4, "gpipe"), pipeline(4, 4, "1f1b")]
