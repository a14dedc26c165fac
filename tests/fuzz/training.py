# SPDX-License-Identifier: MIT
"""Training runs on random meshes, killed at random moments, and resumed from damaged checkpoints.

A trial is one of five kinds:

- scaler: with loss scaling, random gradients overflow on random ranks of a random mesh: all ranks
  skip the same steps, and have the scales and losses of one process;
- replicas: a model with a replicated scale and a sparse embedding has on a random mesh the losses
  of one process; where a rank has only a part of the scale's gradient, it is refused by name;
- mesh: random layers on a random mesh of dp × tp × pp ranks have the losses of one process;
- kill: a run on one or two ranks is ended by SIGTERM, SIGHUP, SIGQUIT or SIGKILL, some times, and
  resumed to its end: the same bits as an undisturbed one, and no process and no shared memory is
  left behind;
- damage: bytes of its checkpoints are changed, cut off or removed: an older one is resumed from,
  with the same bits at the end, or one line names what is wrong.
"""

import atexit
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from functools import cache
from pathlib import Path

from driver import ROOT, Found, Refused, run
from fake_data import fashion_mnist
from replicated import Way, train_replicated
from saved import latest, same, steps, tensors
from scaled import OPTIMIZERS, train_scaled

from torchpar.errors import ConfigError
from torchpar.parallel.launch.local import PRELOAD, Ranks, fork_context

TRAIN = str(ROOT / "examples" / "train_parallel.py")
MODULES = [
    "torchpar.training",
    "torchpar.parallel.split.pipeline",
    "torchvision.datasets",
    "support.lesson",
]
# Two orders of float32 sums of at most 784 terms typically differ by √784·2⁻²⁴, in each of at most
# 5 layers and 16 steps; the learning rates below do not let a difference grow.
sharing = "ours"  # of `train_scaled`
kinds = ["scaler", "replicas", "mesh", "damage", "kill"]  # that are drawn
checks = True  # of `train_replicated`
TOLERANCE = 16 * 5 * math.sqrt(784) * 2.0**-24


@cache
def work() -> Path:
    """A folder for this process, with the data set."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    fashion_mnist(folder, train=204, test=37)
    return folder


@cache
def ranks() -> Ranks:
    fork_context([*PRELOAD, *MODULES, "commands"])
    started = Ranks()
    atexit.register(started.close)
    return started


def base() -> list[str]:
    flags = f"--dataset fashion-mnist --device cpu --timeout 60 --data {work()}"
    return flags.split()


def trial(rng: random.Random) -> str:
    kind = rng.choice(
        [one for one in (scaler, replicas, mesh, damage, kill) if one.__name__ in kinds]
    )
    try:
        return kind(rng)
    except Found as found:
        raise Found(f"{kind.__name__}: {found}") from None


# Meshes


def on_ranks(count: int, flags: list[str]) -> tuple[int, str]:
    """The exit status and stderr of train_parallel.py on ranks of this process's pool."""
    from commands import lesson

    outcomes = ranks().outcomes(count, lesson, "train_parallel", *flags)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise Found(f"{type(outcome).__name__} of a rank: {outcome}; {' '.join(flags)}")
    statuses = {status for status, _, _ in outcomes}
    if len(statuses) > 1:
        raise Found(f"ranks end with {statuses}; {' '.join(flags)}")
    return outcomes[0][0] or 0, outcomes[0][2]


