# SPDX-License-Identifier: MIT
"""Muon for the hidden matrices of a model, and another optimizer for its other parameters.

docs/muon.md names the sources of the rules. Layers of other libraries are known by names and attributes.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from operator import methodcaller
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer

from torchpar.errors import ConfigError
from torchpar.library import is_dtensor
from torchpar.optim.chained import ChainedOptimizer
from torchpar.optim.matrices import View

Choice = Literal["muon", "others"]

_WRAPPERS = {"module", "_orig_mod", "_checkpoint_wrapped_module"}
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_SCALINGS = {"_WeightNorm", "_SpectralNorm"}  # parametrizations that scale rows, or the whole matrix
_HEADS = ("head", "projection")  # last words of names: CLIP has a visual_ and a text_projection


class Assignment(NamedTuple):
    """The optimizer that takes a parameter, and why; without the parameter, which sharding may replace."""

    name: str
    shape: torch.Size
    choice: Choice
    reason: str
    view: View | None = None


class ModelOptimizer(ChainedOptimizer):
    """A chain of Muon and another optimizer, which prints the parameters of each.

    Attributes:
        assignments: of the model's parameters, in their order.
    """

    def __init__(self, assignments: list[Assignment], *optimizers: Optimizer):
        self.assignments = assignments
        super().__init__(*optimizers)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "assignments": self.assignments}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of the same parameters in the same order.

        Raises:
            ConfigError: it has other names, as that of other rules or overrides has; wrappers do not matter.
        """
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            pairs = zip(own["param_names"], saved.get("param_names", ()), strict=False)
            for name, loaded in pairs:
                if _unwrapped(name) != _unwrapped(loaded):
                    raise ConfigError(
                        f"Muon.for_model: the state dict has {loaded} where this optimizer has {name}; give "
                        "overrides with which both have the same parameters"
                    )
        super().load_state_dict(state_dict)

    def __repr__(self) -> str:
        names = {"muon": type(self.optimizers[0]).__name__, "others": type(self.optimizers[-1]).__name__}
        rows = [
            (one.name, "×".join(map(str, one.shape)), names[one.choice], one.reason)
            for one in self.assignments
        ]
        return aligned([("parameter", "shape", "optimizer", "reason"), *rows])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """The cells of a table in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _unwrapped(name: str) -> str:
    """The name of a parameter without those of wrappers, such as DistributedDataParallel's."""
    return ".".join(word for word in name.split(".") if word not in _WRAPPERS)


def chain(
    make_muon: Callable[..., Optimizer],
    model: nn.Module,
    others: Callable[[Iterable[Any]], Optimizer],
    overrides: Mapping[str, Choice],
    views: Mapping[str, View],
) -> ModelOptimizer:
    """Make both optimizers of `Muon.for_model`, which documents the arguments and the errors."""
    uses = _uses_of(model)
    assignments = {p: Assignment(of[0].name, p.shape, *_decide(p, of)) for p, of in uses.items()}

    def change(pattern: str, **changes: Any) -> None:
        named = [p for p, of in uses.items() if any(fnmatchcase(use.name, pattern) for use in of)]
        if not named:
            raise ConfigError(f"Muon.for_model: no parameter is named {pattern}")
        assignments.update((p, assignments[p]._replace(**changes)) for p in named)

    for pattern, view in views.items():
        change(pattern, choice="muon", reason="has a view", view=view)
    for pattern, choice in overrides.items():
        if choice not in ("muon", "others"):
            raise ConfigError(f"Muon.for_model: {pattern} goes to {choice!r}, expected 'muon' or 'others'")
        change(pattern, choice=choice, reason="override")
    matrices = [(one.name, p) for p, one in assignments.items() if one.choice == "muon"]
    rest = [(one.name, p) for p, one in assignments.items() if one.choice == "others"]
    if not matrices:
        raise ConfigError(
            "Muon.for_model: the model has no hidden matrix; take another optimizer, or overrides"
        )
    chosen = {one.name: one.view for one in assignments.values() if one.view and one.choice == "muon"}
    optimizers = [make_muon(matrices, views=chosen)]
    # Only matrices decay: a norm's scale that shrank would be scaled up again by the next layer.
    decaying = {"params": [(name, p) for name, p in rest if p.dim() > 1]}
    vectors = {"params": [(name, p) for name, p in rest if p.dim() <= 1], "weight_decay": 0.0}
    if groups := [group for group in (decaying, vectors) if group["params"]]:
        optimizers.append(others(groups))
    return ModelOptimizer(list(assignments.values()), *optimizers)


