# SPDX-License-Identifier: MIT
"""Run the conformance kit on every installed Muon: ``python -m benchmarks run optimizers``.

Each optimizer is compared with its own step on whole matrices, in all situations of `torchpar.testing`. What
others get wrong is a finding; the status is 1 only if torchpar's own Muon has a fault. All have their own
defaults, except for the learning rate and the weight decay.
"""

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.command import Command, run
from benchmarks.results import Result, Table, print_results, track
from torchpar.testing import SITUATIONS, check_optimizer

LR, WEIGHT_DECAY = 0.02, 0.0
TIMEOUT = 60.0  # seconds for a situation
QUICK = ("whole", "Shard(0)")
FAULTS = ("wrong", "hangs", "crashes")
# Their weights are plain tensors, of which an optimizer other than ours cannot know that they are slices.
OUR_LAYERS = ("ColumnParallelLinear", "RowParallelLinear")


class Library(NamedTuple):
    """A published optimizer.

    Attributes:
        package: as pip calls it.
        path: module and class.
        promises: about parameters that several ranks share, and where this is said.
        options: arguments beside the learning rate and the weight decay.
        nesterov: whether it has this argument.
        in_group: whether the arguments go into the parameter group, with ``use_muon``.
        decay: the name of the argument for the weight decay.
        orthogonal: whether its updates are meant to be orthogonal; otherwise they are adapted afterwards.
        one_process: whether it says that it is for one process; the others' situations are then left out.
    """

    package: str
    path: str
    promises: str
    options: dict[str, Any] = {}  # noqa: RUF012, nobody changes it
    nesterov: bool = True
    in_group: bool = False
    decay: str = "weight_decay"
    orthogonal: bool = True
    one_process: bool = False


FSDP2 = "FSDP2 (docstring)"
DTENSOR = "FSDP and tensor-parallel meshes (readme)"
LIBRARIES = {
    "torchpar": Library("torchpar", "torchpar.optim:Muon", "every placement (docs/muon.md)"),
    "torchpar, standard": Library(
        "torchpar", "torchpar.optim:Muon", "every placement (docs/muon.md)", {"ns": "standard"}
    ),
    "torch": Library("torch", "torch.optim:Muon", "nothing"),
    "pytorch_optimizer Muon": Library("pytorch-optimizer", "pytorch_optimizer:Muon", FSDP2, in_group=True),
    "pytorch_optimizer AdaMuon": Library(
        "pytorch-optimizer", "pytorch_optimizer:AdaMuon", FSDP2, {}, False, True, orthogonal=False
    ),
    "pytorch_optimizer NorMuon": Library(
        "pytorch-optimizer", "pytorch_optimizer:NorMuon", "nothing", in_group=True, orthogonal=False
    ),
    "pytorch_optimizer DistributedMuon": Library(
        "pytorch-optimizer", "pytorch_optimizer:DistributedMuon", "replicas (docstring)", in_group=True
    ),
    "timm": Library("timm", "timm.optim:Muon", "DTensors, FSDP2 (readme, changes)", in_group=True),
    "heavyball": Library("heavyball", "heavyball:Muon", "DDP, FSDP (readme)"),
    "muon-fsdp2": Library("muon-fsdp2", "muon_fsdp2:Muon", "FSDP2, 1-D meshes (source)", in_group=True),
    "muon-optimizer": Library("muon-optimizer", "muon:Muon", "replicas (source)", nesterov=False),
    "dtensor-muon": Library("dtensor-muon", "dtensor_muon:Muon", DTENSOR, decay="wd"),
    "muonium": Library("muonium", "muonium:Muon", DTENSOR, decay="wd"),
    "optimuon": Library("optimuon", "optimuon:Muon", "replicas (readme)", orthogonal=False),
    "optimuon, distributed": Library(
        "optimuon", "optimuon:Muon", "replicas (readme)", {"distributed": True}, orthogonal=False
    ),
    "omnimuon": Library(
        "omnimuon", "omnimuon:Muon", "DDP, FSDP, without communication (readme)", {"matrix_lr": LR}
    ),
    "emerging-optimizers": Library(
        "emerging-optimizers", "emerging_optimizers.orthogonalized_optimizers:Muon", "nothing"
    ),
    "gram-newton-schulz": Library(
        *("gram-newton-schulz", "gram_newton_schulz:Muon", "one GPU only (docstring)"),
        {"ns_use_kernels": torch.cuda.is_available()},
        one_process=True,
    ),
    "automuon": Library("automuon", "automuon:get_muon_and_adam", "nothing, it returns torch.optim.Muon"),
    "deepspeed": Library(
        *("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer:MuonWithAuxAdam"),
        *("in its engine only (readme)", {}, False, True),
        one_process=True,
    ),
}


