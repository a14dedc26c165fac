# SPDX-License-Identifier: MIT
"""Trial of an optimizer in many situations, beside its plain step and its formula."""

import pickle
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from torchpar.errors import ConfigError
from torchpar.parallel.launch.local import Ranks
from torchpar.testing.optimizers.conformance import Conformance
from torchpar.testing.optimizers.formulas import FORMULAS, Formula
from torchpar.testing.optimizers.judge import (
    Key,
    Steps,
    judge,
    judge_polar,
    judge_shards,
    of_full_rank,
)
from torchpar.testing.optimizers.refusals import failures
from torchpar.testing.optimizers.replay import replay, replay_shards
from torchpar.testing.optimizers.situations import SITUATIONS
from torchpar.testing.optimizers.trial import FAMILIES, Failure, Make, Record, Trial
from torchpar.testing.rows import Row

GRACE = 5.0  # seconds for the other ranks, once a rank has failed


def check_optimizer(
    make: Make,
    situations: Iterable[str] | None = None,
    *,
    timeout: float = 60.0,
    orthogonal: bool = True,
    reference: Formula | type[torch.optim.Optimizer] | None = None,
    ranks: Ranks | None = None,
) -> Conformance:
    """Try an optimizer in many situations, on gloo ranks on this machine's CPU.

    An update Δ of each situation is compared with Δ_ref, the update by the same optimizer's step on
    unsharded matrices on one process, with the same gradients. Δ may differ from Δ_ref by four
    times the change that rounding the gradients makes. Where the weights are float32, Δ_ref is
    itself compared with the formula of ``reference`` in float64. A row that is wrong says so if
    the updates are those of each shard alone. Ranks are processes that import the caller's main
    module: a script needs ``if __name__ == "__main__":``.

    Args:
        make: returns the optimizer of a model whose parameters are hidden matrices: a module-level
            function or class, or a `functools.partial` of a function or class. A situation that is
            about ``views``, ``nesterov`` or ``process_group`` passes this argument, if ``make`` has
            it.
        situations: a name or names from `SITUATIONS`; by default all.
        timeout: seconds for each situation, after which its ranks count as hanging.
        orthogonal: whether to try the situations that are only for optimizers that orthogonalize.
        reference: a `Formula`, or the optimizer of PyTorch whose formula the optimizer shall
            follow: SGD, Adam, AdamW or Muon of `torch.optim`. By default the formula of the
            optimizer's own class, if this is exactly one of these classes or `torchpar.optim.Muon`.
            An optimizer of another class is not compared with a formula.
        ranks: an open pool, which other calls use, too. Otherwise the processes end with the call.

    Raises:
        ConfigError: no situation, or an unknown one; an unknown ``reference``; a ``make`` that the
            ranks cannot import, or that makes no optimizer of a plain model on one process.
    """
    if not callable(make):
        raise ConfigError(
            f"make is of type {type(make).__name__}, expected a function that gets a model"
        )
    chosen = SITUATIONS if situations is None else situations
    names = [chosen] if isinstance(chosen, str) else list(chosen)
    if unknown := [name for name in names if name not in SITUATIONS]:
        raise ConfigError(
            f"situation {unknown[0]!r}, expected one of {', '.join(map(repr, SITUATIONS))}"
        )
    names = [name for name in names if orthogonal or not SITUATIONS[name].orthogonal]
    if not names:
        raise ConfigError(
            "no situation is left, expected names of testing.SITUATIONS, or None for all"
        )
    if not isinstance(reference, Formula) and reference not in (None, *FORMULAS):
        known = ", ".join(f"{kind.__module__}.{kind.__qualname__}" for kind in FORMULAS)
        raise ConfigError(
            f"reference is {reference!r}, expected a testing.Formula, or one of {known}"
        )
    with Ranks() if ranks is None else nullcontext(ranks) as pool:
        try:
            pickled = pickle.dumps((make, reference))
            pool(1, pickle.loads, pickled)
        except Exception as e:
            raise ConfigError(
                f"the ranks cannot import make or reference ({e}); expected a module-level "
                "function or class, or a functools.partial of one, and in a script `if __name__ == "
                "'__main__':` around the call"
            ) from e
        _check_make(pool, pickled)
        return Conformance(_row(pool, name, pickled, timeout) for name in names)