def mesh(rng: random.Random) -> str:
    dp, tp, pp = rng.choice(
        [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (1, 2, 2), (2, 1, 2), (3, 1, 1), (1, 3, 1)]
    )
    hidden = [str(rng.choice([1, 2, 3, 7, 12, 33])) for _ in range(rng.randint(0, 3))]
    optimizer = rng.choice([["sgd", "0.05"], ["muon", "0.01"]])
    flags = [*base(), "--hidden", *hidden] if hidden else base()
    flags += ["--epochs", "2", "--batch-size", str(rng.choice([13, 51, 102])), "--pool", "2"]
    flags += ["--optimizer", optimizer[0], "--lr", optimizer[1], "--seed", str(rng.randrange(100))]
    if rng.random() < 0.3:
        flags += ["--clip", str(rng.choice([0.1, 1.0]))]
    if pp > 1:
        flags += [
            "--pipeline",
            rng.choice(["gpipe", "1f1b"]),
            "--micro-batches",
            str(rng.choice([1, 2, 5])),
        ]
    name = work() / uuid.UUID(int=rng.getrandbits(128)).hex
    of_one, of_many = Path(f"{name}-1.jsonl"), Path(f"{name}-n.jsonl")
    status, said = on_ranks(
        dp * tp * pp, [*flags, *f"--dp {dp} --tp {tp} --pp {pp} --metrics {of_many}".split()]
    )
    if status:
        one_line(said, flags)
        raise Refused(said)
    alone = [flag for flag in flags if flag not in ("gpipe", "1f1b", "--pipeline")]
    if "--micro-batches" in alone:
        del alone[(at := alone.index("--micro-batches")) : at + 2]
    if any(on_ranks(1, [*alone, "--metrics", str(of_one)])):
        raise Found(f"one process refuses what {dp} × {tp} × {pp} ranks take: {' '.join(flags)}")
    for one, many in zip(
        *(map(json.loads, path.read_text().splitlines()) for path in (of_one, of_many)), strict=True
    ):
        for key in ("train_loss", "test_loss"):
            if key in one and not math.isclose(one[key], many[key], rel_tol=TOLERANCE):
                raise Found(
                    f"{key} {many[key]} on {dp} × {tp} × {pp}, {one[key]} alone; {' '.join(flags)}"
                )
    return "mesh"


def scaler(rng: random.Random) -> str:
    mesh = rng.choice([{"tp": 2}, {"pp": 2}, {"dp": 2, "tp": 2}, {"tp": 2, "pp": 2}, {"tp": 3}])
    count, steps = math.prod(mesh.values()), 6
    name = rng.choice([*OPTIMIZERS])
    hidden = [rng.choice([3, 7, 12, 33]) for _ in range(rng.randint(4, 5))]
    overflows = {step: rng.randrange(count) for step in range(steps) if rng.random() < 0.3}
    options = (sharing, rng.random() < 0.5, (9, *hidden, 4), steps, rng.randrange(100))
    divided = ranks().outcomes(count, train_scaled, mesh, name, overflows, *options)
    of_one = dict.fromkeys(overflows, 0)
    (of_all,) = ranks().outcomes(1, train_scaled, {}, name, of_one, *options)
    what = f"{mesh}, {name}, {overflows}, {options}"
    for rank, log in enumerate(divided):
        if isinstance(log, BaseException) or isinstance(of_all, BaseException):
            raise Found(f"{log!r} on rank {rank}, {of_all!r} alone; {what}")
        for step, (found, expected) in enumerate(zip(log, of_all, strict=True)):
            if found[:2] != expected[:2]:
                raise Found(f"step {step}: {found} on rank {rank}, {expected} alone; {what}")
            if name != "sgd" or found.loss is None:  # the others let a rounding grow
                continue
            if not math.isclose(found.loss, expected.loss, rel_tol=TOLERANCE):
                raise Found(f"step {step}: {found} on rank {rank}, {expected} alone; {what}")
    return "scaler"


