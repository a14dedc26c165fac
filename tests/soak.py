# SPDX-License-Identifier: MIT
"""Kill ranks of a run at random moments, many times; compare its end bit for bit with an undisturbed run.

    python tests/soak.py --kills 100

A third of the kills fall on a step, a third on a save, a third on the start of the processes.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fake_data import fashion_mnist
from faults import TRAIN, latest, losses, same, tensors, torchrun, workers


def choose_moment(folder: Path, generator: random.Random, ended: Callable[[], bool]) -> None:
    """Wait for the moment of the next kill."""
    where = generator.choice(["step", "save", "start"])
    deadline = time.monotonic() + 60

    def wait_for(condition: Callable[[], bool]) -> None:
        while not condition() and time.monotonic() < deadline and not ended():
            time.sleep(0.0005)

    for _ in range(0 if where == "start" else generator.randint(1, 6)):
        before = latest(folder)
        wait_for(lambda before=before: latest(folder) != before)
    if where == "save":
        wait_for(lambda: any(folder.glob("step-*.tmp")))
    else:
        time.sleep(generator.uniform(0, 3.0 if where == "start" else 0.03))


def disturbed(command: list[str], folder: Path, wanted: int, generator: random.Random) -> tuple[int, ...]:
    """Return the numbers of kills, of starts of the ranks, and of damaged checkpoints that were skipped."""
    kills = starts = refused = 0
    known: set[int] = set()
    while True:
        with tempfile.TemporaryFile("w+") as said:
            process = torchrun(f"--max_restarts={wanted}", *command, stderr=said)
            while process.poll() is None and kills < wanted:
                choose_moment(folder, generator, lambda process=process: process.poll() is not None)
                ranks = workers(process.pid)
                if not ranks or process.poll() is not None:
                    time.sleep(0.01)
                    continue
                starts += not known & set(ranks)
                known |= set(ranks)
                victim = generator.choice(ranks)
                os.kill(victim, signal.SIGKILL)
                kills += 1
                while victim in workers(process.pid):
                    time.sleep(0.005)
            process.communicate()
            said.seek(0)
            refused += said.read().count(" is damaged")
        if process.returncode == 0:
            return kills, starts, refused


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    args = parser.parse_args(argv)
    began, root = time.monotonic(), Path(tempfile.mkdtemp(prefix="soak-"))
    fashion_mnist(root / "FashionMNIST" / "raw", train=600, test=100)
    epochs = 3 + 2 * args.kills  # of 12 steps; a life of the ranks takes 1 to 10
    flags = f"--dataset fashion-mnist --device cpu --hidden 33 7 --batch-size 50 --epochs {epochs}"
    train = [TRAIN, *flags.split(), "--timeout", "30", "--data", str(root), "--save-every", "1"]
    of = {}
    for name in ("undisturbed", "disturbed"):
        of[name] = [*train, "--checkpoint", str(root / name), "--metrics", f"{root / name}.jsonl"]
    process = torchrun(*of["undisturbed"])
    _, err = process.communicate()
    assert process.returncode == 0, err
    kills, starts, refused = disturbed(
        [*of["disturbed"], "--async-save"], root / "disturbed", args.kills, random.Random(args.seed)
    )
    last = latest(root / "undisturbed")
    identical = latest(root / "disturbed") == last
    identical = identical and same(*(tensors(root / name / last) for name in of))
    identical = identical and len({tuple(losses(Path(f"{root / name}.jsonl"))) for name in of}) == 1
    print(
        f"{kills} kills | {starts} starts | {refused} refused checkpoints | "
        f"{(time.monotonic() - began) / 60:.1f} minutes | {'identical' if identical else 'NOT IDENTICAL'}"
    )
    if not identical or kills < args.kills:
        print(f"what was saved is in {root}", file=sys.stderr)
        return 1
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
