# SPDX-License-Identifier: MIT
"""Check that training has the published bits: ``python -m torchpar verify``.

The command trains a small MLP on pictures, or a small GPT on a text, in `torchpar.exact.mode` on
any mesh of ranks. Pictures and text are drawn, so that an installed package needs no files. Or it
trains as the lesson `train_ddp.py` does, on MNIST. The SHA-256 of the weights is compared with the
hash in `EXPECTED`, which README and docs print.
"""

import argparse
import sys
import time
from collections import ChainMap
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from torchpar.errors import ConfigError, TorchparError
from torchpar.exact.verify import models
from torchpar.exact.verify.weights import sha256_of
from torchpar.parallel.launch.local import Ranks, set_variables
from torchpar.parallel.launch.processes import Terminated, terminable
from torchpar.parallel.launch.world import World, is_communication_error, join_world
from torchpar.parallel.split.parts import part_of
from torchpar.parallel.split.reduction import all_gather

EXPECTED = {
    "mlp": "bc4ee285d71761b56caa7f8a0cb6e357e7a23bb0a3b925ca8c22ddecc176b2ab",
    "gpt": "33c93356a4181f9399bd854c2aa1d90562e46228f03563b16653c851a99be63e",
    "lesson": "2bb2d512580ae20aa69164cbe005668d762d665563751d88913cfe3bb1de2f77",
}
DATA = Path(__file__).parents[3] / "examples" / "data"  # in a checkout
MOST = 64  # processes, each of a quarter of a gigabyte; also the most threads


class Plan(NamedTuple):
    """The model, the mesh and the device of a training."""

    model: str
    dp: int = 1
    tp: int = 1
    pp: int = 1
    device: str = "cpu"
    threads: int = 1
    port: int = 0
    data: Path = DATA


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m torchpar verify",
        description="Train in exact arithmetic, and compare the weights' hash with the published "
        "one.",
    )
    parser.add_argument(
        "--model",
        choices=EXPECTED,
        default="mlp",
        help="a network for pictures, or for text, or the lesson train_ddp.py",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=DATA,
        help="folder of MNIST for the lesson, as torchvision's root; in a checkout its examples' "
        "data",
    )
    parser.add_argument(
        "--ranks", type=int, help="number of ranks to start; by default tp times pp"
    )
    parser.add_argument("--tp", type=int, default=1, help="ranks over which each layer is sharded")
    parser.add_argument("--pp", type=int, default=1, help="stages of a pipeline")
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to train")
    options = parser.parse_args(arguments)
    try:
        with terminable():
            return verify(**vars(options))
    except TorchparError as e:
        reason = str(e)
    except RuntimeError as e:
        if not isinstance(e, BrokenProcessPool) and not is_communication_error(e):
            raise
        reason = "a rank was killed, or has ended in an error; run it again"
    except Terminated as e:
        print(f"python -m torchpar verify: {e}", file=sys.stderr)
        return e.status
    except KeyboardInterrupt:
        print("python -m torchpar verify: interrupted", file=sys.stderr)
        return 130
    print(f"python -m torchpar verify: error: {reason}", file=sys.stderr)
    return 2


def verify(
    model: str, data: Path, ranks: int | None, tp: int, pp: int, threads: int, device: str
) -> int:
    """Train, print the SHA-256 of the weights, and return 0 if it is the published hash, else 1."""
    ranks = _check(model, data, ranks, tp, pp, threads)
    start = time.perf_counter()
    plan = Plan(model, ranks // (tp * pp), tp, pp, device, threads, get_free_port(), data)
    digest = _train_on_ranks(plan, ranks)
    capability = torch.backends.cpu.get_cpu_capability()
    where = f"dp {plan.dp} × tp {tp} × pp {pp} on {device}, {capability}"
    print(f"{where}, torch {torch.__version__}: {time.perf_counter() - start:.0f} s")
    print(f"SHA-256 of the weights: {digest}")
    same = digest == EXPECTED[model]
    if same:
        print("This is the published hash.")
    else:
        print(
            f"The published hash is {EXPECTED[model]}. The bits differ here; please report this "
            "output, with that of: python -m torchpar doctor"
        )
    return 0 if same else 1


def _check(model: str, data: Path, ranks: int | None, tp: int, pp: int, threads: int) -> int:
    """The number of ranks; a ConfigError where the model has no such mesh, or no data."""
    stages = tp * pp
    ranks = stages if ranks is None else ranks
    for name, number in {"tp": tp, "pp": pp, "ranks": ranks, "threads": threads}.items():
        if number < 1:
            raise ConfigError(f"--{name} is {number}, expected at least 1")
        if number > MOST:
            raise ConfigError(f"--{name} is {number}, expected at most {MOST}, on this one machine")
    if model == "lesson" and stages > 1:
        flag = f"--tp is {tp}" if tp > 1 else f"--pp is {pp}"
        raise ConfigError(f"{flag}, expected 1 for the lesson, whose ranks have the whole model")
    if model == "lesson" and not (data / "MNIST").is_dir():
        raise ConfigError(
            f"--data is {data}, expected the folder that has MNIST, as torchvision's root; give "
            "that of a checkout, examples/data"
        )
    if model == "gpt" and pp > 1:
        raise ConfigError(f"--pp is {pp}, expected 1 for the GPT, which has no pipeline")
    if model == "gpt" and models.HEADS % tp:
        raise ConfigError(f"--tp is {tp}, expected a divisor of the GPT's {models.HEADS} heads")
    if pp > len(models.SIZES) - 1:
        raise ConfigError(
            f"--pp is {pp}, expected at most {len(models.SIZES) - 1}, one stage for each layer"
        )
    if ranks % stages:
        raise ConfigError(f"--ranks is {ranks}, expected a multiple of --tp {tp} times --pp {pp}")
    return ranks


def _train_on_ranks(plan: Plan, ranks: int) -> str:
    """Start the ranks, and return the SHA-256 of rank 0."""
    try:
        with Ranks(preload=()) as pool:
            pool.start(ranks)
            calls = enumerate(pool.workers)
            futures = [worker.submit(_trained_on_rank, rank, plan) for rank, worker in calls]
            digest, *_ = [future.result() for future in futures]
    except OSError as e:  # no folder for temporary files, or too many open files
        raise ConfigError(
            f"the ranks cannot be started ({e}); take fewer ranks, or look at TMPDIR and ulimit -a"
        ) from e
    return digest


def _trained_on_rank(rank: int, plan: Plan) -> str:
    torch.set_num_threads(plan.threads)
    set_variables(rank, plan.dp * plan.tp * plan.pp, MASTER_PORT=str(plan.port))
    with join_world(plan.device, timeout=300.0) as world:
        return trained(world, plan)


def trained(world: World, plan: Plan) -> str:
    """Train on this rank; return the SHA-256 of the unsharded model's parameters by name."""
    world = world.with_mesh(dp=plan.dp, tp=plan.tp, pp=plan.pp)
    network: torch.nn.Module
    if plan.model == "lesson":
        network = models.train_lesson(world, plan.data)
    else:
        network = models.train_mlp(world) if plan.model == "mlp" else models.train_gpt(world)
    parameters = {
        name: (all_gather(p, part_of(p)) if part_of(p).is_slice else p).detach().cpu()
        for name, p in network.named_parameters()
    }
    return sha256_of(ChainMap(*world.gather_results(lambda: parameters)).items())
