# SPDX-License-Identifier: MIT
"""Run the tests' programs of graphs on this machine's GPU: ``python -m graphs_on_gpu``.

What a capture forbids must raise an error there, too, and right programs must have no error and the
plain loop's values. What a replay does wrong raises no error on a GPU: this prints what happens.
Each program has a process of its own, as a failed capture can spoil what follows. The status is 1
if a program that the emulator refuses is accepted, or one that it accepts is refused.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection

import test_graphs
import test_graphs_host
import test_graphs_reads
import test_graphs_streams
import test_graphs_values
import torch
from torch.utils._pytree import tree_leaves

SECONDS = 40  # of a program, compilation included
AT_A_TIME = 14
# Kinds that the emulator names, and of which a GPU says nothing.
SILENT = ("wrong", "beside", "unordered")


def run(kind: str, case: str) -> str:
    """Run a program on a GPU: "ran", or its error's first line."""
    try:
        CALLS[kind](case)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return "ran"


# What replays compute as the functions do: their captures spoil nothing, and share a process.
CAPTURED = [
    ("operators", test_graphs_reads.CAPTURED),
    ("pairs", {name: other for name, (_, other) in test_graphs_reads.PAIRS.items()}),
]


def right(case: str) -> None:
    program = next(one for one in test_graphs.RIGHT if one.__name__ == case)
    found, expected = (tree_leaves(program(is_graphed)) for is_graphed in (True, False))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other))


def captured(case: str) -> None:
    for name, function in dict(CAPTURED)[case].items():
        try:
            test_graphs_reads.check_captured(function)
        except Exception as error:
            raise RuntimeError(f"{name}: {error!r}") from error


def read_back(case: str) -> None:
    (reads, _), x = test_graphs_reads.PAIRS[case], test_graphs_reads.values()
    reads(x)  # so that a capture has nothing to load
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        reads(x)


def refused(case: str) -> None:
    x, i = torch.ones(4, device="cuda"), torch.full((4,), 99, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        test_graphs_values.REFUSED[case][0](x, i)


CALLS: dict[str, Callable[[str], object]] = {
    "right": right,
    "captured": captured,
    "reads": read_back,
    "refused": refused,
    "copied": test_graphs_host.captured,
    "kept": lambda case: list(test_graphs_host.kept(case)),
    "misuse": lambda case: test_graphs.MISUSES[case][0](torch.cuda.CUDAGraph()),
    "forbidden": lambda case: test_graphs.FORBIDDEN[case][0](),
    "wrong": lambda case: test_graphs.WRONG[case][0](),
    "beside": lambda case: test_graphs_streams.FORGOTTEN[case][0](),
    "stale": lambda case: test_graphs_streams.STALE[case][0](),
    "fresh": lambda case: test_graphs_streams.fresh(int(case)),
    "unordered": lambda case: test_graphs_streams.RACES[case][0](),
}


def programs() -> list[tuple[str, str]]:
    """Return the kinds and names of the programs; first those that no GPU has run."""
    return [
        *[("captured", case) for case, _ in CAPTURED],
        *[("reads", case) for case in test_graphs_reads.PAIRS],
        *[("copied", case) for case in test_graphs_host.REFUSED],
        *[("kept", case) for case in test_graphs_host.KEPT],
        *[("refused", case) for case in test_graphs_values.REFUSED],
        *[("beside", case) for case in test_graphs_streams.FORGOTTEN],
        *[("stale", case) for case in test_graphs_streams.STALE],
        *[("fresh", str(case)) for case in range(len(test_graphs_streams.FRESH))],
        *[("unordered", case) for case in test_graphs_streams.RACES],
        *[("forbidden", case) for case in test_graphs.FORBIDDEN],
        *[("misuse", case) for case in test_graphs.MISUSES],
        *[("wrong", case) for case in test_graphs.WRONG],
        *[("right", program.__name__) for program in test_graphs.RIGHT],
    ]


def send(result: Connection, kind: str, case: str) -> None:
    result.send(run(kind, case))


def in_processes(cases: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Run each program; forked from this process, which has no context of the GPU."""
    fork = get_context("fork")
    for first in range(0, len(cases), AT_A_TIME):
        started = []
        for case in cases[first : first + AT_A_TIME]:
            result, end = fork.Pipe(duplex=False)
            process = fork.Process(target=send, args=(end, *case), daemon=True)
            process.start()
            end.close()
            started.append((process, result))
        for process, result in started:
            try:
                yield result.recv() if result.poll(SECONDS) else f"no end within {SECONDS} s"
            except EOFError:
                process.join()
                yield f"ended with status {process.exitcode}"
            process.kill()


def main() -> int:
    cases = programs()
    others = 0
    for (kind, case), happened in zip(cases, in_processes(cases), strict=True):
        is_captured = kind in ("right", "kept", "captured", "fresh")
        agrees = kind in SILENT or (happened == "ran") == is_captured
        others += not agrees
        print(f"{'' if agrees else 'OTHERWISE '}{kind}, {case}: {happened}")
    print(f"{len(cases)} programs, {others} of them otherwise than emulated")
    return min(others, 1)


if __name__ == "__main__":
    sys.exit(main())
