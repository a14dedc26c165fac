# SPDX-License-Identifier: MIT
"""The Muon optimizer by symmetric matrix products, for unsharded and for sharded parameters.

Muon replaces the momentum M = U·Σ·Vᵀ of a weight by a matrix near U·Vᵀ, which `orthogonalize`
computes.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from functools import partial
from itertools import islice
from typing import Any, SupportsFloat

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import Optimizer, ParamsT

from torchpar.errors import ConfigError
from torchpar.library.player import PlayedFunction
from torchpar.library.sharding import is_dtensor, local
from torchpar.ops.matrix import is_exact
from torchpar.optim.assign import Choice, ModelOptimizer, chain, check_parameters
from torchpar.optim.chained import Group, loading
from torchpar.optim.elementwise import update_alone, update_by_words, words_of_update
from torchpar.optim.exchange import Exchange, check_whole_matrix
from torchpar.optim.matrices import ParamInfo, View, orthogonalize_all
from torchpar.optim.newton_schulz import (
    COEFFICIENTS,
    Coefficients,
    NewtonSchulz,
    dtype_of_updates,
    orthogonalize,
)
from torchpar.parallel.split.parts import part_of

# The factor of the learning rate of a matrix (n, m), by the names of `torch.optim.Muon`.
_RATIOS: dict[str, Callable[[int, int], float]] = {
    "original": lambda n, m: math.sqrt(max(1.0, n / m)),
    "match_rms_adamw": lambda n, m: 0.2 * math.sqrt(max(n, m)),
    "spectral_unclamped": lambda n, m: math.sqrt(n / m),
}

_Ranks = dist.ProcessGroup | DeviceMesh | None  # a parameter's ranks; None for this rank alone
_PARAMETERS = "the list of parameters"
# What a step reads of a group, beside its parameters.
_NUMBERS = ("lr", "weight_decay", "momentum", "eps")
_OPTIONS = {*_NUMBERS, "nesterov", "ns_coefficients", "ns_steps", "adjust_lr_fn"}


class Muon(Optimizer):
    """`torch.optim.Muon` on symmetric matrix products, with the same arguments and state dict.

    ``B ← μ·B + (1−μ)·g``, ``W ← (1 − γ·λ)·W − γ'·orthogonalize(g + μ·(B − g))``, or
    ``orthogonalize(B)`` without Nesterov. γ is ``lr``, λ ``weight_decay``, μ ``momentum``, and γ'
    is γ adjusted to the shape of W. With ``ns="standard"`` the updates are `torch.optim.Muon`'s up
    to bfloat16 rounding. The default "auto" is less accurate for matrices with one side at least
    twice the other, see `orthogonalize`.

    Matrices of equal shapes are orthogonalized in batches that keep the device busy. On one rank a
    step never waits for the device.

    **Several ranks.** A parameter may be replicated, a DTensor of any placement, such as those of
    `fully_shard`, or a shard that a split layer of torchpar holds. Each matrix is orthogonalized by
    a single rank, one of those that have it, and the ranks divide the work about evenly. A step
    makes two all-to-alls in bfloat16 for each set of ranks, and a rank holds no unsharded matrices
    but those that it orthogonalizes (`torchpar.optim.exchange`). With ``ns="standard"`` float32
    parameters have the same bits as without sharding, on a CPU. Save and load the state as any
    optimizer's: a momentum is sharded as its parameter is.

    **In `torchpar.exact.mode`** a step computes in float32, by exact products, and sends float32.
    The parameters have the same bits on any processor and any number of ranks. There "auto" is
    "standard".

    Give Muon the hidden weight matrices only. `for_model` finds them, and gives another optimizer
    the embeddings, the output head, biases and norms.

    Args:
        params, lr, weight_decay, momentum, nesterov, eps, ns_steps, adjust_lr_fn: as in
            `torch.optim.Muon`. A step that a CUDA graph captures needs an ``lr`` that is a number,
            which the graph keeps, or a tensor on the GPU.
        ns_coefficients: as in `orthogonalize`: a triple, a triple for each iteration, or
            "polar_express".
        ns: the Newton–Schulz iteration, "auto", "standard" or "gram", see `orthogonalize`.
        views: by the name of a parameter, a function that returns its matrices. For parameters that
            are not one matrix. Parameters need names then: give ``model.named_parameters()``.
        process_group: a group, or a mesh, of the ranks that divide the work; together they hold
            all shards of each parameter. By default the ranks of a DTensor's mesh divide its work,
            and every rank updates all replicated parameters. Under
            `torch.nn.parallel.DistributedDataParallel` name the ranks that hold the same
            parameters. A copy of the optimizer has no process group.

    Raises:
        ConfigError: a parameter that is not a matrix and has no view; an invalid view; ``ns``,
            ``views`` or ``process_group`` in a parameter group; ranks whose parameters differ. The
            error is a ValueError, and names the parameter.
        ValueError: an argument, or an option of a group, that `torch.optim.Muon` or `orthogonalize`
            refuses.
    """

    ns: NewtonSchulz = "auto"
    views: Mapping[str, View]
    process_group: dist.ProcessGroup | DeviceMesh | None = None  # not copied
    # The exchanges, and the parameters that this rank has alone; made in the first step.
    _plan: tuple[list[Exchange], list[ParamInfo]] | None = None
    _planned: Sequence[object] = ()  # the parameters that `_plan` is for
    _play: PlayedFunction  # of the plan's parameters
    _has_updated = False
    _check_model: Callable[[], None] | None = None  # before the first step; not copied

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        ns: NewtonSchulz = "auto",
        views: Mapping[str, View] | None = None,
        process_group: dist.ProcessGroup | DeviceMesh | None = None,
    ):
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        defaults = _checked(options, ns)
        if not isinstance(process_group, dist.ProcessGroup | DeviceMesh | None):
            given = f"process_group is of type {type(process_group).__name__}"
            raise ConfigError(f"Muon: {given}, expected a process group, a DeviceMesh or None")
        self.ns = ns
        self.views = dict(views or {})
        self.process_group = process_group
        # By parameter: groups may change, and a state dict that is loaded may bring other names.
        self._names: dict[Tensor, str] = {}
        try:
            super().__init__(params, defaults)
        except TypeError as e:
            if not isinstance(params, torch.nn.Module):  # a ParameterList holds parameters
                raise
            way = "pass model.parameters(), or call Muon.for_model, which chooses among them"
            raise ConfigError(f"Muon: params is a model, {type(params).__name__}; {way}") from e
        names = {info.name for info in self._param_infos()}
        if unknown := set(self.views) - names:
            raise ConfigError(f"Muon: views has {sorted(unknown)[0]}, expected names of parameters")

    @classmethod
    def for_model(
        cls,
        model: torch.nn.Module,
        lr: float | Tensor = 1e-3,
        *,
        others: Callable[[Iterable[Group]], Optimizer] = torch.optim.AdamW,
        overrides: Mapping[str, Choice] | None = None,
        views: Mapping[str, View] | None = None,
        **arguments: Any,
    ) -> ModelOptimizer:
        """Muon for the hidden matrices of ``model``, and another optimizer for all else.

        >>> from functools import partial
        >>> from torch import nn
        >>> layers = nn.Embedding(100, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 100)
        >>> model = nn.Sequential(*layers)
        >>> optimizer = Muon.for_model(model, lr=0.02, others=partial(torch.optim.AdamW, lr=3e-4))
        >>> print(optimizer)
        parameter  shape   optimizer  reason
        0.weight   100x32  AdamW      embedding
        1.weight   64x32   Muon       hidden matrix
        1.bias     64      AdamW      not a matrix
        3.weight   100x64  AdamW      output head, the last linear layer
        3.bias     100     AdamW      not a matrix

        Muon takes the weights of linear layers, of convolutions (their first axis as rows), and of
        `torch.nn.MultiheadAttention` (query, key and value apart). An output head is a linear layer
        whose width no later layer takes. Where that leaves a doubt, the table's first line names
        the layers, and what to write (docs/muon.md).

        Args:
            others: makes the other optimizer from parameter groups. Vectors are in a separate
                group, whose weight decay is 0.
            overrides: "muon" or "others" by the name of a parameter, or by a pattern such as
                ``"blocks.*"``. Of several that fit, the last decides.
            views: as for `Muon`, by names or patterns. These parameters go to Muon.
            arguments: other arguments of `Muon`.

        Returns:
            One optimizer, a `ChainedOptimizer`, which prints the table above.

        Raises:
            ConfigError: a pattern that no parameter has, or no parameter for Muon; an argument of a
                wrong type; in the first step, a parameter that the model has replaced, as
                `fully_shard` does.
        """
        make = partial(cls, lr=lr, **arguments)
        optimizer = chain(make, model, others, overrides or {}, views or {})
        muon = optimizer.optimizers[0]
        assert isinstance(muon, Muon)
        # Not at once: accelerate replaces parameters of optimizers before the first step.
        muon._check_model = partial(check_parameters, optimizer, model)
        return optimizer

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Let torch.compile skip a step, hooks included.

        `Optimizer` wraps each ``step`` by this method. A step consists of launches and messages,
        which a compiler would only break into many graphs.
        """
        step: Callable[..., Any] = torch.compiler.disable(
            Optimizer.profile_hook_step(func),
            reason="a step of Muon is launches and messages; leave it outside of fullgraph",
        )
        return step

    def __getstate__(self) -> dict[str, object]:
        for info in self._param_infos():
            if info.part.is_slice:
                raise ConfigError(
                    f"Muon: {info.name} is of a split layer, and a copy of the optimizer would not "
                    "know how it is split; copy the model, and make an optimizer for the copy"
                )
        settings = {"ns": self.ns, "views": self.views, "_names": self._names}
        return {**super().__getstate__(), **settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a copy, or that of `load_state_dict` after its hooks."""
        for index, group in enumerate(state["param_groups"]):
            if lacking := sorted(_OPTIONS - group.keys()):
                raise ConfigError(
                    f"Muon: group {index} of the state dict has no {', '.join(lacking)}; load one "
                    "of a Muon"
                )
        super().__setstate__(state)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters.

        If several ranks hold the parameters, add the group before the first step, on every rank.
        """
        if not isinstance(param_group, dict):
            raise ConfigError(
                f"Muon: a group is of type {type(param_group).__name__}, expected a dict that has "
                "params"
            )
        if of_all := {"ns", "views", "process_group"} & param_group.keys():
            raise ConfigError(
                f"Muon: {sorted(of_all)[0]} applies to the whole optimizer, not to a group"
            )
        if "params" not in param_group:
            given = ", ".join(map(str, param_group)) or "nothing"
            raise ConfigError(f"Muon: a group has {given}, expected params, its parameters")
        super().add_param_group(param_group)
        try:
            self._check_group(len(self.param_groups) - 1)
            added = list(self._param_infos(len(self.param_groups) - 1))
            for info in added:
                info.check()
            if self._plan is not None and self._plan[0]:
                # A rank that alone adds a group would wait for the other ranks in the next step.
                first = f"{added[0].name}, …" if added else "of no parameters"
                raise ConfigError(
                    f"Muon: a group ({first}) is added after the first step of several "
                    "ranks; make a new Muon of all groups on every rank"
                )
        except Exception:
            self.param_groups.pop()
            raise

    def _check_group(self, index: int) -> None:
        """Check the options that are the group's own, as the constructor does its arguments."""
        options = {name: self.param_groups[index][name] for name in _OPTIONS}
        if all(value is self.defaults[name] for name, value in options.items()):
            return
        try:
            _checked(options, self.ns)
        except ValueError as e:
            message = str(e).removeprefix("Muon: ")
            raise ConfigError(f"Muon: group {index}: {message}") from e

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, also one of `torch.optim.Muon`."""
        with loading(self):
            super().load_state_dict(state_dict)

    def _param_infos(self, first: int = 0) -> Iterator[ParamInfo]:
        """The parameters of the groups from ``first`` on, as they are now."""
        for index, group in enumerate(self.param_groups[first:], first):
            given = group.get("param_names", ())
            for i, p in enumerate(group["params"]):
                if p not in self._names:
                    named = len(given) == len(group["params"])
                    self._names[p] = given[i] if named else f"parameter {i} of group {index}"
                name = self._names[p]
                try:
                    part = part_of(p)
                except ConfigError as e:
                    raise ConfigError(f"Muon: {name}: {e}") from e
                yield ParamInfo(name, index, p, part, self.views.get(name))

    def _exchanges(self) -> tuple[list[Exchange], list[ParamInfo]]:
        """The exchanges, one for each set of ranks that hold the same parameters, and the
        parameters that this rank has alone.

        Every rank takes its exchanges in the order of the ranks, so that ranks never wait for each
        other in a circle. The exchanges are made again if a parameter, or its place, shape, dtype
        or device, has changed.
        """
        facts = [
            (id(p), index, p.shape, p.dtype, p.device, p.placements if is_dtensor(p) else None)
            for index, group in enumerate(self.param_groups)
            for p in group["params"]
        ]
        if self._plan is not None and facts != self._planned:
            if self._plan[0]:
                self._refuse_change(self._plan[0])
            self._plan = None
        if self._plan is None:
            if self._check_model is not None:
                self._check_model()
                self._check_model = None
            together: dict[tuple[tuple[int, ...], str], list[ParamInfo]] = {}
            for info in self._param_infos():
                info.check()
                key = _members(self._ranks_of(info)), str(info.p.device)
                together.setdefault(key, []).append(info)
            exchanges, alone = list[Exchange](), list[ParamInfo]()
            for key in sorted(together):
                group = _group_of(map(self._ranks_of, together[key]))
                if group is not None:
                    exchanges.append(Exchange(group, together[key]))
                    continue
                alone += together[key]
            for info in alone:  # when other ranks no longer wait for an exchange with this one
                check_whole_matrix(info, [info.part])
            self._plan = exchanges, alone
            # Forget the names of parameters that were removed.
            self._names = {info.p: info.name for info in self._param_infos()}
            self._play = PlayedFunction()
            # The plan keeps the parameters, so that no other one gets their id.
            self._planned = facts
        return self._plan

    def _ranks_of(self, info: ParamInfo) -> _Ranks:
        return self.process_group or info.part.mesh

    def _refuse_change(self, plan: list[Exchange]) -> None:
        """Raise a ConfigError on every rank, also where the parameters have not changed."""
        facts = {_PARAMETERS: "changed"}
        for exchange in plan:
            exchange.gather({}, facts)
        for exchange in plan:
            exchange.scatter({})
        self._join_comparison()
        raise ConfigError(
            "Muon: parameters were added, removed or replaced after the first step of several "
            "ranks; make a new Muon of all parameters on every rank"
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], object] | None = None) -> Any:
        """Take one step.

        Returns:
            the loss of ``closure``, which computes the gradients; None without a closure.

        Raises:
            ConfigError: a gradient that is sparse, that only some ranks have, or that has other
                placements than its parameter, and arguments that differ (on every rank of an
                exchange); a group without any gradient while another has some; a first step without
                any gradient; a momentum that was loaded from other placements, or is of another
                dtype or device; parameters that were added, removed or replaced after the first
                step of several ranks.
        """
        loss = None if closure is None else torch.enable_grad()(closure)()
        exchanges, alone = self._exchanges()
        if not exchanges:
            self._step_alone(alone)
            return loss
        infos = [*(info for exchange in exchanges for info in exchange.params), *alone]
        grads = {info: local(grad) for info in infos if (grad := _valid_gradient(info)) is not None}
        tensors: dict[ParamInfo, Tensor] = {}
        for group, of_group in self._by_group(grads):
            momenta = [self._momentum(info) for info in of_group]
            directions = _directions(group, list(of_group.values()), momenta)
            tensors |= zip(of_group, directions, strict=True)
        gathered = [exchange.gather(tensors, self._facts(exchange)) for exchange in exchanges]
        own = {info: t.contiguous() for info in alone if (t := tensors.get(info)) is not None}
        tensors = {info: t for of_ranks in (*gathered, own) for info, t in of_ranks.items()}
        # All exchanges gather first, so that ranks with different parameters work at the same time.
        tensors = {
            info: update
            for group, of_group in self._by_group(tensors)
            for info, update in self._orthogonalize(group, of_group).items()
        }
        scattered = [exchange.scatter(tensors) for exchange in exchanges]
        own = {info: tensors[info] for info in own}
        tensors = {info: t for of_ranks in (*scattered, own) for info, t in of_ranks.items()}
        self._check_gradients(infos, grads.keys())
        for group, of_group in self._by_group(tensors):
            self._apply(group, of_group)
        return loss

    def _step_alone(self, infos: list[ParamInfo]) -> None:
        """Take a step with parameters that this rank has alone."""
        grads = {info: local(grad) for info in infos if (grad := _valid_gradient(info)) is not None}
        self._check_gradients(infos, grads.keys())
        momenta = {info: self._momentum(info) for info in grads}
        for group, of_group in self._by_group(grads):
            self._update(group, of_group, [momenta[info] for info in of_group])

    def _update(self, group: Group, grads: dict[ParamInfo, Tensor], momenta: list[Tensor]) -> None:
        """Update the parameters of a group, and their momenta."""
        infos, count = tuple(grads), len(grads)
        tensors, written = [*grads.values(), *momenta], [*range(count, 2 * count)]
        numbers: tuple[int, ...] = ()
        if count == 1:  # one kernel updates the parameter
            (info,) = infos
            lr, ratio = self._rate(group, momenta[0]), _ratio(group, info.shapes[0])
            numbers = words_of_update(lr, group["weight_decay"], ratio)
            tensors += [local(info.p), *([lr] if isinstance(lr, Tensor) else [])]
            written.append(2)

        def compute(tensors: list[Tensor], numbers: Sequence[int]) -> list[Tensor]:
            directions = _directions(group, tensors[:count], tensors[count : 2 * count])
            contiguous = [t.contiguous() for t in directions]
            updates = self._orthogonalize_now(group, infos, contiguous)
            if count == 1:
                lr = tensors[3] if len(tensors) > 3 else None
                if update_by_words(tensors[2], updates[0], lr, numbers):
                    return []
            return updates

        options = infos, group["momentum"], group["nesterov"], *self._options(group)
        updates = self._play(compute, tensors, options, numbers, written)
        if updates:
            self._apply(group, dict(zip(infos, updates, strict=True)))
        else:
            _note_written(infos)

    def _by_group(
        self, tensors: Mapping[ParamInfo, Tensor]
    ) -> Iterator[tuple[Group, dict[ParamInfo, Tensor]]]:
        """The parameter groups that have some of the tensors, and the tensors of each group."""
        for index, group in enumerate(self.param_groups):
            if of_group := {info: t for info, t in tensors.items() if info.group_index == index}:
                yield group, of_group

    def _momentum(self, info: ParamInfo) -> Tensor:
        p, state = info.p, self.state[info.p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        momentum = state["momentum_buffer"]
        if momentum.shape != p.shape or not _has_layout_of(momentum, p):
            raise ConfigError(
                f"Muon: {info.name} is {tuple(p.shape)} {_layout(p)}, and its momentum "
                f"{tuple(momentum.shape)} {_layout(momentum)}; "
                + (
                    "load a state dict of other placements by torch.distributed.checkpoint"
                    if is_dtensor(p) or is_dtensor(momentum)
                    else "load a state dict of this model, whose parameters are in the same order"
                )
            )
        if (momentum.dtype, momentum.device) != (p.dtype, p.device):
            raise ConfigError(
                f"Muon: {info.name} is {p.dtype} on {p.device}, and its momentum {momentum.dtype} "
                f"on {momentum.device}; move it, too: "
                "optimizer.load_state_dict(optimizer.state_dict())"
            )
        return local(momentum)

    def _facts(self, exchange: Exchange) -> dict[str, object]:
        """The arguments, and which gradients there are: the same on all ranks of an exchange."""
        facts: dict[str, object] = {_PARAMETERS: "as in the first step", "ns": self.ns}
        for index, name in {
            info.group_index: info.name for info in reversed(exchange.params)
        }.items():
            group = self.param_groups[index]
            for argument in sorted(self.defaults.keys() & group.keys()):
                value = group[argument]
                if isinstance(value, Tensor):  # a value on a GPU is not read back
                    value = None if value.is_cuda else value.item()
                facts[f"{argument} of group {index} ({name}, …)"] = value
        for i, info in enumerate(exchange.params):
            grad = info.p.grad
            facts[f"gradient {i}, of {info.name},"] = None if grad is None else _layout(grad)
        return facts

    def _orthogonalize(
        self, group: Group, momenta: Mapping[ParamInfo, Tensor]
    ) -> dict[ParamInfo, Tensor]:
        """The unsharded momenta, orthogonalized, with values of `dtype_of_updates`."""
        infos = tuple(momenta)

        def compute(tensors: list[Tensor], _: Sequence[int]) -> list[Tensor]:
            return self._orthogonalize_now(group, infos, tensors)

        updates = self._play(compute, list(momenta.values()), (infos, *self._options(group)))
        return dict(zip(infos, updates, strict=True))

    def _options(self, group: Group) -> tuple[object, ...]:
        """What `_orthogonalize_now` reads beside the tensors."""
        names = "ns_steps", "eps", "adjust_lr_fn"
        coefficients = group["ns_coefficients"]
        if coefficients is not COEFFICIENTS:  # which are hashable, as no list is
            coefficients = repr(coefficients)
        return coefficients, self.ns, *[group[name] for name in names]

    def _orthogonalize_now(
        self, group: Group, infos: Sequence[ParamInfo], tensors: Sequence[Tensor]
    ) -> list[Tensor]:
        """`_orthogonalize` by Python, from which tapes are recorded."""
        coefficients, steps, eps = (group[name] for name in ("ns_coefficients", "ns_steps", "eps"))
        of_each = [info.matrices(t) for info, t in zip(infos, tensors, strict=True)]
        whole = [matrix for matrices in of_each for matrix in matrices]
        found = iter(orthogonalize_all(whole, coefficients, steps, eps, self.ns))
        results = []
        for info, t, matrices in zip(infos, tensors, of_each, strict=True):
            updates = list(islice(found, len(matrices)))
            is_whole = info.view is None
            results.append(updates[0] if is_whole else _joined(group, info, t, updates))
        return results

    def _check_gradients(self, infos: list[ParamInfo], valid: Set[ParamInfo]) -> None:
        """Raise a ConfigError for a gradient of another layout, or a group without gradients."""
        for info in infos:
            if info.p.grad is not None and info not in valid:
                self._join_comparison()
                raise ConfigError(
                    f"Muon: the gradient of {info.name} is {_layout(info.p.grad)}, expected "
                    f"{_layout(info.p)}; before the step, make it dense, or redistribute it to "
                    "p.placements"
                )
        updated = {info.group_index for info in valid}
        for index, group in enumerate(self.param_groups):
            trainable = any(p.requires_grad for p in group["params"])
            if trainable and index not in updated and (updated or not self._has_updated):
                first = self._names[group["params"][0]]
                self._join_comparison()
                raise ConfigError(
                    f"Muon: no parameter of group {index} has a gradient ({first}, …); call "
                    "backward before the step, let the loss depend on the group or freeze it by "
                    "requires_grad_(False), and make the optimizer after fully_shard, which "
                    "replaces the parameters"
                )
        self._has_updated |= bool(updated)

    def _join_comparison(self) -> None:
        """Raise the error of ranks that differed, which the others raise in their next step."""
        for exchange in self._plan[0] if self._plan is not None else ():
            exchange.read()

    def _apply(self, group: Group, updates: dict[ParamInfo, Tensor]) -> None:
        """Apply the weight decay, and subtract the updates."""
        decay = group["weight_decay"]
        params = [local(info.p) for info in updates]
        lr = self._rate(group, params[0])
        ratios = [_ratio(group, info.shapes[0]) for info in updates]
        steps = list(updates.values())
        if len(params) != 1 or not update_alone(params[0], steps[0], lr, decay, ratios[0]):
            _update_all(params, steps, lr, decay, ratios)
        _note_written(updates)

    def _rate(self, group: Group, p: Tensor) -> float | Tensor:
        """The group's learning rate: a number, or a tensor on the device of ``p``.

        In exact arithmetic it is a tensor of float32, however it is given: the bits must not depend
        on that.
        """
        lr: float | Tensor = group["lr"]
        if is_exact():
            return torch.as_tensor(lr, dtype=torch.float32, device=p.device).reshape(())
        if isinstance(lr, Tensor) and _is_read_at_once(lr, p):
            return float(lr)
        if not isinstance(lr, Tensor):  # a tensor is not read back from the device
            return lr
        # bfloat16 would lose the decay
        wide = torch.float64 if lr.dtype == torch.float64 else torch.float32
        return lr.reshape(()).to(p.device, wide)


def _directions(group: Group, grads: list[Tensor], momenta: list[Tensor]) -> list[Tensor]:
    """Update the momenta; return the tensors to orthogonalize."""
    gradients = [grad.to(m.dtype) for grad, m in zip(grads, momenta, strict=True)]
    torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
    if not group["nesterov"]:
        return momenta
    return list(torch._foreach_lerp(gradients, momenta, group["momentum"]))


def _note_written(infos: Iterable[ParamInfo]) -> None:
    """Let earlier graphs notice that hold a DTensor, and not its local part."""
    if written := [info.p for info in infos if is_dtensor(info.p)]:
        torch.autograd.graph.increment_version(written)


def _checked(options: Group, ns: NewtonSchulz) -> Group:
    """Return `torch.optim.Muon`'s defaults with these options. It refuses invalid options."""
    for name in _NUMBERS:
        if not isinstance(options[name], SupportsFloat):
            expected = "a number or a tensor of one" if name == "lr" else "a number"
            raise ConfigError(f"Muon: {name} is {options[name]!r}, expected {expected}")
    no_matrix = torch.empty(0, 0, device="cpu")
    coefficients, steps, eps = (options[name] for name in ("ns_coefficients", "ns_steps", "eps"))
    orthogonalize(no_matrix, coefficients, steps, eps, ns)
    of_torch: Any = torch.optim.Muon  # its signature has narrower types
    defaults: Group = of_torch([no_matrix], **options).defaults
    return defaults


def _joined(group: Group, info: ParamInfo, t: Tensor, updates: list[Tensor]) -> Tensor:
    """The updates of a parameter's matrices, as one tensor like the parameter."""
    result = t.new_empty(info.part.whole, dtype=dtype_of_updates())
    places = info.matrices(result)
    torch._foreach_copy_(places, updates)
    for place in places:
        ratio = _ratio(group, place.shape) / _ratio(group, info.shapes[0])
        if ratio != 1:
            place.mul_(ratio)
    return result


def _is_read_at_once(lr: Tensor, p: Tensor) -> bool:
    """Whether to take the number of a learning rate on the CPU, for a parameter on a GPU.

    A copy from the CPU waits for the stream. A captured step would keep the number for ever: there
    the copy remains, which CUDA refuses.
    """
    is_on_cpu = type(lr) is Tensor and lr.device.type == "cpu"
    return is_on_cpu and p.device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def _update_all(
    params: list[Tensor],
    updates: list[Tensor],
    lr: float | Tensor,
    decay: float,
    ratios: list[float],
) -> None:
    """``p ← (1 − lr·decay)·p − lr·ratio·update``; the roundings do not depend on other
    parameters."""
    # Two roundings in 16 bits: a factor of 1 − γ·λ would be rounded to a parameter's bfloat16.
    narrow = [p for p in params if p.dtype.itemsize == 2]
    if narrow:
        torch._foreach_sub_(narrow, torch._foreach_mul(narrow, lr * decay))
    if len(narrow) < len(params):
        torch._foreach_mul_([p for p in params if p.dtype.itemsize > 2], 1 - lr * decay)
    # The steps are float32, since products in bfloat16 would be rounded. A GPU takes one launch
    # for many tensors where their dtypes are equal.
    steps = _in_float32(updates)
    if isinstance(lr, Tensor):
        torch._foreach_mul_(steps, ratios)
        torch._foreach_mul_(steps, lr)
    else:
        torch._foreach_mul_(steps, [lr * ratio for ratio in ratios])
    torch._foreach_sub_(params, steps)


def _in_float32(tensors: list[Tensor]) -> list[Tensor]:
    wide = [
        t if t.dtype == torch.float32 else t.new_empty(t.shape, dtype=torch.float32)
        for t in tensors
    ]
    if copied := [(w, t) for w, t in zip(wide, tensors, strict=True) if w is not t]:
        torch._foreach_copy_(*map(list, zip(*copied, strict=True)))  # type: ignore[arg-type]
    return wide


def _ratio(group: Group, shape: Sequence[int]) -> float:
    """The factor by which a matrix of this shape changes its group's learning rate."""
    n, m = shape
    return _RATIOS[group["adjust_lr_fn"] or "original"](max(n, 1), max(m, 1))


def _valid_gradient(info: ParamInfo) -> Tensor | None:
    """The gradient of a parameter; None without one, and for one of another layout."""
    grad = info.p.grad
    return grad if grad is not None and _has_layout_of(grad, info.p) else None


def _has_layout_of(t: Tensor, p: Tensor) -> bool:
    # Plain tensors need no names of layouts, which take the host longer.
    are_sharded = is_dtensor(t), is_dtensor(p)
    if not any(are_sharded):
        return t.layout == p.layout
    return all(are_sharded) and _layout(t) == _layout(p)


def _layout(t: Tensor) -> str:
    """The layout of a tensor, and its placements if it is a DTensor."""
    return f"{t.layout} {t.placements}" if is_dtensor(t) else str(t.layout)


def _members(ranks: _Ranks) -> tuple[int, ...]:
    """The numbers of several ranks in the world; none for a single rank."""
    if ranks is None or ranks.size() == 1:
        return ()
    if isinstance(ranks, DeviceMesh):
        return tuple(sorted(ranks.mesh.flatten().tolist()))
    return tuple(sorted(dist.get_process_group_ranks(ranks)))


def _group_of(equal: Iterable[_Ranks]) -> dist.ProcessGroup | None:
    """A process group of the same ranks as each of ``equal``; None for a single rank.

    Two meshes of the same ranks may have a group each. The choice is the same on every rank, also
    if their parameters are in another order there.
    """
    several = [ranks for ranks in equal if ranks is not None and ranks.size() > 1]
    if not several:
        return None
    groups = [group for ranks in several if (group := _own_group(ranks)) is not None]
    if groups:
        return min(groups, key=lambda group: group.group_name)
    members = _members(several[0])
    if len(members) == dist.get_world_size():
        return dist.group.WORLD
    return dist.new_group(list(members), use_local_synchronization=True)  # type: ignore[return-value]


def _own_group(ranks: dist.ProcessGroup | DeviceMesh) -> dist.ProcessGroup | None:
    """The process group that ``ranks`` has; None for a mesh of several dimensions."""
    if isinstance(ranks, dist.ProcessGroup):
        return ranks
    dims = [dim for dim in range(ranks.ndim) if ranks.size(dim) > 1]
    return ranks.get_group(dims[0]) if len(dims) == 1 else None
