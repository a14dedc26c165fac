# SPDX-License-Identifier: MIT
"""Muon.for_model on real architectures: which parameters are hidden matrices, and how they are
seen."""

import copy
import doctest
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from architectures import make_model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.utils import parametrizations
from torch.testing import assert_close

from torchpar.errors import ConfigError
from torchpar.nn import MLP, LinearMaxout
from torchpar.optim import Muon, muon
from torchpar.optim.assign import Assignment
from torchpar.parallel.split.parts import Part, mark_slice


def test_the_example_prints_its_table_and_trains_every_parameter():
    (example,) = doctest.DocTestFinder(recurse=False).find(Muon.for_model, "for_model", module=muon)
    names: dict[str, Any] = {"Muon": Muon, "torch": torch}
    example.globs = names
    assert doctest.DocTestRunner().run(example, clear_globs=False) == (0, len(example.examples))
    model, chain = names["model"], names["optimizer"]
    model(torch.arange(10)).square().mean().backward()
    before = copy.deepcopy(model.state_dict())
    chain.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert str(copy.deepcopy(chain)) == str(chain)


# Architectures of transformers

# The parameters with two axes and more, by the shapes of their matrices. The others have one.
EXPECTED = {
    "phi3": {
        "32×32": "o_proj",
        "32×32 16×32 16×32": "qkv_proj",
        "40×32 40×32": "gate_up_proj",
        "32×40": "down_proj",
        "others": "embed_tokens lm_head",
    },
    "deepseek_v3": {
        "12×32": "q_a_proj",
        "48×12": "q_b_proj",
        "14×32": "kv_a_proj_with_mqa",
        "56×10": "kv_b_proj",
        "32×24": "o_proj down_proj",
        "40×32": "gate_proj up_proj",  # of the dense layer
        "32×40": "down_proj",
        "24×32": "gate_proj up_proj",  # of the shared expert
        "3×24×32 3×24×32": "gate_up_proj",
        "3×32×24": "down_proj",
        "3×32": "gate",
        "others": "embed_tokens lm_head",
    },
    "gpt2": {
        "32×32 32×32 32×32": "c_attn",
        "32×32": "c_proj",
        "40×32": "c_fc",
        "32×40": "c_proj",
        "others": "wte wpe",
    },
    "mamba": {
        "64×32 64×32": "in_proj",
        "10×64": "x_proj",
        "64×2": "dt_proj",
        "32×64": "out_proj",
        "others": "embeddings A_log conv1d",
    },
    "modernbert": {
        "32×32 32×32 32×32": "Wqkv",
        "32×32": "Wo dense",
        "40×32 40×32": "Wi",
        "32×40": "Wo",
        "others": "tok_embeddings",
    },
}


def table(model: nn.Module, **arguments: Any) -> dict[str, str]:
    """The last words of the parameters' names, by the shapes of their matrices, or "others"."""
    names: dict[str, dict[str, None]] = {}
    for one in Muon.for_model(model, **arguments).assignments:
        if one.choice == "muon" or len(one.shape) > 1:
            word = one.name.removesuffix(".weight").rpartition(".")[2]
            names.setdefault(shapes(one) if one.choice == "muon" else "others", {})[word] = None
    return {key: " ".join(words) for key, words in names.items()}


def shapes(one: Assignment) -> str:
    t = torch.empty(one.shape, device="meta")
    views = t if one.view is None else one.view(t)
    views = [views] if isinstance(views, Tensor) else views
    return " ".join("×".join(map(str, view.shape)) for view in views)


