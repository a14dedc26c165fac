# SPDX-License-Identifier: MIT
"""Run the programs of test_graphs.py on this machine's GPU: ``python -m tests.ptx.graphs_on_gpu``.

What a capture forbids must raise an error there, too, and right programs must have no error and the
plain loop's values. What a replay does wrong raises no error on most GPUs: this prints what happens.
Each program has a process of its own, since a failed capture can leave a context without use. The
status is 1 if a program that the emulator refuses is accepted, or one that it accepts is refused.
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.utils._pytree import tree_leaves

from . import test_graphs

SECONDS = 60  # of a program, compilation included
PARALLEL = 12


def run(kind: str, case: str) -> str:
    """What a program does on a GPU: "ran", or its error's first line."""
    try:
        if kind == "right":
            program = next(one for one in test_graphs.RIGHT if one.__name__ == case)
            found, expected = (tree_leaves(program(is_graphed)) for is_graphed in (True, False))
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other))
        elif kind == "misuse":
            test_graphs.MISUSES[case][0](torch.cuda.CUDAGraph())
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
        *[("right", program.__name__) for program in test_graphs.RIGHT],
    ]


def in_a_process(case: tuple[str, str]) -> str:
    command = [sys.executable, "-m", "tests.ptx.graphs_on_gpu", *case]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"no end within {SECONDS} s"
    printed = done.stdout.strip().splitlines()
    return printed[-1] if printed else f"ended with status {done.returncode}"


def main() -> int:
    cases = programs()
    with ThreadPoolExecutor(PARALLEL) as pool:
        found = list(pool.map(in_a_process, cases))
    others = 0
    for (kind, case), happened in zip(cases, found, strict=True):
        agrees = kind == "wrong" or (happened == "ran") == (kind == "right")
        others += not agrees
        print(f"{'' if agrees else 'OTHERWISE '}{kind}, {case}: {happened}")
    print(f"{len(cases)} programs, {others} of them otherwise than emulated")
    return min(others, 1)


if __name__ == "__main__":
    if sys.argv[1:]:
        print(run(*sys.argv[1:]))
    else:
        sys.exit(main())
