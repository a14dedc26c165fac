# SPDX-License-Identifier: MIT
"""Run random trials for a time, and print what reproduces each one that fails.

A trial is a function of a `random.Random`, which is seeded with the seed and the trial's number. It
returns where all is right, and raises `Refused` where the library refuses as it documents. Any
other error is a failure.
"""

import argparse
import faulthandler
import hashlib
import math
import os
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATHS = [str(ROOT / folder) for folder in (".", "examples", "tests", "nogpu/tests", "tests/fuzz")]
# The scripts run without pytest, which sets these; processes that they start find them in the
# environment.
sys.path[:0] = PATHS
os.environ["PYTHONPATH"] = os.pathsep.join([*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402  # after the environment is set
import torch  # noqa: E402  # likewise

Trial = Callable[[random.Random], str | None]


class Refused(Exception):
    """A refusal that the documentation names."""


class Found(AssertionError):
    """A result or an error that breaks a promise."""


def run(trial: Trial, faults: Mapping[str, Callable[[], None]], limit: float = 120) -> None:
    """Parse the command line, run trials, and exit with status 1 if one fails.

    ``faults`` are named faults of the library, which ``--fault`` plants to show that the trials
    notice them. A trial that takes longer than ``limit`` seconds ends the process with a traceback.
    """
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seconds", type=float, help="in place of --minutes")
    parser.add_argument(
        "--trials", type=int, help="stop after this number, if the time has not ended before"
    )
    parser.add_argument("--trial", type=int, help="run this one alone, with its traceback")
    parser.add_argument("--until-failure", action="store_true", help="stop after the first failure")
    parser.add_argument(
        "--fault", choices=sorted(faults), help="plant a fault, which the trials must find"
    )
    parser.add_argument(
        "--by-cpp", action="store_true", help="let C++ play the operators' calls on CPU tensors"
    )
    flags = parser.parse_args()
    for name, least in (("minutes", 0), ("seconds", 0), ("trials", 1), ("trial", 0)):
        value = getattr(flags, name)
        if value is not None and not least <= value < math.inf:
            parser.error(f"--{name} is {value}, expected a number from {least} on")
    if flags.by_cpp:
        import played  # noqa: F401  # pytest's plugin, which lets C++ play
    # The scripts import PyTorch before this file, and PyTorch reads the variable only then.
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if flags.fault:
        faults[flags.fault]()
    seconds = 60 * flags.minutes if flags.seconds is None else flags.seconds
    end, number, counts, digest = (
        time.monotonic() + seconds,
        flags.trial or 0,
        Counter(),
        hashlib.sha256(),
    )
    while True:
        if sys.stderr.isatty():  # a process that dies has named the trial
            print(f"\rtrial {number} ", end="", file=sys.stderr, flush=True)
        outcome = attempt(trial, flags.seed, number, limit, verbose=flags.trial is not None)
        counts[outcome.split()[0]] += 1
        digest.update(f"{number} {outcome}\n".encode())
        number += 1
        if flags.trial is not None or number == flags.trials or time.monotonic() > end:
            break
        if flags.until_failure and counts["failed"]:
            break
    total = sum(counts.values())
    print(
        f"{total} trials | {counts['refused']} refused | {counts['failed']} failed | "
        f"seed {flags.seed} | digest {digest.hexdigest()[:16]}"
    )
    sys.exit(counts["failed"] > 0)


def attempt(trial: Trial, seed: int, number: int, limit: float, *, verbose: bool) -> str:
    """The outcome of one trial: "passed" and its digest, "refused" or "failed"."""
    for seeding in (torch.manual_seed, random.seed, np.random.seed):
        seeding(random.Random(f"{number} {seed}").getrandbits(32))
    faulthandler.dump_traceback_later(limit, exit=True)
    try:
        return f"passed {trial(random.Random(f'{seed} {number}'))}"
    except Refused as error:
        if verbose:
            print(f"refused: {error}")
        return "refused"
    except Exception as error:
        line = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
        print(
            f"\rtrial {number} failed, to repeat it: --seed {seed} --trial {number}\n    {line}",
            flush=True,
        )
        if verbose:
            traceback.print_exc()
        return "failed"
    finally:
        faulthandler.cancel_dump_traceback_later()
