# SPDX-License-Identifier: MIT
"""Check that training has the published bits: ``python -m torchpar verify``.

It trains an MLP of 784-128-64-10 on MNIST for one epoch in exact arithmetic, or a small GPT on a book, on any
mesh of ranks. It compares the SHA-256 of the weights with the one in `EXPECTED`, which README and docs print.
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from torch import Tensor

from torchpar.data import Samples, batches, load
from torchpar.errors import ConfigError, TorchparError
from torchpar.exact import gpt
from torchpar.exact.gradients import ExactGradients
from torchpar.exact.layers import parallel_mlp
from torchpar.exact.loss import cross_entropy_sum
from torchpar.exact.sgd import ExactSGD
from torchpar.nn import MLP
from torchpar.parallel.launch.local import current_world, start_ranks
from torchpar.parallel.launch.world import World, is_communication_error
from torchpar.parallel.split.mlp import full_state_dict
from torchpar.parallel.split.pipeline import Pipeline, stage_mlp
from torchpar.parts import part_of
from torchpar.training.optimizers import lr_scheduler, sgd

EXPECTED = {
    "mlp": "1ca4bd19b4f8a9c76c57e5d7b6009f3d2a37deee3617f5897308312b2a0f28cd",
    "gpt": "3f22f13732989e3c7b94b05c63440e4d6922c78cede712b830b128f722ccc40c",
}
SIZES = (784, 128, 64, 10)
BATCH_SIZE = 128
MICRO_BATCHES = 4
DATA = Path(__file__).parents[2] / "examples" / "data"  # of a checkout


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m torchpar verify", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=EXPECTED, default="mlp", help="a network for digits, or for text")
    parser.add_argument("--ranks", type=int, help="number of ranks to start; by default tp times pp")
    parser.add_argument("--tp", type=int, default=1, help="ranks that share each layer")
    parser.add_argument("--pp", type=int, default=1, help="stages of a pipeline")
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to train")
    parser.add_argument("--data", type=Path, default=DATA, help="folder that holds MNIST/raw and alice.txt")
    options = parser.parse_args(arguments)
    try:
        return verify(**vars(options))
    except TorchparError as e:
        reason = str(e)
    except RuntimeError as e:
        if not isinstance(e, BrokenProcessPool) and not is_communication_error(e):
            raise
        reason = "a rank was killed, or has ended in an error; run it again"
    except KeyboardInterrupt:
        print("python -m torchpar verify: interrupted", file=sys.stderr)
        return 130
    print(f"python -m torchpar verify: error: {reason}", file=sys.stderr)
    return 2


def verify(model: str, ranks: int | None, tp: int, pp: int, threads: int, device: str, data: Path) -> int:
    """Train, print the SHA-256 of the weights, and return 0 if it is the expected one, else 1."""
    stages = tp * pp
    ranks = stages if ranks is None else ranks
    for name, number in {"tp": tp, "pp": pp, "ranks": ranks, "threads": threads}.items():
        if number < 1:
            raise ConfigError(f"--{name} is {number}, expected at least 1")
    if model == "gpt" and pp > 1:
        raise ConfigError(f"--pp is {pp}, expected 1 for the GPT, which has no pipeline")
    if model == "gpt" and gpt.HEADS % tp:
        raise ConfigError(f"--tp is {tp}, expected a divisor of the GPT's {gpt.HEADS} heads")
    if pp > len(SIZES) - 1:
        raise ConfigError(f"--pp is {pp}, expected at most {len(SIZES) - 1}, one stage for each layer")
    if ranks % stages:
        raise ConfigError(f"--ranks is {ranks}, expected a multiple of --tp {tp} times --pp {pp}")
    start = time.perf_counter()
    with start_ranks(ranks, threads, device=device) as started:
        train = trained_gpt if model == "gpt" else trained_weights
        digest = started.run(train, ranks // stages, tp, pp, data)[0]
    mesh = f"dp {ranks // stages} × tp {tp} × pp {pp}"
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"{mesh} on {device}, {capability}, torch {torch.__version__}: {time.perf_counter() - start:.0f} s")
    print(f"SHA-256 of the weights: {digest}")
    same = digest == EXPECTED[model]
    print("This is the published hash." if same else f"The published hash is {EXPECTED[model]}.")
    return 0 if same else 1


def trained_weights(dp: int, tp: int, pp: int, folder: Path) -> str:
    """Train on this rank of the mesh; return the SHA-256 of all weights and biases."""
    world = current_world().with_mesh(dp=dp, tp=tp, pp=pp)
    loaded: list[Samples] = []
    world.gather_results(lambda: loaded.extend(load("mnist", folder, world.device)))
    train = loaded[0]
    torch.manual_seed(0)
    whole = parallel_mlp(MLP(SIZES).to(world.device), world.mesh["tp"])
    model = stage_mlp(whole, world.mesh["pp"])
    exact_gradients = ExactGradients(model, world)
    pipeline = Pipeline(model, world, "1f1b", MICRO_BATCHES, exact_gradients) if pp > 1 else None
    optimizer = sgd(model, lr=0.5, momentum=0.9, weight_decay=3e-5, kind=ExactSGD)
    scheduler = lr_scheduler(optimizer, "linear", -(-len(train) // BATCH_SIZE))
    for x, labels, global_size in batches(train, BATCH_SIZE, seed=0, epoch=1, share=world.share):
        if pipeline is not None:
            pipeline.step(x, labels, global_size, cross_entropy_sum)
        else:
            (cross_entropy_sum(model(x), labels) / global_size).backward()
            exact_gradients()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return digest(model, world)


def trained_gpt(dp: int, tp: int, pp: int, folder: Path) -> str:
    """Train the GPT on this rank of the mesh; return the SHA-256 of all parameters."""
    world = current_world().with_mesh(dp=dp, tp=tp, pp=pp)
    path = folder / "alice.txt"
    if not path.exists():
        raise ConfigError(f"{path} does not exist, expected the book in the examples' data; give --data")
    *_, (_, model) = gpt.train(path, world)
    own = {name: (part_of(p), p.detach().cpu()) for name, p in model.named_parameters()}
    own = {name: (part._replace(mesh=None), t) for name, (part, t) in own.items()}
    whole: dict[str, Tensor] = {}
    for of_rank in world.gather_results(lambda: own):
        for name, (part, t) in of_rank.items():
            part.narrow(whole.setdefault(name, torch.empty(part.whole))).copy_(t)
    return _sha256(whole)


def digest(model: torch.nn.Module, world: World) -> str:
    """The SHA-256 of the whole model's parameters by name, as float32 in little-endian order."""
    state = {name: t.cpu() for name, t in full_state_dict(model).items()}
    stages = world.gather_results(lambda: state if world.dp_rank == world.tp_rank == 0 else {})
    return _sha256({name: t for stage in stages for name, t in stage.items()})


def _sha256(state: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name, t in sorted(state.items()):
        total.update(name.encode() + t.contiguous().numpy().astype("<f4").tobytes())
    return total.hexdigest()