def replicas(rng: random.Random) -> str:
    mesh = rng.choice([{"tp": 2}, {"tp": 3}, {"dp": 2}, {"dp": 3}, {"dp": 2, "tp": 2}])
    way = Way(
        rng.choice(["before", "between", "after"]),
        adds_up=rng.random() < 0.5,
        sparse=rng.random() < 0.5,
        clips=rng.choice([0.0, 0.1, 100.0]),
        width=rng.choice([1, 3, 7, 12]),
        seed=rng.randrange(100),
        checks=checks,
    )
    divided = ranks().outcomes(math.prod(mesh.values()), train_replicated, mesh, way)
    (of_all,) = ranks().outcomes(1, train_replicated, {}, way)
    what = f"{mesh}, {way}"
    if isinstance(of_all, BaseException):
        raise Found(f"{of_all!r} alone; {what}")
    if way.place == "between" and not way.adds_up and "tp" in mesh:
        if not all(
            isinstance(one, ConfigError) and "of scale differs" in str(one) for one in divided
        ):
            raise Found(f"a part of a gradient is not refused: {divided}; {what}")
        raise Refused(str(divided[0]))
    for rank, losses in enumerate(divided):
        if isinstance(losses, BaseException):
            raise Found(f"{losses!r} on rank {rank}; {what}")
        for found, expected in zip(losses, of_all, strict=True):
            if not math.isclose(found, expected, rel_tol=TOLERANCE):
                raise Found(f"losses {losses} on rank {rank}, {of_all} alone; {what}")
    return "replicas"


def one_line(said: str, what: object) -> None:
    lines = [line for line in said.splitlines() if line.strip()]
    if "Traceback" in said or not lines or " error: " not in lines[-1]:
        raise Found(f"not one line: {said[-300:]!r}; {what}")


# Kills


def command(count: int, folder: Path) -> list[str]:
    launcher = [sys.executable]
    if count > 1:
        launcher += (
            f"-m torch.distributed.run --nproc_per_node={count} --standalone --monitor_interval=0.1"
        ).split()
    flags = [
        "--hidden",
        "33",
        "7",
        "--epochs",
        "4",
        "--batch-size",
        "51",
        "--save-every",
        "1",
        "--keep",
        "3",
    ]
    return [*launcher, TRAIN, *base(), *flags, "--checkpoint", str(folder)]


@cache
def undisturbed(count: int) -> Path:
    folder = work() / f"undisturbed-{count}"
    status, said = on_ranks(
        count, command(count, folder)[command(count, folder).index(TRAIN) + 1 :]
    )
    if status:
        raise Found(f"an undisturbed run ends with {status}: {said}")
    return folder


