# SPDX-License-Identifier: MIT
"""Print what Triton's interpreter says of each fault: ``python nogpu/tests/interpreted.py``.

A fault may end the interpreter or run forever, so each has a process of its own. What the memory of
`torch.empty` holds is left to chance, so that a fault of the class "uninitialised" may give right
values.
"""

import os
import subprocess
import sys
import warnings
from pathlib import Path

SECONDS = 20


def judge(name: str) -> str:
    """What happens when a fault runs in this process."""
    import torch
    from faults import FAULTS

    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always", RuntimeWarning)  # NumPy's, of arithmetic
        try:
            pairs = FAULTS[name].run()
        except Exception as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
    right = all(torch.equal(found.double(), expected.double()) for found, expected in pairs)
    said = [str(one.message) for one in noted if one.category is RuntimeWarning]
    return ", ".join(["nothing" if right else "wrong values", *said])


def interpret(name: str) -> str:
    """What Triton's interpreter says of a fault, or that it does not end."""
    command = [sys.executable, __file__, name]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"does not end within {SECONDS} s"
    if done.returncode:
        return f"the process ends with status {done.returncode}"
    return done.stdout.strip()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    if len(sys.argv) > 1:
        print(judge(sys.argv[1]))
    else:
        from faults import FAULTS

        for name, fault in FAULTS.items():
            print(f"| {name} | {fault.kind} | {interpret(name)} |", flush=True)
