# SPDX-License-Identifier: MIT
"""Programs of several ranks by NCCL on GPUs, beside the same programs by gloo on the CPUs.

    python tests/ranks_on_gpus.py OUT

needs two GPUs; `benchmarks/validate_gpu.sh OUTDIR nccl` runs it. Meshes of 4 and of 8 ranks are
tried where there are as many GPUs. Each part runs on the GPUs and on the CPUs at the same time. It
is judged in one of four ways:

    bits      both print the same SHA-256 of the weights
    float32   the losses of both differ by at most `TOLERANCES`
    bfloat16  the same, with a Muon that multiplies in bfloat16
    killed    rank 0 ends by itself after rank 1 was killed, and one line says who is missing

OUT/ranks.jsonl gets a line for each part, and OUT/logs what each run printed. The status is 0 if
all is right, 1 if not, 2 if there is nothing to run on.

``--device cpu`` rehearses it, with gloo on both sides. ``--device emulated`` does so with kernels
that nogpu executes; one GPU is emulated for each rank, and gloo connects the ranks.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from torchpar import exact
from torchpar.exact.verify.weights import sha256_of
from torchpar.optim import Muon
from torchpar.parallel import World, join_world

ROOT = Path(__file__).parents[1]
SELF = str(Path(__file__).resolve())
# A training begins at a loss of about log 10. A relative error e in all of its steps moves the
# later losses by about e times this. A gradient in float32 is a sum of at most 1024 terms, each of
# which rounds once. An update of Muon is rounded to bfloat16.
TOLERANCES = {"float32": 1024 * 2**-24 * math.log(10), "bfloat16": 2**-8 * math.log(10)}
HASH = re.compile(r"SHA-256 of the weights[^:\n]*: ([0-9a-f]{64})$", re.MULTILINE)
BACKEND = re.compile(r"^(\w+) connects the ranks on ", re.MULTILINE)
BY_NCCL = "NCCL version "  # which it prints when it connects ranks, if NCCL_DEBUG is VERSION
SECONDS = 100  # of a run
ALL_SECONDS = 445  # after these no part begins
BOUND = 40  # seconds of a rank after the end of another, whose --timeout is 10
VERIFY = "torchpar verify"


class Part(NamedTuple):
    """A program of several ranks."""

    name: str
    judge: str
    script: str
    flags: str = ""
    ranks: int = 2


DDP, MESH = "examples/train_ddp.py", "examples/train_parallel.py"
FEW = "--epochs 1 --samples 8192"
STEPS = f"{FEW} --batch-size 256"  # 32 steps: a graph is captured after 11
PARTS = [
    Part("Muon's exchanges", "bits", SELF),
    Part("DDP", "bfloat16", DDP, STEPS),
    Part("DDP, one graph", "bfloat16", DDP, f"{STEPS} --graph"),
    Part("DDP, SGD", "float32", DDP, f"{STEPS} --plain"),
    Part("tensor parallel", "float32", "examples/train_tensor_parallel.py", FEW),
    Part("pipeline, 1f1b", "float32", "examples/train_pipeline.py", FEW),
    Part("pipeline, gpipe", "float32", "examples/train_pipeline.py", f"{FEW} --pipeline gpipe"),
    Part("exact.DataParallel", "bits", VERIFY, "--ranks 2"),
    Part("exact.linear", "bits", VERIFY, "--tp 2"),
    Part("exact pipeline", "bits", VERIFY, "--pp 2"),
    Part("exact Muon", "bits", DDP, f"{FEW} --arithmetic exact"),
    Part("a killed rank", "killed", MESH, "--dp 2 --epochs 1000 --samples 2048 --timeout 10"),
    Part("mesh, dp 2", "bfloat16", MESH, f"{FEW} --optimizer muon --dp 2"),
    Part("mesh, tp 2", "bfloat16", MESH, f"{FEW} --optimizer muon --tp 2"),
    Part("mesh, pp 2", "bfloat16", MESH, f"{FEW} --optimizer muon --pp 2"),
    Part("mesh, dp 2 tp 2", "bfloat16", MESH, f"{FEW} --optimizer muon --dp 2 --tp 2", 4),
    Part("exact, dp 2 tp 2", "bits", VERIFY, "--ranks 4 --tp 2", 4),
    Part("mesh, all", "bfloat16", MESH, f"{FEW} --optimizer muon --dp 2 --tp 2 --pp 2", 8),
]


def command(part: Part, device: str) -> list[str]:
    """Return how a part is started on a device: "cuda", "cpu" or "emulated"."""
    flags = [*part.flags.split(), "--device", "cpu" if device == "cpu" else "cuda"]
    if part.script == VERIFY:
        return [sys.executable, "-m", *VERIFY.split(), *flags]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={part.ranks}"]
    if device == "emulated":
        torchrun += ["--no-python", sys.executable, "-m", "nogpu", "--cuda-is-cpu"]
    return [sys.executable, *torchrun, part.script, *flags]


def run(part: Part, device: str, log: Path) -> dict[str, Any]:
    """Run a part, and return its seconds, losses and hashes, or why it failed."""
    if part.judge == "killed":
        return run_killed(part, device, log)
    words, metrics = command(part, device), log.with_suffix(".jsonl")
    if part.script.startswith("examples"):
        words += ["--metrics", str(metrics)]
    environment = os.environ | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5", "NCCL_DEBUG": "VERSION"}
    start = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        status = ended(process, SECONDS, grace=10)
    found: dict[str, Any] = {"seconds": round(time.monotonic() - start, 1)}
    text = log.read_text(errors="replace")
    if status != 0:
        why = f"status {status}" if status is not None else f"no end within {SECONDS} s"
        last = next((line for line in reversed(text.splitlines()) if "rror" in line), "")
        return found | {"reason": f"{why}: {last.strip()[:300]}"}
    if BY_NCCL in text:
        found["backend"] = "nccl"
    elif connected := BACKEND.search(text):
        found["backend"] = connected[1]
    if hashes := HASH.findall(text):
        found["hashes"] = hashes
    if metrics.exists():
        lines = map(json.loads, metrics.read_text().splitlines())
        of_epochs = [line for line in lines if "train_loss" in line]
        found["losses"] = [line[name] for line in of_epochs for name in ("train_loss", "test_loss")]
    return found


def run_killed(part: Part, device: str, log: Path) -> dict[str, Any]:
    """Kill rank 1 once it trains, and return how rank 0 ends; no launcher ends it."""
    metrics, ranks = log.with_suffix(".jsonl"), range(part.ranks)
    words = [sys.executable]
    words += ["-m", "nogpu", "--cuda-is-cpu"] if device == "emulated" else []
    words += [part.script, *part.flags.split(), "--metrics", str(metrics)]
    words += ["--device", "cpu" if device == "cpu" else "cuda"]
    shared = {"WORLD_SIZE": part.ranks, "LOCAL_WORLD_SIZE": part.ranks, "OMP_NUM_THREADS": 1}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": get_free_port()}
    metrics.unlink(missing_ok=True)
    with log.open("w") as file:
        processes = [
            subprocess.Popen(
                words,
                cwd=ROOT,
                env=os.environ
                | {name: str(value) for name, value in shared.items()}
                | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
                stderr=file if rank == 0 else subprocess.DEVNULL,
            )
            for rank in ranks
        ]
        try:
            deadline = time.monotonic() + SECONDS
            while not (metrics.exists() and metrics.stat().st_size):
                if time.monotonic() > deadline or processes[0].poll() is not None:
                    return {"reason": f"no epoch was trained, see {log.name}"}
                time.sleep(0.1)
            processes[1].kill()
            start = time.monotonic()
            status = ended(processes[0], BOUND, grace=0)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    lines = log.read_text(errors="replace").splitlines()
    named = [line for line in lines if "rank 1 does not answer" in line]
    found = {"seconds": round(time.monotonic() - start, 1), "status": status, "lines": len(lines)}
    if status is None:
        return found | {"reason": f"rank 0 has not ended {BOUND} s after rank 1 was killed"}
    if len(named) != 1:
        return found | {"reason": f"{len(named)} lines name rank 1, expected one"}
    return found | {"line": named[0]}


def ended(process: "subprocess.Popen[bytes]", seconds: float, grace: float) -> int | None:
    """Wait for a process, and return its status; None if it had to be ended."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(grace)
            except subprocess.TimeoutExpired:
                process.kill()