def left_behind(mark: str) -> dict[int, str]:
    """The numbers and commands of processes that have ``mark`` in their environment."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (process / "environ").read_bytes():
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")[:80]
    return found


def kill(rng: random.Random) -> str:
    count, mark = rng.choice([1, 1, 2]), uuid.UUID(int=rng.getrandbits(128)).hex
    expected = undisturbed(count)
    folder = work() / mark
    environment = os.environ | {"FUZZ_TRIAL": mark}
    shared = set(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else set()
    kills = rng.randint(1, 3)
    for life in range(kills + 1):
        with tempfile.TemporaryFile("w+") as err:
            process = subprocess.Popen(
                command(count, folder),
                stdout=err,
                stderr=err,
                env=environment,
                start_new_session=True,
            )
            try:
                sent = end_at_some_moment(process, folder, rng, mark) if life < kills else None
                status = process.wait(100)
            except subprocess.TimeoutExpired:
                raise Found(f"life {life} hangs after {sent}") from None
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            err.seek(0)
            said = err.read()
        if sent != signal.SIGKILL and "Traceback" in said and count == 1:
            raise Found(f"a traceback after {sent}: {said[-300:]!r}")
    if status:
        raise Found(f"the resumed run ends with {status}: {said[-300:]!r}")
    check_same(folder, expected)
    deadline = time.monotonic() + 10
    while remaining := left_behind(mark):
        if time.monotonic() > deadline:
            raise Found(f"left behind: {[*remaining.values()]}")
        time.sleep(0.1)
    if new := {name for name in os.listdir("/dev/shm") if "torchpar" in name} - shared:
        raise Found(f"left in shared memory: {new}")
    shutil.rmtree(folder)
    return "kill"


def end_at_some_moment(
    process: subprocess.Popen, folder: Path, rng: random.Random, mark: str
) -> signal.Signals:
    """Send a signal to a run: after a time, or a moment after it has saved another step."""
    sent = rng.choice([signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGKILL])
    until, before = time.monotonic() + rng.uniform(0, 12), latest(folder)
    by_step, delay = rng.random() < 0.7, rng.uniform(0, 0.2)
    while process.poll() is None:
        if latest(folder) != before if by_step else time.monotonic() > until:
            break
        time.sleep(0.001)
    time.sleep(delay)
    # The ranks of a killed torchrun receive SIGTERM, and save; here they get SIGKILL, too.
    for number in left_behind(mark) if sent == signal.SIGKILL else [process.pid]:
        with suppress(ProcessLookupError):
            os.kill(number, sent)
    return sent


def newest(folder: Path) -> Path:
    """The newest checkpoint. The file ``latest`` is for people: a run that has ended does not mend
    it."""
    return folder / [name for name in steps(folder) if not name.endswith(".tmp")][-1]


def check_same(folder: Path, expected: Path) -> None:
    ends = [newest(path) for path in (folder, expected)]
    if ends[0].name != ends[1].name:
        raise Found(f"ends at {ends[0].name}, expected {ends[1].name}")
    if not same(*map(tensors, ends)):
        raise Found("ends with other bits than an undisturbed run")
    if unfinished := [p.name for p in folder.iterdir() if p.name.endswith(".tmp")]:
        raise Found(f"left behind: {unfinished}")


# Damage


def damage(rng: random.Random) -> str:
    expected = undisturbed(1)
    folder = work() / uuid.UUID(int=rng.getrandbits(128)).hex
    shutil.copytree(expected, folder)
    done = []
    for _ in range(rng.randint(1, 3)):
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        if not files:
            break
        path = rng.choice(files)
        what = rng.choice(["flip", "cut", "remove", "empty", "append", "remove folder"])
        done.append(f"{what} {path.relative_to(folder)}")
        harm(path, what, rng)
    flags = command(1, folder)
    status, said = on_ranks(1, flags[flags.index(TRAIN) + 1 :])
    if status:
        one_line(said, done)
        shutil.rmtree(folder)
        raise Refused(said)
    try:
        check_same(folder, expected)
    except Found as found:
        raise Found(f"{found}, after {done}") from None
    shutil.rmtree(folder)
    return "damage"


def harm(path: Path, what: str, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if what == "flip" and data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif what == "cut":
        del data[rng.randrange(len(data) + 1) :]
    elif what == "empty":
        data.clear()
    elif what == "append":
        data += b"\0"
    if what == "remove":
        path.unlink()
    elif what == "remove folder" and path.parent.name.startswith("step-"):
        shutil.rmtree(path.parent)
    else:
        path.write_bytes(data)


def unverified() -> None:
    """Flip a bit of the model in an undisturbed run, so that others end with other bits."""
    global undisturbed, kinds
    kinds = ["damage", "kill"]
    right = undisturbed

    @cache
    def wrong(count: int) -> Path:
        from torch.distributed.checkpoint import load, save

        folder = right(count)
        state = tensors(folder / latest(folder))
        load(state, checkpoint_id=folder / latest(folder))
        name = next(name for name in state if name.startswith("model."))
        state[name].view(-1)[0] += 1
        save(state, checkpoint_id=folder / latest(folder))
        return folder

    undisturbed = wrong


def alone() -> None:
    """Let each rank skip the steps alone whose infinities it has found itself."""
    global sharing, kinds
    kinds = ["scaler"]
    sharing = "alone"


def parts() -> None:
    """Let a `Run` train with parts of gradients."""
    global checks, kinds
    kinds = ["replicas"]
    checks = False


if __name__ == "__main__":
    sys.exit(run(trial, {"bits": unverified, "alone": alone, "parts": parts}, limit=500))
