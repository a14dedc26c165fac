# SPDX-License-Identifier: MIT
"""Run the tests' programs of graphs on this machine's GPU: ``python -m graphs_on_gpu``.

What a capture forbids must raise an error there, too, and right programs must have no error and the
plain loop's values. What a replay does wrong raises no error on a GPU: this prints what happens.
Each program has a process of its own, as a failed capture can spoil what follows. The status is 1
if a program that the emulator refuses is accepted, or one that it accepts is refused.
"""

import sys
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection

import test_graphs
import test_graphs_host
import torch
from torch.utils._pytree import tree_leaves

SECONDS = 40  # of a program, compilation included
AT_A_TIME = 12


def run(kind: str, case: str) -> str:
    """Run a program on a GPU: "ran", or its error's first line."""
    try:
        if kind == "right":
            program = next(one for one in test_graphs.RIGHT if one.__name__ == case)
            found, expected = (tree_leaves(program(is_graphed)) for is_graphed in (True, False))
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other))
        elif kind == "misuse":
            test_graphs.MISUSES[case][0](torch.cuda.CUDAGraph())
        elif kind == "copied":
            test_graphs_host.captured(case)
        elif kind == "kept":
            list(test_graphs_host.kept(case))
        else:
            table = test_graphs.FORBIDDEN if kind == "forbidden" else test_graphs.WRONG
            table[case][0]()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return "ran"


def programs() -> list[tuple[str, str]]:
    return [
        *[("forbidden", case) for case in test_graphs.FORBIDDEN],
        *[("misuse", case) for case in test_graphs.MISUSES],
        *[("wrong", case) for case in test_graphs.WRONG],
        *[("copied", case) for case in test_graphs_host.REFUSED],
        *[("kept", case) for case in test_graphs_host.KEPT],
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
        agrees = kind == "wrong" or (happened == "ran") == (kind in ("right", "kept"))
        others += not agrees
        print(f"{'' if agrees else 'OTHERWISE '}{kind}, {case}: {happened}")
    print(f"{len(cases)} programs, {others} of them otherwise than emulated")
    return min(others, 1)


if __name__ == "__main__":
    sys.exit(main())