def judged(part: Part, gpus: dict[str, Any], cpus: dict[str, Any], device: str = "cuda") -> str:
    """Return what is wrong with a part, or ""."""
    for where, found in (("on the GPUs", gpus), ("on the CPUs", cpus)):
        if "reason" in found:
            return f"{where}: {found['reason']}"
    if part.judge == "killed":
        return ""
    what = "hashes" if part.judge == "bits" else "losses"
    ours, expected = gpus.get(what, []), cpus.get(what, [])
    if not ours or len(ours) != len(expected):
        return f"{len(ours)} {what} on the GPUs, and {len(expected)} on the CPUs"
    if device == "cuda" and (backend := gpus.get("backend", "no backend")) != "nccl":
        return f"{backend} is seen to connect the ranks on the GPUs, expected nccl"
    return "" if ours == expected else difference(part.judge, ours, expected)


def difference(kind: str, ours: list[Any], expected: list[Any]) -> str:
    """Return what differs by more than it may, or ""."""
    if kind == "bits":
        return "the hashes differ"
    distances = [abs(one - other) for one, other in zip(ours, expected, strict=True)]
    most = TOLERANCES[kind]
    if all(distance <= most for distance in distances):  # which NaN is not
        return ""
    return f"losses differ by {max(distances):.2g}, expected at most {most:.2g}"


