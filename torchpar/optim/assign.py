# SPDX-License-Identifier: MIT
"""Muon for the hidden matrices of a model, and another optimizer for its other parameters.

docs/muon.md names the sources of the rules. Layers of other libraries are recognized by names and
attributes.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from itertools import repeat
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer

from torchpar.console import in_columns
from torchpar.errors import ConfigError
from torchpar.library.sharding import is_dtensor
from torchpar.optim.chained import ChainedOptimizer, Group
from torchpar.optim.heads import find_heads, is_linear
from torchpar.optim.matrices import View
from torchpar.parallel.split.parts import part_of

Choice = Literal["muon", "others"]


class Assignment(NamedTuple):
    """The optimizer that takes a parameter, and the reason.

    The parameter is not kept, since sharding may replace it.

    Attributes:
        may_be_head: whether the layer may be an output head or hidden; the table's first line asks.
    """

    name: str
    shape: torch.Size
    choice: Choice
    reason: str
    view: View | None = None
    may_be_head: bool = False


class ModelOptimizer(ChainedOptimizer):
    """A chain of Muon and another optimizer, which prints the parameters of each.

    Attributes:
        assignments: of the model's parameters, in their order.
    """

    def __init__(self, assignments: list[Assignment], *optimizers: Optimizer):
        self.assignments = assignments
        super().__init__(*optimizers)

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "assignments": self.assignments}

    def __repr__(self) -> str:
        names = {
            "muon": type(self.optimizers[0]).__name__,
            "others": type(self.optimizers[-1]).__name__,
        }
        rows = [
            (one.name, "x".join(map(str, one.shape)), names[one.choice], one.reason)
            for one in self.assignments
        ]
        columns = in_columns([("parameter", "shape", "optimizer", "reason"), *rows])
        return "\n".join([*self._doubts(), columns])

    def _doubts(self) -> list[str]:
        """The table's first line, if layers may be output heads or hidden."""
        doubtful = [one.name for one in self.assignments if one.may_be_head]
        if not doubtful:
            return []
        others = [one.name for one in self.assignments if one.name not in doubtful]
        # One pattern for the same layer in each block. A key of a dictionary may have signs of
        # patterns.
        patterns = {
            name: name if re.search(r"[*?[]", name) else re.sub(r"\.\d+(?=\.)", ".*", name)
            for name in doubtful
        }
        fitting = [
            name if any(fnmatchcase(other, pattern) for other in others) else pattern
            for name, pattern in patterns.items()
        ]
        choices = ", ".join(
            f'{json.dumps(one, ensure_ascii=False)}: "others"' for one in dict.fromkeys(fitting)
        )
        layers = (
            "layer may be an output head" if len(doubtful) == 1 else "layers may be output heads"
        )
        return [
            f"{len(doubtful)} {layers}: write overrides={{{choices}}} for output heads, or "
            '"muon" in its place for hidden layers'
        ]


def _check_types(model: object, others: object, **mappings: object) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"Muon.for_model: model is of type {type(model).__name__}, expected a Module"
        )
    if not callable(others):
        raise ConfigError(
            f"Muon.for_model: others is of type {type(others).__name__}, expected a function"
        )
    if lazy := next((name for name, p in model.named_parameters() if is_lazy(p)), None):
        raise ConfigError(
            f"Muon.for_model: {lazy}, of a lazy layer, has no shape yet; initialize it by a "
            "forward pass first"
        )
    for name, mapping in mappings.items():
        if not isinstance(mapping, Mapping):
            given = f"{name} is of type {type(mapping).__name__}"
            raise ConfigError(
                f"Muon.for_model: {given}, expected a dictionary by names or patterns"
            )


