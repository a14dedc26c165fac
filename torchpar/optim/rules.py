# SPDX-License-Identifier: MIT
"""Rules for which parameters are hidden matrices, and which hold several of them.

docs/muon.md names their sources. Layers of other libraries are known by their names and attributes.
"""

import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from operator import methodcaller
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from torchpar.errors import ConfigError
from torchpar.library import is_dtensor
from torchpar.optim.matrices import View

Choice = Literal["muon", "others"]

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_SCALINGS = {"_WeightNorm", "_SpectralNorm"}  # parametrizations that scale rows, or the whole matrix
_HEADS = ("head", "projection")  # last words of names: CLIP has a visual_ and a text_projection


class Decision(NamedTuple):
    """The optimizer of a parameter, the reason, and the view of its matrices."""

    choice: Choice
    reason: str
    view: View | None = None


class Use(NamedTuple):
    """A parameter of a layer.

    Attributes:
        role: "weight" if the layer multiplies by the parameter, up to a scaling.
        place: the classes of the layer's parent and of the layer, and the layer's name.
        head: the reason why the layer is an output head, or None.
    """

    name: str
    p: Tensor
    role: str
    layer: Any
    parent: Any
    place: str
    head: str | None


def uses_of(model: nn.Module) -> dict[Tensor, list[Use]]:
    """The layers of each parameter, of which there are several if they share it."""
    heads = _heads(model)
    uses: dict[Tensor, list[Use]] = {}
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
            use = Use(f"{prefix}.{name}".lstrip("."), p, role, layer, parent, place, heads.get(path))
            uses.setdefault(p, []).append(use)
    return uses


def decide(uses: list[Use]) -> Decision:
    """Choose the optimizer of a parameter by the first rule that applies to it.

    Raises:
        ConfigError: the parameter is a DTensor of one of torchpar's split layers.
    """
    use = uses[0]
    if is_dtensor(use.p) and hasattr(use.layer, "split_axes"):
        raise ConfigError(
            f"Muon.for_model: {use.name} is a DTensor of a ColumnParallelLinear or RowParallelLinear; under "
            "fully_shard, split the layer by parallelize_module instead"
        )
    if any(isinstance(one.layer, _EMBEDDINGS) for one in uses):
        return Decision("others", "embedding" if len(uses) == 1 else "embedding, shared with another layer")
    use = use._replace(head=next((one.head for one in uses if one.head), None))
    decisions = (rule(use) for rule in (_not_hidden, _convolution, _experts, _matrix))
    unknown = Decision("others", "no known layer multiplies by it; give a view")
    return next(filter(None, decisions), unknown)


def _not_hidden(use: Use) -> Decision | None:
    if isinstance(use.layer, _NORMS):
        return Decision("others", "normalization")
    if sum(n != 1 for n in use.p.shape) < 2:
        return Decision("others", "not a matrix")
    return Decision("others", use.head) if use.head else None


