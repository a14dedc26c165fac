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
from contextlib import suppress
from pathlib import Path

from fake_data import fashion_mnist
from faults import TRAIN, latest, losses, same, tensors, torchrun, wait_for


def choose_moment(folder: Path, generator: random.Random, ended: Callable[[], bool]) -> None:
    """Wait for the moment of the next kill."""
    where = generator.choice(["step", "save", "start"])
    for _ in range(0 if where == "start" else generator.randint(1, 6)):
        before = latest(folder)
        wait_for(lambda before=before: ended() or latest(folder) != before)
    if where == "save":
        wait_for(lambda: ended() or any(folder.glob("step-*.tmp")))
    else:
        time.sleep(generator.uniform(0, 3.0 if where == "start" else 0.03))


def workers(launcher: int) -> list[int]:
    """Return the processes of the living ranks that a torchrun started."""

    def is_rank(child: str) -> bool:
        with suppress(OSError):  # it has ended
            return "\0RANK=" in Path(f"/proc/{child}/environ").read_text()
        return False

    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text()
    return [int(child) for child in children.split() if is_rank(child)]


def disturbed(
    command: list[str], world_size: int, folder: Path, wanted: int, generator: random.Random
) -> tuple[int, ...]:
    """Return the numbers of kills, of starts of the ranks, and of damaged checkpoints that were skipped."""
    kills = starts = 0
    known: set[int] = set()
    with tempfile.TemporaryFile("w+") as said:
        process = torchrun(
            f"--nproc_per_node={world_size}", f"--max_restarts={wanted}", *command, stderr=said
        )
        while process.poll() is None and kills < wanted:
            choose_moment(folder, generator, lambda: process.poll() is not None)
            if process.poll() is None and (ranks := workers(process.pid)):
                starts += not known & set(ranks)
                known |= set(ranks)
                victim = generator.choice(ranks)
                os.kill(victim, signal.SIGKILL)
                kills += 1
                while victim in workers(process.pid):
                    time.sleep(0.005)
        process.communicate()
        said.seek(0)
        err = said.read()
    assert process.returncode == 0, err
    return kills, starts, err.count(" is damaged")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args(argv)
    began, root = time.monotonic(), Path(tempfile.mkdtemp(prefix="soak-"))
    fashion_mnist(root / "FashionMNIST" / "raw", train=600, test=100)
    epochs = 3 + 2 * args.kills  # of 12 steps; a life of the ranks takes 1 to 10
    flags = f"--dataset fashion-mnist --device cpu --hidden 33 7 --batch-size 50 --epochs {epochs}"
    train = [TRAIN, *flags.split(), "--timeout", "30", "--data", str(root), "--save-every", "1"]
    of = {}
    for name, wanted in (("undisturbed", 0), ("disturbed", args.kills)):
        command = [*train, "--checkpoint", str(root / name), "--metrics", f"{root / name}.jsonl"]
        of[name] = disturbed([*command, "--async-save"], args.ranks, root / name, wanted, random.Random(0))
    kills, starts, refused = of["disturbed"]
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