def make(model: nn.Module, name: str, **options: Any) -> torch.optim.Optimizer:
    library = LIBRARIES[name]
    module, _, kind = library.path.partition(":")
    maker = getattr(importlib.import_module(module), kind)
    options |= {"lr": LR, library.decay: WEIGHT_DECAY} | library.options
    if name == "automuon":
        return maker(model.parameters(), options)[0]  # type: ignore[no-any-return]
    params: Any = list(model.named_parameters() if library.package == "torchpar" else model.parameters())
    if library.in_group:
        params, options = [{"params": params, "use_muon": True, **options}], {}
    return maker(params, **options)  # type: ignore[no-any-return]


def make_with_nesterov(model: nn.Module, name: str, nesterov: bool = True) -> torch.optim.Optimizer:
    return make(model, name, nesterov=nesterov)


def make_ours(
    model: nn.Module, name: str, nesterov: bool = True, views: Any = None, process_group: Any = None
) -> torch.optim.Optimizer:
    return make(model, name, nesterov=nesterov, views=views, process_group=process_group)


def check(name: str, situations: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a library; only the first one, if already its step on whole matrices fails."""
    library = LIBRARIES[name]
    maker = make_with_nesterov if library.nesterov else make
    tried = partial(make_ours if library.package == "torchpar" else maker, name=name)
    others = [one for one in situations if one != "whole" and applies(library, one)]
    rows = check_optimizer(tried, ["whole"], timeout=TIMEOUT).rows
    if rows[0]["verdict"] not in FAULTS:
        rows += check_optimizer(tried, others, timeout=TIMEOUT, orthogonal=library.orthogonal).rows
    return rows


def applies(library: Library, situation: str) -> bool:
    if library.package != "torchpar" and situation in OUR_LAYERS:
        return False
    return not library.one_process or max(SITUATIONS[situation].ranks) == 1


def work(connection: Any, name: str, situations: Sequence[str]) -> None:
    os.setpgrp()
    sys.stdout = Path(os.devnull).open("w")  # where libraries print
    connection.send(check(name, situations))


def check_in_own_group(name: str, situations: Sequence[str]) -> list[Result]:
    """The results of a library, in a process group that ends with all that the library has started."""
    library, context = LIBRARIES[name], get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(sender, name, situations))
    process.start()
    sender.close()
    try:
        rows = receiver.recv()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    about = {"version": version(library.package), "promises": library.promises}
    return [
        Result(
            case={"library": name, "situation": row.pop("situation")},
            contestant=library.path.replace(":", "."),
            columns=about | row,
            ok=library.package != "torchpar" or row["verdict"] not in FAULTS,
            reason=row["detail"] if library.package == "torchpar" and row["verdict"] in FAULTS else "",
        )
        for row in rows
    ]


def installed(library: Library) -> bool:
    try:
        return bool(version(library.package))
    except PackageNotFoundError:
        return library.package == "torchpar"


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("optimizers", "Run the conformance kit on every installed Muon.")
    command.parser.add_argument("--only", nargs="+", metavar="NAME", choices=LIBRARIES)
    options = command.parse(arguments)
    names = [name for name in options.only or LIBRARIES if installed(LIBRARIES[name])]
    missing = {LIBRARIES[name].package for name in options.only or LIBRARIES if name not in names}
    if missing:
        print("not installed:", *sorted(missing))
    table = Table(command.csv(options), torch.device("cpu"))
    for name in track(names, "libraries"):
        table.add(check_in_own_group(name, QUICK if options.quick else list(SITUATIONS)))
    print_results("who is right where", table.results, ["library", "situation", "verdict", "update_error"])
    return table.status


if __name__ == "__main__":
    run(main)