def _convolution(use: Use) -> Decision | None:
    p, layer = use.p, use.layer
    if not isinstance(layer, nn.modules.conv._ConvNd) or use.role != "weight":
        return None
    if layer.transposed:
        return Decision("others", "transposed convolution, stored by inputs; give a view")
    if layer.groups > 1 and p.shape[1] == 1:
        return Decision("others", "depthwise convolution, one filter for each channel")
    sizes = [p.shape[0] // layer.groups, math.prod(p.shape[1:])]
    if layer.groups > 1:
        sizes.insert(0, layer.groups)
    reason = f"convolution, seen as {'×'.join(map(str, sizes))}"
    return Decision("muon", reason, methodcaller("view", sizes))


def _experts(use: Use) -> Decision | None:
    """A stack of matrices in transformers, whose modules say how they are stored."""
    p, layer = use.p, use.layer
    if p.dim() != 3 or not hasattr(layer, "is_transposed"):
        return None
    view = partial(_split, transposed=layer.is_transposed)
    if use.role != "gate_up_proj":
        return Decision("muon", f"experts, seen as {len(p)} matrices", view)
    sizes = [p.shape[2 if layer.is_transposed else 1] // 2] * 2
    view = partial(view, sizes=sizes, interleaved=not layer.is_concatenated)
    return Decision("muon", f"gate and up of experts, seen as {2 * len(p)} matrices", view)


def _matrix(use: Use) -> Decision | None:
    p, layer = use.p, use.layer
    if p.dim() != 2:
        return None
    if isinstance(layer, nn.MultiheadAttention):
        return _fused("query, key and value", [layer.embed_dim] * (len(p) // layer.embed_dim))
    if isinstance(layer, _RECURRENT):
        return _fused("gates", [layer.hidden_size] * (len(p) // layer.hidden_size))
    if {"lora_A", "lora_B"} & set(use.name.split(".")):
        return Decision("muon", "LoRA factor")
    if use.role != "weight":
        return None
    if type(layer).__name__.endswith("Router"):
        return Decision("muon", "router of experts")
    transposed = hasattr(layer, "nf")  # transformers' Conv1D, whose weight is (in, out)
    if not transposed and not _is_linear(layer):
        return None
    rows, columns = (layer.nf, layer.nx) if transposed else (layer.out_features, layer.in_features)
    for pattern, (contents, sizes_of) in _FUSED.items():
        if fnmatchcase(use.place, pattern) and sum(sizes := sizes_of(use.parent, rows, columns)) == rows:
            return _fused(contents, sizes, transposed)
    return _fused("", [], transposed)


def _fused(contents: str, sizes: list[int], transposed: bool = False) -> Decision:
    """A weight of several matrices below each other, of ``sizes`` rows; or of one."""
    reason = f"{contents}, seen as {len(sizes)} matrices" if len(sizes) > 1 else "hidden matrix"
    if transposed:
        reason += ", stored transposed"
    view = partial(_split, sizes=sizes if len(sizes) > 1 else (), transposed=transposed)
    return Decision("muon", reason, view if transposed or len(sizes) > 1 else None)


# The rows of the matrices in a weight; rows that do not add up are those of another layout.


def _query_key_value(parent: Any, rows: int, columns: int) -> list[int]:
    if hasattr(parent, "num_key_value_heads") and hasattr(parent, "head_dim"):
        size = parent.num_key_value_heads * parent.head_dim
        return [rows - 2 * size, size, size]
    return [columns] * 3


def _multiples(parent: Any, rows: int, columns: int) -> list[int]:
    return [columns] * (rows // columns)  # in GPT-2's cross-attention only key and value


def _halves(parent: Any, rows: int, columns: int) -> list[int]:
    return [rows // 2] * 2


def _mamba(parent: Any, rows: int, columns: int) -> list[int]:
    return [parent.time_step_rank, parent.ssm_state_size, parent.ssm_state_size]


def _latent(parent: Any, rows: int, columns: int) -> list[int]:
    return [parent.kv_lora_rank, parent.qk_rope_head_dim]


_FUSED: dict[
    str, tuple[str, Callable[[Any, int, int], list[int]]]
] = {  # by place; `fully_shard` prefixes the classes
    "*Phi*Attention.*.qkv_proj": ("query, key and value", _query_key_value),
    "*.qkv": ("query, key and value", _query_key_value),
    "*.Wqkv": ("query, key and value", _query_key_value),
    "*Conv1D.c_attn": ("query, key and value", _multiples),
    "*CausalSelfAttention.*.c_attn": ("query, key and value", _query_key_value),  # nanoGPT
    "*.gate_up_proj": ("gate and up", _halves),
    "*ModernBertMLP.*.Wi": ("input and gate", _halves),
    "*MambaMixer.*.in_proj": ("hidden states and gate", _halves),
    "*MambaMixer.*.x_proj": ("time step, B and C", _mamba),
    "*.kv_a_proj_with_mqa": ("latents and rotary key", _latent),
}


def _split(
    p: Tensor, sizes: Sequence[int] = (), transposed: bool = False, interleaved: bool = False
) -> Tensor | Sequence[Tensor]:
    """Matrices ``(out, in)``: one, or several below each other or interleaved; perhaps each a stack."""
    p = p.mT if transposed else p
    if interleaved:
        return [p[..., i :: len(sizes), :] for i in range(len(sizes))]
    return p.split(sizes, -2) if sizes else p


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
