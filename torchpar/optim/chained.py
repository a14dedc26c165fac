# SPDX-License-Identifier: MIT
"""Several optimizers as one optimizer."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchpar.errors import ConfigError

Group = dict[str, Any]
"""A parameter group of `torch.optim`: "params", and the optimizer's arguments by name."""

_CHANGED = (
    "ChainedOptimizer: a group was added to, removed from or replaced in the chain or one of its "
    "optimizers; make a new chain"
)


@contextmanager
def loading(optimizer: Optimizer) -> Iterator[None]:
    """Copy the tensors that the block loads, or name the part that a state dict lacks.

    PyTorch takes tensors of the right dtype and device as they are. Two optimizers in one process,
    of which one loads the state dict of the other, would then update the same tensors.

    Raises:
        ConfigError: in place of a KeyError of `torch.optim.Optimizer.load_state_dict`.
    """
    try:
        yield
        for key, state in optimizer.state.items():
            optimizer.state[key] = _copied(state)
    except KeyError as e:
        if e.args[0] not in ("param_groups", "params", "state"):
            raise
        name = type(optimizer).__name__
        raise ConfigError(f"{name}: the state dict has no {e.args[0]}; load one of a {name}") from e


def _copied(value: Any) -> Any:
    """``value`` with copies of the tensors in it."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copied(one) for key, one in value.items()}
    return type(value)(map(_copied, value)) if isinstance(value, list | tuple) else value


class ChainedOptimizer(Optimizer):
    """One optimizer made of several, which update different parameters and step in turn.

    The chain takes over their parameter groups and state. Save and load the chain's state dict. It
    has the methods `train` and `eval` if one of the optimizers has them, as those of the package
    schedulefree do.

    Args:
        optimizers: with all of their parameter groups; perhaps chains themselves.

    Attributes:
        defaults: the arguments that all of the optimizers have, with the values of the first, such
            as its "lr"; and "momentum" if some have it, and not all have "betas".

    Raises:
        ConfigError: an argument that is no optimizer.
        NotImplementedError: from `add_param_group`.
        RuntimeError: on a step, on saving, loading or copying, if groups were added, removed or
            replaced afterwards, in the chain or in one of the optimizers.
    """

    _parts: Sequence[dict[str, Any]] = ()  # of the state dict that is loaded

    def __init__(self, *optimizers: Optimizer):
        for optimizer in optimizers:
            if not isinstance(optimizer, Optimizer):
                raise ConfigError(
                    f"ChainedOptimizer: an argument is of type {type(optimizer).__name__}, "
                    "expected optimizers of torch.optim, each as an argument"
                )
        super().__init__(
            [group for optimizer in optimizers for group in optimizer.param_groups], {}
        )
        # Whoever reads an argument here expects it in all groups: transformers' schedules divide by
        # "lr".
        common = set.intersection(*(set(optimizer.defaults) for optimizer in optimizers))
        first = optimizers[0].defaults
        self.defaults |= {name: value for name, value in first.items() if name in common}
        # Schedulers that cycle the momentum look here for "betas" or "momentum", and set it in all
        # groups.
        if "betas" not in common:
            for optimizer in reversed(optimizers):
                if "momentum" in optimizer.defaults:
                    self.defaults["momentum"] = optimizer.defaults["momentum"]
        for optimizer in optimizers:
            self.state.update(optimizer.state)
        self.optimizers = optimizers
        self._share_state()

    def _share_state(self) -> None:
        """Give each optimizer the chain's state, and the chain's groups which it steps."""
        if sum(len(optimizer.param_groups) for optimizer in self.optimizers) != len(
            self.param_groups
        ):
            raise RuntimeError(_CHANGED)
        groups = iter(self.param_groups)
        for optimizer in self.optimizers:
            optimizer.state = self.state
            optimizer.param_groups = [next(groups) for _ in optimizer.param_groups]
            if isinstance(optimizer, ChainedOptimizer):
                optimizer._share_state()

    def _check_groups(self) -> None:
        """Raise unless the optimizers step the groups that the chain shows, saves and schedules."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        if [*map(id, groups)] != [*map(id, self.param_groups)]:
            raise RuntimeError(_CHANGED)
        if any(optimizer.state is not self.state for optimizer in self.optimizers):
            self._share_state()

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a copy, or let each optimizer load its part of a state dict."""
        if "optimizers" not in self.__dict__:  # of a copy
            super().__setstate__(state)
            self._share_state()
            return
        try:
            for optimizer, part in zip(self.optimizers, self._parts, strict=True):
                present = optimizer.param_groups
                optimizer.load_state_dict(part)
                if not isinstance(optimizer, ChainedOptimizer):  # which has checked its own
                    self._check_options(optimizer, present)
        except Exception:
            self._share_state()
            raise
        of_all = {key: one for key, one in state["state"].items() if not isinstance(key, Tensor)}
        self.param_groups = [group for one in self.optimizers for group in one.param_groups]
        self.state = defaultdict(dict, of_all)
        for optimizer in self.optimizers:
            self.state.update(optimizer.state)
        self._share_state()

    def _check_options(self, optimizer: Optimizer, before: list[Group]) -> None:
        """Refuse groups of another optimizer, which lack what the next step reads."""
        for present, group in zip(before, optimizer.param_groups, strict=True):
            needed = optimizer.defaults.keys() & present.keys()
            if lacking := ", ".join(sorted(needed - group.keys())):
                raise ConfigError(
                    f"{type(self).__name__}: a group of the state dict has no {lacking}, which "
                    f"{type(optimizer).__name__} needs; load one of the same optimizers"
                )

    def state_dict(self) -> dict[str, Any]:
        """The state dicts of the optimizers as one, with the chain's hooks and theirs."""
        hook = self.register_state_dict_post_hook(self._save_parts, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def _save_parts(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        """Put what each optimizer saves in place of the chain's own state dict.

        Parameters are numbered in the order of all groups.
        """
        self._check_groups()
        of_params = {p for group in self.param_groups for p in group["params"]}
        state_dict["state"] = {key: one for key, one in self.state.items() if key not in of_params}
        state_dict["param_groups"], first = [], 0
        for optimizer in self.optimizers:
            own = {p for group in optimizer.param_groups for p in group["params"]}
            optimizer.state = defaultdict(
                dict, {key: one for key, one in self.state.items() if key in own}
            )
            try:
                saved = optimizer.state_dict()
            finally:
                self._share_state()
            numbers = {i: first + i for group in saved["param_groups"] for i in group["params"]}
            for group in saved["param_groups"]:
                params = [numbers[i] for i in group["params"]]
                state_dict["param_groups"].append({**group, "params": params})
            for i, one in saved["state"].items():
                state_dict["state"][numbers.get(i, i)] = one
            others = {
                key: one for key, one in saved.items() if key not in ("state", "param_groups")
            }
            state_dict |= others
            first += sum(len(group["params"]) for group in optimizer.param_groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, as `torch.optim.Optimizer.load_state_dict` does."""
        with loading(self):
            hook = self.register_load_state_dict_pre_hook(self._cut)
            try:
                super().load_state_dict(state_dict)
            finally:
                hook.remove()
                self._parts = ()

    def _cut(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        """Cut a state dict, after the hooks of others, into the parts of the optimizers."""
        groups, self._parts = iter(state_dict["param_groups"]), []
        for optimizer in self.optimizers:
            own = list(islice(groups, len(optimizer.param_groups)))
            numbers = {i for group in own for i in group["params"]}
            state = {i: one for i, one in state_dict["state"].items() if i in numbers}
            self._parts.append({**state_dict, "state": state, "param_groups": own})

    def add_param_group(self, param_group: Group) -> None:
        if hasattr(self, "optimizers"):
            raise NotImplementedError(
                "ChainedOptimizer cannot add groups; make a new optimizer of the model"
            )
        super().add_param_group(param_group)

    @property
    def train(self) -> Callable[[], None]:
        """Switch each optimizer that has modes to training; missing if none has."""
        return self._switch("train")

    @property
    def eval(self) -> Callable[[], None]:
        """Switch each optimizer that has modes to evaluation; missing if none has."""
        return self._switch("eval")

    def _switch(self, mode: str) -> Callable[[], None]:
        """A function that calls the method ``mode`` of all optimizers that have it.

        Trainers ask ``hasattr(optimizer, "train")``.
        """
        switches = [getattr(one, mode, None) for one in self.optimizers]
        found = [switch for switch in switches if callable(switch)]
        if not found:
            raise AttributeError(
                f"ChainedOptimizer: none of its optimizers has {mode}()", name=mode, obj=self
            )

        def switch_all() -> None:
            self._check_groups()
            for switch in found:
                switch()

        return switch_all

    def step(self, closure: Callable[[], object] | None = None) -> Any:
        """Step each optimizer.

        Returns:
            the loss of ``closure``, which computes the gradients; None without a closure.
        """
        self._check_groups()
        loss = None if closure is None else torch.enable_grad()(closure)()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss
