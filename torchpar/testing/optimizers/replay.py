# SPDX-License-Identifier: MIT
"""Steps of a situation again, on unsharded matrices: by the optimizer, or by its formula."""

import pickle
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchpar.testing.optimizers.formulas import FORMULAS, ByFormula, Formula, Settings, defaults_of
from torchpar.testing.optimizers.judge import (
    BFLOAT16,
    DRAWS,
    Key,
    References,
    Steps,
    Weights,
    formula_mismatch,
)
from torchpar.testing.optimizers.refusals import failures
from torchpar.testing.optimizers.situations import SITUATIONS
from torchpar.testing.optimizers.trial import (
    Layers,
    Make,
    Record,
    Setup,
    Trial,
    halves,
    multiply_rates,
    other_settings,
)


class SeparateOptimizers:
    """Several optimizers of one model, each with its own state, which a chain would share."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


class Replay:
    """The steps of a situation on unsharded matrices, by an optimizer or by its formula."""

    def __init__(
        self,
        make: Make,
        setup: Setup,
        reference: Formula | type[torch.optim.Optimizer] | None,
    ):
        self.make, self.setup = make, setup
        self.formula: Formula | None
        self.defaults: Settings = {}
        if isinstance(reference, Formula):
            self.formula = reference
        elif reference is not None:
            self.formula, self.defaults = FORMULAS[reference], defaults_of(reference)
        else:
            trial = self._trial()
            self.formula = FORMULAS.get(type(trial.optimizer(trial.model())))

    def weights(
        self, record: Record, draw: int = 0, by_formula: bool = False, base_rates: bool = False
    ) -> Weights:
        """The weights, with the gradients of a record.

        Args:
            draw: the number of a draw of rounded gradients, or 0 for exact gradients.
            base_rates: whether to leave out the situation's change of learning rates.
        """
        trial = self._trial()
        weights = {name: torch.from_numpy(of[0]) for name, of in record.weights.items()}
        model = Layers({name: weight.to(trial.dtype) for name, weight in weights.items()})
        torch.default_generator.manual_seed(0)
        optimizer: Any = self._make(model, base_rates)
        generator = torch.Generator().manual_seed(draw)
        rounding = self.formula.precision if by_formula and self.formula else BFLOAT16

        def rounded(t: Tensor) -> Tensor:
            """``t`` with random errors of at most one rounding.

            Source: Parker, "Monte Carlo Arithmetic", 1997.
            """
            drawn = torch.rand(t.shape, generator=generator, device="cpu") if draw else 0.5
            return t * (1 + rounding * (drawn - 0.5))

        if by_formula:
            assert self.formula is not None
            for parameter in model.parameters():
                parameter.data = parameter.data.double()
            optimizer = ByFormula(optimizer.param_groups, self.formula, self.defaults, rounded)
        torch.default_generator.manual_seed(0)
        rate = 1.0
        for step in trial.steps(model, optimizer):
            if trial.rates and not base_rates:
                multiply_rates(optimizer, trial.rates[step] / rate)
                rate = trial.rates[step]
            for p, gradients in zip(model.parameters(), record.gradients.values(), strict=True):
                if gradients[step] is None:
                    p.grad = None  # zero_grad may have left zeros
                else:
                    # Numbers are rounded to bfloat16 also where the dtype is bfloat16.
                    g = rounded(torch.from_numpy(gradients[step]) / trial.factor)
                    # A backward pass, because an optimizer may have hooks in it.
                    torch.autograd.backward(p, g.to(p.dtype))
        return trial.record.weights

    def with_other_rates(self, record: Record) -> set[str]:
        """The matrices whose learning rates the situation changes."""
        model = Layers({name: torch.from_numpy(of[0]) for name, of in record.weights.items()})
        groups = self._make(model).param_groups
        if any("lr" not in group for group in groups):
            return set()
        layers = model if "rates" in self.setup else halves(model)[1]
        return {name for name, _ in layers.named_children()}

    def _trial(self) -> Trial:
        setup: Setup = {**self.setup, "views": {}, "groups": False}
        return Trial(self.make, Record(), **setup)

    def _make(
        self, model: Layers, base_rates: bool = False
    ) -> torch.optim.Optimizer | SeparateOptimizers:
        """The optimizer; each of two groups has one of its own, so that it cannot confuse them."""
        trial = self._trial()
        if not self.setup.get("groups"):
            return trial.optimizer(model)
        first, second = map(trial.optimizer, halves(model))
        for group in second.param_groups:
            group.update(other_settings(group) | ({"lr": group["lr"]} if base_rates else {}))
        return SeparateOptimizers([first, second])


def replay(name: str, pickled: bytes, merged: dict[Key, Record]) -> References:
    """Repeat the steps on unsharded matrices: with the same gradients, then with rounded ones."""
    records, families = list(merged.values()), [family for family, *_ in merged]
    reference = pickle.loads(pickled)[1]
    setup = SITUATIONS[name].setup
    with failures():
        again = Replay(pickle.loads(pickled)[0], setup, reference)
        exact = [again.weights(record) for record in records]
        pairs = zip(records, exact, strict=True)
        differ = any(
            not np.array_equal(one.weights[name], of[name]) for one, of in pairs for name in of
        )
        # Where all bits are the same, their rounding does not matter.
        own = [
            Steps(of, [again.weights(record, draw) for draw in range(1, 1 + DRAWS * differ)])
            for record, of in zip(records, exact, strict=True)
        ]
        mismatch = None
        if again.formula and setup.get("dtype", torch.float32) == torch.float32:
            formula = [Steps(again.weights(record, by_formula=True), []) for record in records]
            mismatch = formula_mismatch(families, own, formula, again.formula)
            for draw in range(1, 1 + DRAWS):
                if not mismatch:  # more draws could only widen the bound
                    break
                for record, steps in zip(records, formula, strict=True):
                    steps.rounded.append(again.weights(record, draw, by_formula=True))
                mismatch = formula_mismatch(families, own, formula, again.formula)
        changes = "rates" in setup or "groups" in setup
        base = [again.weights(record, base_rates=True) for record in records] if changes else None
        label = again.formula.name if again.formula and mismatch is not None else ""
        return References(own, label, mismatch or "", base, [*map(again.with_other_rates, records)])


def replay_shards(name: str, pickled: bytes, shards: Record) -> Steps:
    """Repeat the steps on shards, each as if it were a whole matrix."""
    with failures():
        again = Replay(pickle.loads(pickled)[0], SITUATIONS[name].setup, None)
        rounded = [again.weights(shards, draw) for draw in range(1, 1 + DRAWS)]
        return Steps(again.weights(shards), rounded)