# Muon's exchanges: matrices of which each rank has a part, and others


def exchange(device: str) -> None:
    """Take steps of Muon on matrices that lie on the ranks in three ways, and print hashes."""
    with join_world(device, timeout=60.0) as world:
        if world.rank == 0:
            print(f"{torch.distributed.get_backend()} connects the ranks on {world.device.type}")
        begun, reached, expected = matrices(), steps(world, ""), steps(world, "", is_exact=True)
        for how in ("all sharded", "some sharded", "replicas"):
            found = steps(world, how, is_exact=True)
            if not all(map(torch.equal, found, expected)):
                raise SystemExit(f"error: {how}, exact: not the bits of whole matrices")
            if world.rank == 0:
                named = [(str(n), t) for n, t in enumerate(found)]
                print(f"SHA-256 of the weights, {how}: {sha256_of(named)}")
            for ours, whole, first in zip(steps(world, how), reached, begun, strict=True):
                # Matrices of a batch round in another way than one alone.
                off, way = (ours - whole).norm(), (whole - first.weight.detach()).norm()
                if not off <= 0.03 * way:
                    raise SystemExit(f"error: {how}: off by {off / way:.2g} of the way")


def matrices() -> nn.Sequential:
    torch.manual_seed(0)
    sizes = pairwise((48, 32, 64, 17))
    return nn.Sequential(*(nn.Linear(*one, bias=False) for one in sizes))


def steps(world: World, how: str, is_exact: bool = False) -> list[torch.Tensor]:
    """Return the whole weights after two steps with drawn gradients, on the CPU."""
    model, generator = matrices().to(world.device), torch.Generator().manual_seed(1)
    for i, layer in enumerate(model):
        if how == "all sharded" or (how == "some sharded" and i == 1):
            fully_shard(layer, mesh=world.mesh["dp"])
    group = torch.distributed.group.WORLD if how == "replicas" else None
    optimizer = Muon(model.parameters(), lr=0.05, process_group=group)
    for _ in range(2):  # the second one with a momentum
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(world.device)
            if isinstance(p, DTensor):
                p.grad = distribute_tensor(p.grad, p.device_mesh, p.placements, src_data_rank=None)
        with exact.mode() if is_exact else nullcontext():
            optimizer.step()
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [p.detach().cpu().clone() for p in whole]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("ranks_on_gpus.py")
    parser.add_argument("out", type=Path, nargs="?", help="folder of the results")
    parser.add_argument("--device", choices=("cuda", "cpu", "emulated"), default="cuda")
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART")
    options = parser.parse_args(arguments)
    if options.out is None:  # a rank, which torchrun has started
        exchange(options.device)
        return 0
    most = torch.cuda.device_count() if options.device == "cuda" else 2
    if most < 2:
        gpus = "1 GPU" if most else "no GPU"
        print(f"ranks_on_gpus.py: PyTorch finds {gpus}, expected 2 or more", file=sys.stderr)
        return 2
    logs = options.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    began, wrong = time.monotonic(), 0
    with (options.out / "ranks.jsonl").open("w") as table, ThreadPoolExecutor(2) as pool:
        for part in PARTS:
            if part.name not in options.parts or part.ranks > most:
                continue
            stem = re.sub(r"\W+", "_", part.name)
            sides: dict[str, dict[str, Any]] = {"gpus": {}, "cpus": {}}
            if time.monotonic() - began > ALL_SECONDS:
                reason = f"not begun within {ALL_SECONDS} s"
            else:
                devices = {"gpus": options.device, "cpus": "cpu"}
                calls = {
                    side: pool.submit(run, part, device, logs / f"{stem}.{side}.txt")
                    for side, device in devices.items()
                }
                sides = {side: call.result() for side, call in calls.items()}
                reason = judged(part, **sides, device=options.device)
            wrong += bool(reason)
            row = {"part": part.name, "ranks": part.ranks, "device": options.device}
            row |= {"judge": part.judge, **sides, "ok": not reason, "reason": reason}
            print(json.dumps(row), file=table, flush=True)
            print(f"{part.name:20}{part.judge:10}{shown(sides['gpus']):40}{reason or 'right'}")
    print(f"{wrong} of {len(options.parts)} parts wrong")
    return min(wrong, 1)


def shown(found: dict[str, Any]) -> str:
    """Return a run's result as text of the table."""
    results = found.get("hashes") or found.get("losses") or []
    values = [one[:8] if isinstance(one, str) else f"{one:.6f}" for one in results]
    return f"{found.get('seconds', '')} s  {' '.join(values)}"


if __name__ == "__main__":
    sys.exit(main())