# The rules


class _Use(NamedTuple):
    """A parameter of a layer.

    Attributes:
        role: "weight" if the layer multiplies by the parameter, up to a scaling.
        place: the classes of the layer's parent and of the layer, and the layer's name.
        head: the reason why the layer is an output head, or None.
    """

    name: str
    role: str
    layer: Any
    parent: Any
    place: str
    head: str | None


def _uses_of(model: nn.Module) -> dict[Tensor, list[_Use]]:
    """The layers of each parameter, of which there are several if they share it."""
    heads = _heads(model)
    uses: dict[Tensor, list[_Use]] = {}
    for prefix, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            # weight_v is of the former weight_norm, weight_orig of the former spectral_norm and of pruning.
            path, role = prefix, name.removesuffix("_v").removesuffix("_orig")
            if isinstance(module, ParametrizationList):  # the parameter belongs to the parametrized layer
                path, _, role = f".{prefix}".rpartition(".parametrizations.")
                path = path.removeprefix(".")
                role = role if {type(one).__name__ for one in module} <= _SCALINGS else "parametrized"
            above, _, last = path.rpartition(".")
            layer, parent = model.get_submodule(path), model.get_submodule(above)
            place = f"{type(parent).__name__}.{type(layer).__name__}.{last}"
            use = _Use(f"{prefix}.{name}".lstrip("."), role, layer, parent, place, heads.get(path))
            uses.setdefault(p, []).append(use)
    return uses


_Decision = tuple[Choice, str, View | None]  # the optimizer, the reason, and the view of the matrices


def _decide(p: Any, uses: list[_Use]) -> _Decision:
    """Choose the optimizer of a parameter by the first rule that applies to it."""
    use = uses[0]
    if is_dtensor(p) and hasattr(use.layer, "split_axes"):
        raise ConfigError(
            f"Muon.for_model: {use.name} is a DTensor of a ColumnParallelLinear or RowParallelLinear; under "
            "fully_shard, split the layer by parallelize_module instead"
        )
    reason = ""
    if any(isinstance(one.layer, _EMBEDDINGS) for one in uses):
        reason = "embedding" if len(uses) == 1 else "embedding, shared with another layer"
    elif isinstance(use.layer, _NORMS):
        reason = "normalization"
    elif sum(n != 1 for n in p.shape) < 2:
        reason = "not a matrix"
    reason = reason or next((one.head for one in uses if one.head), "")
    if reason:
        return "others", reason, None
    if isinstance(use.layer, nn.modules.conv._ConvNd) and use.role == "weight":
        return _convolution(p, use.layer)
    found = None
    if p.dim() == 3 and hasattr(use.layer, "is_transposed"):
        found = _experts(p, use)
    elif p.dim() == 2:
        found = _matrix(p, use)
    return found or ("others", "no known layer multiplies by it; give a view", None)


