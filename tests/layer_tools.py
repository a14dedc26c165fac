# SPDX-License-Identifier: MIT
"""Tools that change the linear layers of a model, their stand-ins, and what they make of a layer.

A tool is a function of a model, whose only child is the layer, and of the layer's input. It returns
a result and the right result.
"""

import copy
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from torchpar.nn import HIDDEN_LAYERS

Tool = Callable[[nn.Sequential, Tensor], tuple[Tensor, Tensor]]
REFUSALS = (ValueError, TypeError, RuntimeError)  # and NotImplementedError, a RuntimeError
SIZE = 64  # a multiple of 16, which tools for GPUs demand


class ByInheritance(nn.Linear):
    """A sigmoid's layer that is a `torch.nn.Linear` and no linear map: what tools get wrong."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sigmoid()


def outcome(tool: Tool, make: Callable[[int, int], nn.Module]) -> str:
    """What a tool makes of a layer: "right", "left as it is", "raises" or "wrong"."""
    torch.manual_seed(0)
    layer, x = make(SIZE, SIZE), torch.randn(16, SIZE)
    with torch.no_grad():
        layer.bias.normal_()
    model = nn.Sequential(copy.deepcopy(layer)).eval()
    try:
        actual, expected = tool(model, x)
    except REFUSALS:
        return "raises"
    # An element is a sum of at most 2·SIZE terms, which may be added in another order.
    bound = 2 * SIZE * torch.finfo(expected.dtype).eps * expected.abs().max()
    if not ((actual - expected).abs() <= bound).all():
        return "wrong"
    is_left = type(model[0]) is type(layer) and [*model[0].state_dict()] == [*layer.state_dict()]
    if is_left and all(map(torch.equal, model[0].parameters(), layer.parameters())):
        return "left as it is"
    return "right"


# Tools of PyTorch


def pruning(model: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    expected = copy.deepcopy(model)
    weight = expected[0].weight.data
    weight[weight.abs() <= weight.abs().flatten().median()] = 0
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model(x), expected(x)


def dynamic_quantization(model: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    expected = model(x)
    with warnings.catch_warnings(action="ignore"):
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)
    return model(x), expected


def tracing(model: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    expected = model(x)
    traced = torch.fx.symbolic_trace(model)
    model[0] = traced
    return traced(x), expected


def _initialized(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """The weight, and the weight within the bounds of an initialization, which has no NaN."""
    bound = (6 / (layer.in_features + layer.out_features)) ** 0.5  # Xavier's
    assert not layer.weight.eq(0).all()
    return layer.weight, layer.weight.clamp(-bound, bound).nan_to_num()


# Stand-ins, which go by `isinstance(m, torch.nn.Linear)` as those that they stand for


class _Adapted(nn.Module):
    """A layer as peft's LoRA sees it: a product of two factors is added to its result."""

    def __init__(self, layer: nn.Linear, rank: int = 4):
        super().__init__()
        self.layer = layer
        self.a = nn.Parameter(torch.randn(rank, layer.in_features))
        self.b = nn.Parameter(torch.randn(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.a.T @ self.b.T

    def merged(self) -> nn.Linear:
        self.layer.weight.data += self.b @ self.a
        return self.layer


def adapter(model: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """peft's LoRA by ``target_modules``."""
    if not isinstance(model[0], nn.Linear):
        raise ValueError(f"Target module {model[0]} is not supported")
    model[0] = _Adapted(model[0])
    return model(x), copy.deepcopy(model[0]).merged()(x)


def replacement(model: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """torchao's `convert_to_float8_training`: a linear layer of its own takes the parameters."""
    expected = model(x)
    if isinstance(model[0], nn.Linear):
        own = nn.Linear(SIZE, SIZE)
        own.load_state_dict(model[0].state_dict())
        model[0] = own
    return model(x), expected


def initialization(model: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """transformers' `from_pretrained` of a file that lacks the layer's weight.

    The weight is memory without values, the bias is loaded. Then transformers asks the layer
    whether it is initialized, and initializes it if it knows the layer.
    """
    layer = model[0]
    loaded = layer.bias.clone()
    layer.weight.data.fill_(torch.nan)
    layer.bias._is_hf_initialized = True
    as_transformers = {"layer": layer, "__name__": "transformers.modeling_utils"}
    if not eval('getattr(layer, "_is_hf_initialized", False)', as_transformers):
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
        layer._is_hf_initialized = True
    assert torch.equal(layer.bias, loaded)
    return _initialized(layer)


STAND_INS: dict[str, Tool] = {
    "adapter": adapter,
    "replacement": replacement,
    "initialization": initialization,
}


# Tools of packages, which are imported where they are called


def lora(model: nn.Sequential, x: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    import peft

    config = peft.LoraConfig(r=4, init_lora_weights=False, **options)
    adapted = peft.get_peft_model(model, config)
    return adapted(x), copy.deepcopy(adapted).merge_and_unload()(x)


def quantization(model: nn.Sequential, x: Tensor, dynamic: bool) -> tuple[Tensor, Tensor]:
    from torchao import quantization

    kind = "Int8DynamicActivationInt8Weight" if dynamic else "Int8WeightOnly"
    expected = model(x)
    quantization.quantize_(model, getattr(quantization, f"{kind}Config")())
    return model(x), expected


def float8(model: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    expected = model(x)
    convert_to_float8_training(model, config=Float8LinearConfig(emulate=True))
    return model(x), expected


def pretrained(model: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """A file that lacks the layer's weight, which must then be initialized, not be left empty."""
    from safetensors.torch import save_file
    from transformers import PretrainedConfig, PreTrainedModel

    class Model(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self, config: PretrainedConfig):
            super().__init__(config)
            self.layer = type(model[0])(SIZE, SIZE)
            self.post_init()

    state = {"layer.bias": model[0].bias.detach()}
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # memory without values then holds NaN
    try:
        with TemporaryDirectory() as folder:
            Model(PretrainedConfig()).save_pretrained(folder)
            save_file(state, Path(folder, "model.safetensors"), metadata={"format": "pt"})
            loaded = Model.from_pretrained(folder)
    finally:
        torch.use_deterministic_algorithms(is_deterministic)
    assert torch.equal(loaded.layer.bias, model[0].bias)
    model[0] = loaded.layer
    return _initialized(loaded.layer)


def timm_initialization(model: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    from timm.models import named_apply
    from timm.models.vision_transformer import init_weights_vit_timm

    model[0].weight.data.fill_(torch.nan)
    named_apply(init_weights_vit_timm, model)
    return _initialized(model[0])


def schedule_free(model: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """Three steps with the layer, and with the same parameters and their gradients alone."""
    from schedulefree import AdamWScheduleFree

    alone = [p.detach().clone().requires_grad_() for p in model.parameters()]
    chosen = [AdamWScheduleFree(ps, lr=0.1) for ps in (model.parameters(), alone)]
    for optimizer in chosen:
        optimizer.train()
    for _ in range(3):
        model(x).square().sum().backward()
        for p, q in zip(model.parameters(), alone, strict=True):
            q.grad = p.grad.clone()
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad()
    for optimizer in chosen:
        optimizer.eval()
    expected = copy.deepcopy(model)
    for p, q in zip(expected.parameters(), alone, strict=True):
        p.data = q.detach()
    return model(x), expected(x)


CLIENTS: dict[str, tuple[str, Tool]] = {
    "peft's LoRA, by `target_modules`": ("peft", partial(lora, target_modules=["0"])),
    "peft's DoRA, by `target_modules`": (
        "peft",
        partial(lora, target_modules=["0"], use_dora=True),
    ),
    "peft's LoRA, by `target_parameters`": ("peft", partial(lora, target_parameters=["0.weight"])),
    "torchao's `quantize_`, of weights": ("torchao", partial(quantization, dynamic=False)),
    "torchao's `quantize_`, of weights and inputs": (
        "torchao",
        partial(quantization, dynamic=True),
    ),
    "torchao's `convert_to_float8_training`": ("torchao", float8),
    "transformers' `from_pretrained`": ("transformers", pretrained),
    "timm's `init_weights_vit_timm`": ("timm", timm_initialization),
    "schedulefree's `AdamWScheduleFree`": ("schedulefree", schedule_free),
}
"""The tools of packages by their row in the page's table, with the package."""
OF_PYTORCH: dict[str, Tool] = {
    "`torch.nn.utils.prune`": pruning,
    "`torch.ao.quantization.quantize_dynamic`": dynamic_quantization,
    "`torch.fx.symbolic_trace`": tracing,
}
LAYERS = {one.__name__: one for one in HIDDEN_LAYERS.values()}