def chain(  # noqa: C901  # a line for each rule, in their order
    make_muon: Callable[..., Optimizer],
    model: nn.Module,
    others: Callable[[Iterable[Group]], Optimizer],
    overrides: Mapping[str, Choice],
    views: Mapping[str, View],
) -> ModelOptimizer:
    """Make both optimizers of `Muon.for_model`, which documents the arguments and the errors."""
    _check_types(model, others, overrides=overrides, views=views)
    uses = _uses_of(model)
    assignments = {p: Assignment(of[0].name, of[0].shape, *_decide(of)) for p, of in uses.items()}
    for p, of in uses.items():
        reason = assignments[p].reason
        is_open = reason in (_HIDDEN, _CONVOLUTION) or reason.startswith(_HEAD)
        if is_open and any(use.may_be_head for use in of):
            assignments[p] = assignments[p]._replace(may_be_head=True)

    def change(pattern: str, **changes: Any) -> None:
        # A name may have signs of patterns, as keys of a ModuleDict do.
        named = [p for p, of in uses.items() if any(use.name == pattern for use in of)]
        if not named:
            named = [
                p for p, of in uses.items() if any(fnmatchcase(use.name, pattern) for use in of)
            ]
        if not named:
            name = next((one.name for one in assignments.values()), "")
            expected = f"a name or pattern such as {name}" if name else "a model with parameters"
            raise ConfigError(
                f"Muon.for_model: no parameter is named {pattern}, expected {expected}"
            )
        assignments.update(
            (p, assignments[p]._replace(**changes, may_be_head=False)) for p in named
        )

    for pattern, view in views.items():
        change(pattern, choice="muon", reason="has a view", view=view)
    for pattern, choice in overrides.items():
        if choice not in ("muon", "others"):
            raise ConfigError(
                f"Muon.for_model: {pattern} goes to {choice!r}, expected 'muon' or 'others'"
            )
        change(pattern, choice=choice, reason="override")
    matrices = [(one.name, p) for p, one in assignments.items() if one.choice == "muon"]
    rest = [(one.name, p) for p, one in assignments.items() if one.choice == "others"]
    if not matrices:
        given, way = "the model has no hidden matrix", "take another optimizer"
        unknown = next((one for one in assignments.values() if one.reason == _UNKNOWN), None)
        if overrides:
            given = "after overrides no parameter is left for Muon"
            way += ", or other overrides"
        elif unknown is not None:
            why = f"no known layer multiplies by {unknown.name}"
            given = f"no parameter is known to be a hidden matrix: {why}"
            way = f"if yours does, name it by overrides={{{unknown.name!r}: 'muon'}}, or {way}"
        raise ConfigError(f"Muon.for_model: {given}; {way}")
    chosen = {
        one.name: one.view for one in assignments.values() if one.view and one.choice == "muon"
    }
    optimizers = [make_muon(matrices, views=chosen)]
    # Only matrices decay: a norm's scale that shrank would be scaled up again by the next layer.
    decaying = {"params": [(name, p) for name, p in rest if p.dim() > 1]}
    vectors = {"params": [(name, p) for name, p in rest if p.dim() <= 1], "weight_decay": 0.0}
    if groups := [group for group in (decaying, vectors) if group["params"]]:
        optimizers.append(others(groups))
        if not isinstance(optimizers[-1], Optimizer):
            returned = type(optimizers[-1]).__name__
            raise ConfigError(f"Muon.for_model: others returns a {returned}, expected an optimizer")
    return ModelOptimizer(list(assignments.values()), *optimizers)


def check_parameters(optimizer: Optimizer, model: nn.Module) -> None:
    """Raise a ConfigError if the optimizer has a parameter that is not the model's."""
    present = set(model.parameters())
    for group in optimizer.param_groups:
        names = group.get("param_names", repeat("a parameter"))
        lost = [name for name, p in zip(names, group["params"], strict=False) if p not in present]
        if lost:
            raise ConfigError(
                f"Muon.for_model: {lost[0]} is no longer a parameter of the model; reshard the "
                "model, and make the optimizer after the last fully_shard, which replaces "
                "parameters"
            )


# The rules