@pytest.mark.parametrize("name", EXPECTED)
def test_architectures(name):
    """The table is as expected, and a step after a backward pass changes each parameter with a
    gradient."""
    torch.manual_seed(0)
    model = make_model(name)
    words = {key: set(names.split()) for key, names in table(model).items()}
    assert words == {key: set(names.split()) for key, names in EXPECTED[name].items()}
    optimizer = Muon.for_model(model, 0.1)
    model(input_ids=torch.randint(3, 96, (2, 8))).logits.logsumexp(-1).sum().backward()
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    changed = {key for key, p in model.state_dict().items() if not torch.equal(p, before[key])}
    given = {key for key, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert given <= changed
    assert {one.name for one in optimizer.assignments if one.choice == "muon"} <= given


class LoRA(nn.Module):
    """A linear layer and an adapter, as the package peft names it."""

    def __init__(self, *sizes: int):
        super().__init__()
        self.base_layer = nn.Linear(*sizes, bias=False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(sizes[0], 3, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(3, sizes[1], bias=False)})


def test_both_factors_of_lora_go_to_muon():
    """Also those of the head; the head is not the last factor."""
    found = Muon.for_model(nn.Sequential(nn.Sequential(LoRA(4, 5)), LoRA(5, 6))).assignments
    factors = ["LoRA factor"] * 2
    expected = ["hidden matrix", *factors, "output head, the last linear layer", *factors]
    assert [one.reason for one in found] == expected
    assert [one.name for one in found if one.choice == "others"] == ["1.base_layer.weight"]


# Layers of PyTorch, and others that are known by their names and attributes


def test_both_pieces_of_maxout_are_updated_as_two_layers_are():
    """Also the one that is the model itself, and not as one matrix of all rows."""
    torch.manual_seed(0)
    fused, alone = MLP((6, 5, 4), "maxout"), LinearMaxout(6, 5)
    pieces = nn.ModuleList(nn.Linear(6, 5) for _ in range(2))
    alone.load_state_dict(fused.layers[0].state_dict())
    for piece, weight in zip(pieces, alone.weight.detach().chunk(2), strict=True):
        piece.weight.data.copy_(weight)
    gradient = torch.randn(10, 6)
    fused.layers[0].weight.grad, alone.weight.grad = gradient.clone(), gradient.clone()
    for piece, part in zip(pieces, gradient.chunk(2), strict=True):
        piece.weight.grad = part.clone()
    optimizers = [
        Muon.for_model(model, 0.1, overrides={pattern: "muon"})
        for model, pattern in ((fused, "layers.*.weight"), (alone, "weight"), (pieces, "*.weight"))
    ]
    assert [shapes(one) for one in optimizers[0].assignments if one.name == "layers.0.weight"] == [
        "5×6 5×6"
    ]
    before = alone.weight.detach().clone()
    for optimizer in optimizers:
        optimizer.step()
    expected = torch.cat([piece.weight.detach() for piece in pieces])
    for weight in (fused.layers[0].weight, alone.weight):
        assert_close(weight.detach(), expected)
    whole = nn.Linear(6, 10, bias=False)
    whole.weight.data.copy_(before)
    whole.weight.grad = gradient.clone()
    Muon([whole.weight], 0.1).step()
    assert not torch.allclose(whole.weight.detach(), expected, atol=1e-3)


class Experts(nn.Module):
    """Experts stored as GPT-OSS does: ``(experts, in, out)``; gate and up are interleaved and need
    a view."""

    is_transposed, is_concatenated = True, False

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 10))
        self.gate_up_proj_bias = nn.Parameter(torch.randn(3, 10))
        self.down_proj = nn.Parameter(torch.randn(3, 5, 8))


def test_a_matrix_stored_transposed_is_updated_like_its_transpose():
    """The learning rate's factor is that of ``(out, in)``: 2 for 4 times as many outputs as
    inputs."""
    of_gpt2 = pytest.importorskip("transformers.pytorch_utils", reason="transformers has the layer")
    torch.manual_seed(0)
    layer, linear = of_gpt2.Conv1D(24, 6), nn.Linear(6, 24, bias=False)
    linear.weight.data.copy_(layer.weight.mT)
    linear.weight.grad = torch.randn(24, 6)
    layer.weight.grad = linear.weight.grad.mT.contiguous()
    Muon.for_model(nn.ModuleList([layer]), 0.1, ns="standard").step()
    Muon([linear.weight], 0.1, ns="standard").step()
    # Products of the transposed layout may add in another order: an update of 2·1.2 times 0.1, in
    # bfloat16.
    assert_close(layer.weight.mT, linear.weight, rtol=0, atol=0.1 * 2 * 1.2 * 2**-7)