def _check_make(ranks: Ranks, pickled: bytes) -> None:
    """Raise a ConfigError if ``make`` fails on unsharded matrices on one process.

    All situations compare with steps on such a model, so that each would repeat the error.
    """
    (outcome,) = ranks.outcomes(1, _make_once, pickled)
    if isinstance(outcome, Failure):
        raise ConfigError(
            f"make fails on a plain model, on one process: {outcome.args[1]}; expected a function "
            "of a model that returns its optimizer"
        )
    if isinstance(outcome, BaseException):
        did = "does not return" if isinstance(outcome, TimeoutError) else "ends its process"
        raise ConfigError(f"make {did}, expected an optimizer of a plain model, on one process")
    if outcome:
        raise ConfigError(f"make returns {outcome}, expected the optimizer of the model")


def _make_once(pickled: bytes) -> str:
    """Make an optimizer of a plain model; return what it is instead if it is none, or ""."""
    with failures():
        trial = Trial(pickle.loads(pickled)[0], Record())
        made: object = trial.optimizer(trial.model())
    is_optimizer = all(hasattr(made, name) for name in ("param_groups", "step", "zero_grad"))
    return "" if is_optimizer else "None" if made is None else f"a {type(made).__name__}"


def _row(ranks: Ranks, name: str, pickled: bytes, timeout: float) -> Row:
    situation, records = SITUATIONS[name], dict[Key, Record]()
    phases = [situation.ranks] if isinstance(situation.ranks, int) else situation.ranks
    limits = {"timeout": timeout, "grace": GRACE}
    try:
        with TemporaryDirectory() as folder:
            for world_size in phases:
                outcomes = ranks.outcomes(
                    world_size, _try, name, pickled, folder, records, **limits
                )
                _raise_failure(outcomes, situation.one_may_refuse)
                records = _merge(outcomes)
        if name == "polar factor":
            return judge_polar(name, records)
        outcomes = ranks.outcomes(1, replay, name, pickled, records, **limits)
        _raise_failure(outcomes)
        row = judge(name, records, outcomes[0])
        record, whole = of_full_rank(records, outcomes[0])
        shards = record.shards()
        if row.verdict == "wrong" and shards.weights:
            (alone,) = ranks.outcomes(1, replay_shards, name, pickled, shards, **limits)
            if isinstance(alone, Steps):  # an optimizer may fail with shards
                row = judge_shards(row, shards.weights, record.split(whole), alone)
        return row
    except Failure as e:
        verdict, detail = e.args
        return Row(name, verdict, detail=detail)


def _try(name: str, pickled: bytes, folder: str, earlier: dict[Key, Record]) -> dict[str, Record]:
    """Train in a situation on this rank, with each family of gradients."""
    situation, records = SITUATIONS[name], dict(zip(FAMILIES, earlier.values(), strict=False))
    with failures():
        for family in FAMILIES:
            # `torch.manual_seed` would format the stack for each kind of device that is not there.
            torch.default_generator.manual_seed(0)
            record = records.setdefault(family, Record())
            trial = Trial(
                pickle.loads(pickled)[0], record, family, Path(folder) / family, **situation.setup
            )
            situation.run(trial)
    return records


def _raise_failure(outcomes: Sequence[object], one_may_refuse: bool = False) -> None:
    """Raise the failure of ranks that have failed or hang."""
    ranks: dict[str, dict[int, str]] = {}  # by verdict
    for rank, outcome in enumerate(outcomes):
        if isinstance(outcome, Failure):
            verdict, message = outcome.args
        elif isinstance(outcome, TimeoutError):
            verdict, message = "hangs", "no answer in time"
        elif isinstance(outcome, BaseException):
            last = str(outcome).strip().rpartition("\n")[2]  # of a traceback
            verdict, message = "crashes", f"{type(outcome).__name__}: {last}"
        else:
            continue
        ranks.setdefault(verdict, {})[rank] = message
    for verdict in ("not applicable", "crashes", "wrong", "refuses", "hangs"):
        if verdict in ranks:
            rank, message = next(iter(ranks[verdict].items()))
            if len(ranks[verdict]) == len(outcomes):
                raise Failure(verdict, message)
            if verdict != "refuses" or one_may_refuse:
                raise Failure(verdict, f"rank {rank}: {message}")
            others = "hangs" if "hangs" in ranks else "wrong"
            raise Failure(others, f"refuses on rank {rank}, and not on all ranks: {message}")


def _merge(outcomes: list[dict[str, Record]]) -> dict[Key, Record]:
    """The records of all ranks. Ranks with the same matrices must have the same weights."""
    merged: dict[Key, Record] = {}
    for of_rank in outcomes:
        for family, record in of_rank.items():
            first = merged.setdefault((family, *record.weights), record)
            for name, weights in record.weights.items():
                if not np.array_equal(weights, first.weights[name], equal_nan=True):
                    raise Failure("wrong", f"the ranks differ in {name}")
            for name, parts in record.parts.items():
                first.parts.setdefault(name, set()).update(parts)
    return merged
