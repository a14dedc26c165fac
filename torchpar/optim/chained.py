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
        return {key: _copied(item) for key, item in value.items()}
    return type(value)(map(_copied, value)) if isinstance(value, list | tuple) else value


class ChainedOptimizer(Optimizer):
    """One optimizer made of several, which update different parameters and step in turn.

    The chain takes over their parameter groups and state. Save and load the chain's state dict. It
    has the methods `train` and `eval` if one of the optimizers has them, as those of the package
    schedulefree do.

    The state dict has the groups and the state of all parameters. What else an optimizer saves is
    in a dictionary of its own in the list "parts", in the order of the optimizers.

    Args:
        optimizers: with all of their parameter groups; perhaps chains themselves.

    Attributes:
        defaults: the arguments that all of the optimizers have, with the values of the first, such
            as its "lr". They include "momentum" if some optimizer has it and not all have "betas".

    Raises:
        ConfigError: no argument, or one that is no optimizer. Also, and on a step, if two
            optimizers keep state under the same key that is no parameter.
        NotImplementedError: from `add_param_group`.
        RuntimeError: on a step, on saving, loading or copying, if groups were added, removed or
            replaced afterwards, in the chain or in one of the optimizers.
    """

    _parts: Sequence[dict[str, Any]] = ()  # of the state dict that is loaded

    def __init__(self, *optimizers: Optimizer):
        if not optimizers:
            raise ConfigError(
                "ChainedOptimizer: no optimizer is given, expected at least one of torch.optim"
            )
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
        self.optimizers = optimizers
        self._join_states()
        self._share_state()

    def _join_states(self) -> None:
        """Take over the state of the optimizers, and note of which each one is."""
        # The index of the optimizer that has made state under a key that is no parameter.
        self._owners: dict[Any, int] = {}
        for index, optimizer in enumerate(self.optimizers):
            for key in (key for key in optimizer.state if not isinstance(key, Tensor)):
                if key not in self.state:
                    self._owners[key] = index
                elif self.state[key] is optimizer.state[key]:
                    self._owners.pop(key, None)  # of optimizers that have been in one chain
                else:
                    raise self._conflict(key)
            self.state.update(optimizer.state)

    def _conflict(self, key: object) -> ConfigError:
        return ConfigError(
            f"ChainedOptimizer: two of its optimizers keep state under {key!r}, which is no "
            "parameter; take optimizers whose state is of parameters"
        )

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
        return {
            **super().__getstate__(), "optimizers": self.optimizers, "_owners": self._owners
        }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a copy, or let each optimizer load its part of a state dict."""
        if "optimizers" not in self.__dict__:  # of a copy
            super().__setstate__({"_owners": {}, **state})
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
        of_no_parameter = {
            key: value for key, value in state["state"].items() if not isinstance(key, Tensor)
        }
        self.param_groups = [
            group for optimizer in self.optimizers for group in optimizer.param_groups
        ]
        self.state = defaultdict(dict, of_no_parameter)
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
        of_chain = {p for group in self.param_groups for p in group["params"]}
        state_dict["state"] = {
            key: value for key, value in self.state.items() if key not in of_chain
        }
        state_dict["param_groups"], first = [], 0
        parts: list[dict[str, Any]] = []
        for optimizer in self.optimizers:
            of_part = {p for group in optimizer.param_groups for p in group["params"]}
            optimizer.state = defaultdict(
                dict, {key: value for key, value in self.state.items() if key in of_part}
            )
            try:
                saved = optimizer.state_dict()
            finally:
                self._share_state()
            numbers = {i: first + i for group in saved["param_groups"] for i in group["params"]}
            for group in saved["param_groups"]:
                params = [numbers[i] for i in group["params"]]
                state_dict["param_groups"].append({**group, "params": params})
            for i, value in saved["state"].items():
                state_dict["state"][numbers.get(i, i)] = value
            parts.append({key: saved[key] for key in saved.keys() - {"state", "param_groups"}})
            first += sum(len(group["params"]) for group in optimizer.param_groups)
        if any(parts):
            state_dict["parts"] = parts

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
        # A state dict of an earlier version has the keys of all parts beside each other.
        common = {key: value for key, value in state_dict.items() if key != "parts"}
        parts = state_dict.get("parts", [{}] * len(self.optimizers))
        if len(parts) != len(self.optimizers):
            raise ConfigError(
                f"{type(self).__name__}: the state dict is of {len(parts)} optimizers, expected "
                f"{len(self.optimizers)}; load one of the same optimizers"
            )
        for optimizer, keys_of_part in zip(self.optimizers, parts, strict=True):
            of_part = list(islice(groups, len(optimizer.param_groups)))
            numbers = {i for group in of_part for i in group["params"]}
            state = {i: value for i, value in state_dict["state"].items() if i in numbers}
            self._parts.append({**common, **keys_of_part, "state": state, "param_groups": of_part})

    def add_param_group(self, param_group: Group) -> None:
        if hasattr(self, "optimizers"):
            raise NotImplementedError(
                "ChainedOptimizer cannot add groups; make a new optimizer of the model"
            )
        super().add_param_group(param_group)

    @property
    def train(self) -> Callable[..., None]:
        """Switch each optimizer that has modes to training; missing if none has."""
        return self._switch("train")

    @property
    def eval(self) -> Callable[..., None]:
        """Switch each optimizer that has modes to evaluation; missing if none has."""
        return self._switch("eval")

    def _switch(self, mode: str) -> Callable[..., None]:
        """A function that calls the method ``mode`` of all optimizers that have it.

        It passes its arguments on. Trainers ask ``hasattr(optimizer, "train")``.
        """
        methods = [getattr(optimizer, mode, None) for optimizer in self.optimizers]
        switches = [method for method in methods if callable(method)]
        if not switches:
            raise AttributeError(
                f"ChainedOptimizer: none of its optimizers has {mode}()", name=mode, obj=self
            )

        def switch_all(*args: object, **kwargs: object) -> None:
            self._check_groups()
            for switch in switches:
                switch(*args, **kwargs)

        return switch_all

    def step(self, closure: Callable[[], object] | None = None) -> Any:
        """Step each optimizer.

        Returns:
            the loss of ``closure``, which computes the gradients; None without a closure.
        """
        self._check_groups()
        loss = None if closure is None else torch.enable_grad()(closure)()
        for index, optimizer in enumerate(self.optimizers):
            with self._owning(index):
                optimizer.step()
        return loss

    @contextmanager
    def _owning(self, index: int) -> Iterator[None]:
        """Hide state of other optimizers that is of no parameter, and note which is new."""
        hidden = {
            key: self.state.pop(key)
            for key, owner in self._owners.items()
            if owner != index and key in self.state
        }
        count = len(self.state)
        try:
            yield
            for key in islice(self.state, count, None):
                if key in hidden:
                    raise self._conflict(key)
                if not isinstance(key, Tensor):
                    self._owners[key] = index
        finally:
            self.state.update(hidden)