WEIGHT_NORM = {"others": "original0", "5×4": "original1"}
LSTM = {"4×6 4×6 4×6 4×6": "weight_ih_l0", "4×3 4×3 4×3 4×3": "weight_hh_l0", "3×4": "weight_hr_l0"}


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda: nn.LayerNorm((4, 16)), {"others": "layer bias"}),
        (lambda: nn.Conv2d(3, 8, 3), {"8×27": "layer"}),
        (lambda: nn.Linear(1, 16), {"others": "layer"}),  # a column is not a matrix
        (lambda: nn.Conv1d(8, 12, 3, groups=4), {"4×3×6": "layer"}),
        (lambda: nn.Conv1d(4, 8, 3, groups=4), {"others": "layer"}),  # two filters for each channel
        (lambda: nn.LSTM(6, 4, proj_size=3), LSTM),
        (lambda: nn.GRUCell(6, 4), {"4×6 4×6 4×6": "weight_ih", "4×4 4×4 4×4": "weight_hh"}),
        (lambda: nn.Bilinear(3, 4, 5), {"others": "layer"}),
        (lambda: nn.ConvTranspose1d(4, 6, 3), {"others": "layer"}),
        (lambda: nn.utils.spectral_norm(nn.Linear(4, 5)), {"5×4": "weight_orig"}),
        (lambda: parametrizations.weight_norm(nn.Linear(4, 5)), WEIGHT_NORM),
        (lambda: parametrizations.spectral_norm(nn.Linear(4, 5)), {"5×4": "original"}),
        (lambda: parametrizations.orthogonal(nn.Linear(4, 5)), {"others": "original"}),
        (lambda: nn.utils.weight_norm(nn.Linear(4, 5)), {"others": "weight_g", "5×4": "weight_v"}),
        (lambda: nn.ModuleDict({"qkv": nn.Linear(4, 12)}), {"4×4 4×4 4×4": "qkv"}),
        (lambda: nn.ModuleDict({"qkv": nn.Linear(6, 9)}), {"9×6": "qkv"}),  # of unknown sizes
        # Of cross-attention.
        (lambda: nn.ModuleDict({"c_attn": nn.Linear(4, 8)}), {"4×4 4×4": "c_attn"}),
        (Experts, {"others": "gate_up_proj gate_up_proj_bias", "3×8×5": "down_proj"}),
        (lambda: nn.ModuleDict({"gate_up_proj": nn.Linear(4, 7)}), {"7×4": "gate_up_proj"}),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_layers(make, expected):
    model = nn.ModuleDict({"layer": make(), "hidden": nn.Linear(7, 9), "head": nn.Linear(9, 2)})
    found = table(model)
    assert found.pop("9×7") == "hidden"
    *rest, head = found.pop("others").split()
    assert head == "head"
    assert found | ({"others": " ".join(rest)} if rest else {}) == expected


@pytest.mark.parametrize("name", ["weight_norm", "orthogonal", "spectral_norm"])
def test_a_parametrized_head_is_a_head(name):
    model = nn.Sequential(nn.Linear(4, 5), getattr(parametrizations, name)(nn.Linear(5, 6)))
    assert [one.name for one in Muon.for_model(model).assignments if one.choice == "muon"] == [
        "0.weight"
    ]


def test_heads_are_siblings_of_one_name():
    layers = dict(policy_head=nn.Linear(4, 3), body=nn.Linear(4, 4), value_head=nn.Linear(4, 1))
    assert table(nn.ModuleDict(layers)) == {"others": "policy_head value_head", "4×4": "body"}
    layers = dict(first_layer=nn.Linear(4, 3), last_layer=nn.Linear(3, 2))
    assert table(nn.ModuleDict(layers)) == {"3×4": "first_layer", "others": "last_layer"}