class _Use(NamedTuple):
    """A parameter of a layer.

    Attributes:
        role: "weight" if the layer multiplies by the parameter, up to a scaling; else the
            parameter's name.
        place: the classes of the layer's parent and of the layer, the layer's path, and the role.
        head: the reason why the layer is an output head, or "".
        may_be_head: whether the rules are in doubt about that.
    """

    name: str
    p: Tensor
    layer: Any
    parent: Any
    role: str
    place: str
    head: str
    may_be_head: bool

    @property
    def shape(self) -> torch.Size:
        """The shape of the unsharded parameter: all ranks must decide alike."""
        return torch.Size(part_of(self.p).whole)

    @property
    def groups(self) -> int:
        """The groups of a convolution; 0 for other layers."""
        return self.layer.groups if isinstance(self.layer, _ConvNd) else 0

    @property
    def is_stack(self) -> bool:
        """Whether the parameter is a stack of experts in transformers.

        A module of such experts says by ``is_transposed`` how they are stored.
        """
        return self.p.dim() == 3 and hasattr(self.layer, "is_transposed")

    @property
    def is_transposed(self) -> bool:
        """Whether a matrix is stored ``(in, out)``, as in transformers' Conv1D and some experts."""
        return hasattr(self.layer, "nf") or getattr(self.layer, "is_transposed", False)

    def multiplies(self) -> bool:
        """Whether the layer is known to multiply by the parameter, a matrix."""
        kind = type(self.layer).__name__
        known = is_linear(self.layer) or hasattr(self.layer, "nf") or kind.endswith("Router")
        fused = isinstance(self.layer, nn.MultiheadAttention | nn.RNNBase | nn.RNNCellBase)
        return self.p.dim() == 2 and (fused or (known and self.role == "weight"))


# Parametrizations that scale rows, or all of the matrix.
_SCALINGS = {"_WeightNorm", "_SpectralNorm"}


def _uses_of(model: nn.Module) -> dict[Tensor, list[_Use]]:
    """The layers that use each parameter; several layers may use one parameter."""
    heads = find_heads(model)
    uses: dict[Tensor, list[_Use]] = {}
    for prefix, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            # weight_v is of the former weight_norm, weight_orig of the former spectral_norm and of
            # pruning.
            path, role = prefix, name.removesuffix("_v").removesuffix("_orig")
            # The parameter belongs to the parametrized layer.
            if isinstance(module, ParametrizationList):
                path, _, role = f".{prefix}".rpartition(".parametrizations.")
                path = path.removeprefix(".")
                role = (
                    role if {type(one).__name__ for one in module} <= _SCALINGS else "parametrized"
                )
            layer, parent = model.get_submodule(path), model.get_submodule(path.rpartition(".")[0])
            full_name = f"{prefix}.{name}".lstrip(".")
            if is_dtensor(p) and hasattr(layer, "split_axes"):
                raise ConfigError(
                    f"Muon.for_model: {full_name} is a DTensor of a ColumnParallelLinear or "
                    "RowParallelLinear; under fully_shard, split the layer by parallelize_module "
                    "instead"
                )
            place = f"{type(parent).__name__}.{type(layer).__name__}.{path}.{role}"
            use = _Use(
                full_name,
                p,
                layer,
                parent,
                role,
                place,
                heads.reasons.get(path, ""),
                path in heads.doubtful,
            )
            uses.setdefault(p, []).append(use)
    return uses


def _at_place(pattern: str) -> Callable[[_Use], bool]:
    """A rule: the layer multiplies by the parameter, and its place fits ``pattern``.

    `fully_shard` prefixes the names of the classes in the place.
    """
    return lambda use: use.multiplies() and fnmatchcase(use.place, pattern)


def _query_key_value(use: _Use, rows: int, columns: int) -> list[int]:
    if hasattr(use.parent, "num_key_value_heads") and hasattr(use.parent, "head_dim"):
        size = use.parent.num_key_value_heads * use.parent.head_dim
        return [rows - 2 * size, size, size]
    return [columns] * 3


