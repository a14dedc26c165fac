# SPDX-License-Identifier: MIT
"""Run the conformance kit on every installed Muon: ``python -m benchmarks run optimizers``.

Each optimizer is compared with its own step on whole matrices, in all situations of
`torchpar.testing`. What others get wrong is a finding; the status is 1 only if torchpar's own Muon
has a fault. All have their own defaults, except for the learning rate and the weight decay.
"""

import importlib
import os
import signal
import tomllib
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed import ProcessGroup

import torchpar
from torchpar.errors import ConfigError
from torchpar.optim.matrices import View
from torchpar.testing import SITUATIONS, Conformance, Row, check_optimizer

from .flags import Command, run
from .results import Result, Table, print_results, track

LR, WEIGHT_DECAY = 0.02, 0.0
TIMEOUT = 60.0  # seconds for a situation
QUICK = ("whole", "Shard(0)")
FAULTS = ("wrong", "hangs", "crashes")
# Their weights are plain tensors, of which an optimizer other than ours cannot know that they are
# slices.
OUR_LAYERS = ("ColumnParallelLinear", "RowParallelLinear", "split layers")


class Library(NamedTuple):
    """A published optimizer; ``optimizers.toml`` explains the attributes."""

    package: str
    path: str
    promises: str
    only: str = ""
    in_group: bool = False
    orthogonal: bool = True
    nesterov: bool = True
    decay: str = "weight_decay"
    options: Mapping[str, object] = MappingProxyType({})


ENTRIES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
LIBRARIES = {name: Library(**entry) for name, entry in ENTRIES.items()}


def make(model: nn.Module, name: str, **options: object) -> torch.optim.Optimizer:
    library = LIBRARIES[name]
    module, _, kind = library.path.partition(":")
    maker = getattr(importlib.import_module(module), kind)
    if name == "heavyball":  # it would compile for longer than a situation may take
        importlib.import_module("heavyball.utils").compile_mode = None  # type: ignore[attr-defined]
    options |= {"lr": LR, library.decay: WEIGHT_DECAY, **library.options}
    if name == "automuon":  # which makes torch.optim.Muon, and AdamW for other parameters
        return maker(model.parameters(), options)[0]  # type: ignore[no-any-return]
    params: Sequence[object] = list(
        model.named_parameters() if library.package == "torchpar" else model.parameters()
    )
    if library.in_group:
        params, options = [{"params": params, "use_muon": True, **options}], {}
    return maker(params, **options)  # type: ignore[no-any-return]


def make_with_nesterov(model: nn.Module, name: str, nesterov: bool = True) -> torch.optim.Optimizer:
    return make(model, name, nesterov=nesterov)


def make_ours(
    model: nn.Module,
    name: str,
    nesterov: bool = True,
    views: Mapping[str, View] | None = None,
    process_group: ProcessGroup | None = None,
) -> torch.optim.Optimizer:
    convolutions = [key for key, p in model.named_parameters() if p.dim() == 4]
    # The views that Muon.for_model takes.
    views = views or dict.fromkeys(convolutions, partial(torch.flatten, start_dim=1))
    return make(model, name, nesterov=nesterov, views=views, process_group=process_group)


def check(name: str, situations: Sequence[str]) -> list[dict[str, str | float | None]]:
    """The rows of a library; only the first one, if already its step on whole matrices fails."""
    library = LIBRARIES[name]
    maker = make_with_nesterov if library.nesterov else make
    tried = partial(make_ours if library.package == "torchpar" else maker, name=name)
    others = [one for one in situations if one != "whole" and applies(library, one)]
    try:
        rows = check_optimizer(tried, ["whole"], timeout=TIMEOUT).rows
    except ConfigError as e:  # it cannot even be made
        rows = Conformance([Row("whole", "crashes", detail=str(e))]).rows
    if rows[0]["verdict"] not in FAULTS:
        rows += check_optimizer(tried, others, timeout=TIMEOUT, orthogonal=library.orthogonal).rows
    return rows


def applies(library: Library, situation: str) -> bool:
    """Whether the library says nothing against the situation."""
    if library.package != "torchpar" and situation.startswith(OUR_LAYERS):
        return False
    if library.package == "automuon" and situation == "fully_shard, convolutions":
        return False  # nothing is left to its Muon
    shared = library.only == "replicas" and situation == "DDP"
    return not library.only or SITUATIONS[situation].ranks == 1 or shared


def begin_group() -> None:
    os.setpgrp()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries print


def check_in_own_group(name: str, situations: Sequence[str]) -> list[Result]:
    """The results of a library, in a process group that ends with all that the library has
    started."""
    with ProcessPoolExecutor(1, get_context("spawn"), begin_group) as pool:
        group = pool.submit(os.getpid).result()
        try:
            rows = pool.submit(check, name, situations).result()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
    library, results = LIBRARIES[name], []
    about = {"version": version_of(library), "promises": library.promises}
    for row in rows:
        case = {"library": name, "situation": row.pop("situation")}
        is_failure = library.package == "torchpar" and row["verdict"] in FAULTS
        reason = str(row["detail"]) if is_failure else ""
        result = Result(case=case, contestant=library.path, ok=not reason, reason=reason)
        results.append(result.plus(**about, **row))
    return results


def version_of(library: Library) -> str:
    """The version of an installed library, or ""."""
    try:
        return version(library.package)
    except PackageNotFoundError:
        return torchpar.__version__ if library.package == "torchpar" else ""


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("optimizers")
    command.parser.add_argument("--only", nargs="+", metavar="NAME", choices=LIBRARIES)
    options = command.parse(arguments)
    asked = options.only or list(LIBRARIES)
    names = [name for name in asked if version_of(LIBRARIES[name])]
    if missing := [name for name in asked if name not in names]:
        print("not installed:", ", ".join(missing))
    table = Table(command.csv(options), torch.device("cpu"))
    for name in track(names, "libraries"):
        table.add(check_in_own_group(name, QUICK if options.quick else list(SITUATIONS)))
    print_results(
        "who is right where", table.results, ["library", "situation", "verdict", "update_error"]
    )
    return table.status


if __name__ == "__main__":
    run(main)