def make(tied: bool = False) -> nn.Module:
    """A table, two blocks, a head that may share the table, and a parameter of no layer."""
    layer = partial(nn.TransformerEncoderLayer, 16, nhead=4, dim_feedforward=32)
    model = nn.ModuleDict(
        {"tokens": nn.Embedding(50, 16), "blocks": nn.ModuleList([layer(), layer()])}
    )
    model.stack = nn.Parameter(torch.randn(4, 16, 8))
    model["head"] = nn.Linear(16, 50)
    if tied:
        model["head"].weight = model["tokens"].weight
    return model


def test_muon_gets_the_hidden_matrices_alone():
    def by_muon(model: nn.Module, **arguments: Any) -> list[str]:
        assignments = Muon.for_model(model, **arguments).assignments
        return sorted(one.name for one in assignments if one.choice == "muon")

    model, tied = make(), make(tied=True)
    layers = (
        "linear1.weight",
        "linear2.weight",
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
    )
    hidden = [f"blocks.{i}.{name}" for i in range(2) for name in layers]
    assert by_muon(model) == by_muon(tied) == hidden
    overrides = {"blocks.*": "others", "blocks.1.linear1.weight": "muon", "head.weight": "muon"}
    assert by_muon(model, overrides=overrides) == ["blocks.1.linear1.weight", "head.weight"]
    assert "stack" in by_muon(model, views={"stack": lambda p: p})
    assert "tokens.weight" in by_muon(tied, overrides={"head.weight": "muon"})
    apart = nn.MultiheadAttention(16, 4, kdim=8)  # query, key and value have a weight each
    assert by_muon(apart) == ["k_proj_weight", "q_proj_weight", "v_proj_weight"]
    assert not any(one.view for one in Muon.for_model(apart).assignments)
    del model["head"]
    assert by_muon(model) == hidden  # the last linear layer is of one of several blocks
    chain = Muon.for_model(
        make(), lr=0.02, others=partial(torch.optim.SGD, lr=0.5, weight_decay=0.1)
    )
    own, others = chain.optimizers
    assert (own.defaults["lr"], type(others)) == (0.02, torch.optim.SGD)
    assert [group["weight_decay"] for group in others.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"overrides": {"block.*": "muon"}},
            r"named block\.\*, expected a name or pattern such as stack",
        ),
        ({"overrides": {"stack": "adam"}}, "stack goes to 'adam', expected 'muon' or 'others'"),
        ({"model": [nn.Linear(2, 2)]}, "model is of type list, expected a Module"),
        ({"others": 3e-4}, "others is of type float, expected a function"),
        ({"others": lambda groups: None}, "others returns a NoneType, expected an optimizer"),
        ({"views": ["stack"]}, "views is of type list, expected a dictionary"),
        ({"process_group": "all"}, "process_group is of type str, expected a process group"),
        ({"overrides": {"*": "others"}}, "after overrides no parameter is left for Muon"),
        ({"model": nn.Embedding(3, 2)}, "the model has no hidden matrix; take another optimizer"),
        (
            {"model": nn.ParameterDict({"w": torch.ones(3, 2)})},
            "no known layer multiplies by w; if yours does, name it by overrides={'w': 'muon'}, or",
        ),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        Muon.for_model(**{"model": make(), **arguments})


def test_a_shard_of_one_row_is_a_matrix_as_on_the_other_ranks():
    """The whole of a shard decides; a vector stays none."""
    mesh, model = Mock(spec=DeviceMesh), nn.Sequential(*(nn.Linear(7, 1) for _ in range(3)))
    assert model[1].weight not in updated_by_muon(model)
    mark_slice(model[1].weight, Part((3, 7), (2, 0), (1, 7), mesh, 0))
    assert model[1].weight in updated_by_muon(model)


def updated_by_muon(model: nn.Module) -> set[Tensor]:
    try:
        optimizer: Any = Muon.for_model(model, overrides={"0.weight": "muon"})
    except ConfigError:
        return set()
    return {p for group in optimizer.optimizers[0].param_groups for p in group["params"]}


def test_a_parameter_that_the_model_has_replaced_is_named():
    model = make()
    optimizer = Muon.for_model(model)
    model["head"].bias = nn.Parameter(torch.zeros(50))
    with pytest.raises(
        ValueError, match=r"head\.bias is no longer a parameter of the model; reshard"
    ):
        optimizer.step()