_HIDDEN, _HEAD, _CONVOLUTION = "hidden matrix", "output head", "convolution"
_UNKNOWN = "no known layer multiplies by it; if a layer of yours does, give a view"
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
# A rule has three entries. First, when it applies. Second, the reason, or the contents of a weight
# that holds several matrices below each other. Third, the number of these matrices if they are
# equal, or a function that returns the rows of each from the weight's rows n and columns m; None
# stands for the other optimizer. The first rule that applies counts. A rule whose rows do not add
# up to n is passed over, since the weight has another layout.
_RULES: list[
    tuple[Callable[[_Use], object], str, int | Callable[[_Use, int, int], list[int]] | None]
] = [
    (lambda use: isinstance(use.layer, _EMBEDDINGS), "embedding", None),
    (lambda use: isinstance(use.layer, _NORMS), "normalization", None),
    (lambda use: len(use.shape) < 2, "not a matrix", None),
    (lambda use: sum(n != 1 for n in use.shape) < 2, "one row or column", None),
    (lambda use: use.head, _HEAD + ", {head}", None),
    (
        lambda use: isinstance(use.layer, _ConvTransposeNd),
        "transposed convolution; give a view",
        None,
    ),
    (lambda use: use.groups > 1 == use.shape[1], "depthwise convolution", None),
    (lambda use: use.groups and use.role == "weight", _CONVOLUTION, 1),
    (lambda use: use.is_stack and use.role != "gate_up_proj", "experts", 1),
    (lambda use: use.is_stack and use.layer.is_concatenated, "gate and up of experts", 2),
    (_at_place("*.lora_[AB].*"), "LoRA factor", 1),
    (_at_place("*Router.*"), "router of experts", 1),
    (
        _at_place("*.weight_[ih]h*"),
        "gates",
        lambda use, n, _: [use.layer.hidden_size] * (n // use.layer.hidden_size),
    ),
    (_at_place("*.in_proj_weight"), "query, key and value", 3),
    (_at_place("*Phi*Attention.*.qkv_proj.weight"), "query, key and value", _query_key_value),
    (_at_place("*.qkv.weight"), "query, key and value", _query_key_value),
    (_at_place("*.Wqkv.weight"), "query, key and value", _query_key_value),
    # In GPT-2 and nanoGPT; in cross-attention only key and value.
    (_at_place("*.c_attn.weight"), "query, key and value", lambda _, n, m: [m] * (n // m)),
    (_at_place("*.gate_up_proj.weight"), "gate and up", 2),
    # Two linear functions of x, as gate and up.
    (_at_place("*LinearMaxout.*.weight"), "both pieces of maxout", 2),
    (_at_place("*ModernBertMLP.*.Wi.weight"), "input and gate", 2),
    (_at_place("*MambaMixer.*.in_proj.weight"), "hidden states and gate", 2),
    (_Use.multiplies, _HIDDEN, 1),
]


def _decide(uses: list[_Use]) -> tuple[Choice, str, View | None]:
    """The optimizer of a parameter, the reason, and the view of its matrices."""
    for applies, reason, parts in _RULES:
        use = next(filter(applies, uses), None)
        if use is None:
            continue
        if parts is None:
            return "others", reason.format(head=use.head), None
        shape = use.shape
        rows, columns = shape[:-3:-1] if use.is_transposed else shape[-2:]
        sizes = [rows // parts] * parts if isinstance(parts, int) else parts(use, rows, columns)
        if sum(sizes) != rows or (len(sizes) == 1 and parts != 1):
            continue
        view = partial(_matrices, sizes=sizes, groups=use.groups, transposed=use.is_transposed)
        count = sum(one.shape[:-2].numel() for one in view(torch.empty(shape, device="meta")))
        if count > 1:
            reason += f", seen as {count} matrices"
        if use.is_transposed:
            reason += ", stored transposed"
        is_whole = count == 1 and len(shape) == 2 and not use.is_transposed
        return "muon", reason, None if is_whole else view
    return "others", _UNKNOWN, None


def _matrices(p: Tensor, sizes: list[int], groups: int, transposed: bool) -> Sequence[Tensor]:
    """The matrices ``(out, in)`` of ``p``, which lie below each other; each may be a stack."""
    if groups:
        shape = [groups, p.shape[0] // groups, math.prod(p.shape[1:])]
        return [p.view(shape if groups > 1 else shape[1:])]
    return (p.mT if transposed else p).split(sizes, -2)  # type: ignore[no-any-return]