def _convolution(p: Tensor, layer: nn.modules.conv._ConvNd) -> _Decision:
    if layer.transposed:
        return "others", "transposed convolution, stored by inputs; give a view", None
    if layer.groups > 1 and p.shape[1] == 1:
        return "others", "depthwise convolution, one filter for each channel", None
    sizes = [p.shape[0] // layer.groups, math.prod(p.shape[1:])]
    if layer.groups > 1:
        sizes.insert(0, layer.groups)
    return "muon", f"convolution, seen as {'×'.join(map(str, sizes))}", methodcaller("view", sizes)


def _experts(p: Tensor, use: _Use) -> _Decision | None:
    """A stack of matrices in transformers, whose modules say how they are stored."""
    transposed = use.layer.is_transposed
    if use.role != "gate_up_proj":
        return "muon", f"experts, seen as {len(p)} matrices", partial(_split, transposed=transposed)
    if not use.layer.is_concatenated:
        return None  # gate and up are interleaved
    sizes = [p.shape[2 if transposed else 1] // 2] * 2
    view = partial(_split, sizes=sizes, transposed=transposed)
    return "muon", f"gate and up of experts, seen as {2 * len(p)} matrices", view


def _matrix(p: Tensor, use: _Use) -> _Decision | None:
    layer = use.layer
    if isinstance(layer, nn.MultiheadAttention):
        return _fused("query, key and value", [layer.embed_dim] * (len(p) // layer.embed_dim))
    if isinstance(layer, _RECURRENT):
        return _fused("gates", [layer.hidden_size] * (len(p) // layer.hidden_size))
    if {"lora_A", "lora_B"} & set(use.name.split(".")):
        return "muon", "LoRA factor", None
    if use.role != "weight":
        return None
    if type(layer).__name__.endswith("Router"):
        return "muon", "router of experts", None
    transposed = hasattr(layer, "nf")  # transformers' Conv1D, whose weight is (in, out)
    if not transposed and not _is_linear(layer):
        return None
    rows, columns = p.shape[::-1] if transposed else p.shape
    for pattern, (contents, sizes_of) in _FUSED.items():
        # Rows that do not add up are those of another layout.
        if fnmatchcase(use.place, pattern) and sum(sizes := sizes_of(use.parent, rows, columns)) == rows:
            return _fused(contents, sizes, transposed)
    return _fused("", [], transposed)


def _fused(contents: str, sizes: list[int], transposed: bool = False) -> _Decision:
    """A weight of several matrices below each other, of ``sizes`` rows; or of one."""
    sizes = sizes if len(sizes) > 1 else []
    reason = f"{contents}, seen as {len(sizes)} matrices" if sizes else "hidden matrix"
    if transposed:
        reason += ", stored transposed"
    return (
        "muon",
        reason,
        partial(_split, sizes=sizes, transposed=transposed) if transposed or sizes else None,
    )


def _split(p: Tensor, sizes: Sequence[int] = (), transposed: bool = False) -> Tensor | Sequence[Tensor]:
    """Matrices ``(out, in)``: one, or several below each other; perhaps each a stack."""
    p = p.mT if transposed else p
    return p.split(sizes, -2) if sizes else p


def _query_key_value(parent: Any, rows: int, columns: int) -> list[int]:
    if hasattr(parent, "num_key_value_heads") and hasattr(parent, "head_dim"):
        size = parent.num_key_value_heads * parent.head_dim
        return [rows - 2 * size, size, size]
    return [columns] * 3


# By place, the rows of the matrices in a weight; `fully_shard` prefixes the classes.
_FUSED: dict[str, tuple[str, Callable[[Any, int, int], list[int]]]] = {
    "*Phi*Attention.*.qkv_proj": ("query, key and value", _query_key_value),
    "*.qkv": ("query, key and value", _query_key_value),
    "*.Wqkv": ("query, key and value", _query_key_value),
    # Of GPT-2 and nanoGPT; in cross-attention only key and value.
    "*.c_attn": ("query, key and value", lambda _, rows, columns: [columns] * (rows // columns)),
    "*.gate_up_proj": ("gate and up", lambda _, rows, columns: [rows // 2] * 2),
    "*ModernBertMLP.*.Wi": ("input and gate", lambda _, rows, columns: [rows // 2] * 2),
    "*MambaMixer.*.in_proj": ("hidden states and gate", lambda _, rows, columns: [rows // 2] * 2),
    "*MambaMixer.*.x_proj": (
        "time step, B and C",
        lambda mixer, rows, columns: [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size],
    ),
    "*.kv_a_proj_with_mqa": (
        "latents and rotary key",
        lambda attention, rows, columns: [attention.kv_lora_rank, attention.qk_rope_head_dim],
    ),
}


def _is_linear(module: nn.Module) -> bool:
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def _heads(model: nn.Module) -> dict[str, str]:
    """The output heads: the last linear layer, unless it is in one of several equal blocks.

    Beside a text_projection, say, a visual_projection is a head, too. Returns the reasons by path.
    """
    linear = [path for path, one in model.named_modules() if path and _is_linear(one) and "lora_" not in path]
    if not linear:
        return {}
    parts = linear[-1].split(".")
    for depth in range(1, len(parts)):
        parent, block = (model.get_submodule(".".join(parts[:end])) for end in (depth - 1, depth))
        if sum(_kinds(child) == _kinds(block) for child in parent.children()) > 1:
            return {}
    heads = {linear[-1]: "output head, the last linear layer"}
    word = parts[-1].rpartition("_")[2]
    for path in linear[:-1]:
        above, last = path.split(".")[:-1], path.split(".")[-1]
        if word in _HEADS and last.endswith(f"_{word}") and above == parts[:-1]:
            heads[path] = f"output head, as {parts[-1]} is"
    return heads


def _kinds(module: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(child)) for name, child in module.named_modules()]
