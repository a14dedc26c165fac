# SPDX-License-Identifier: MIT
"""Output heads of models with one or several, and what the table says where a layer is in doubt."""

import ast
import copy
import io
import pickle
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from torchpar.errors import ConfigError
from torchpar.optim import Muon
from torchpar.optim.heads import find_heads


def made(**modules: nn.Module) -> nn.Module:
    """A module with these attributes, in their order."""
    whole = nn.Module()
    for name, module in modules.items():
        setattr(whole, name, module)
    return whole


def attention(d: int, keys: int | None = None) -> nn.Module:
    sizes = {"q_proj": d, "k_proj": keys or d, "v_proj": keys or d, "o_proj": d}
    return made(**{name: nn.Linear(d, width) for name, width in sizes.items()})


def block(d: int = 16, **more: nn.Module) -> nn.Module:
    mlp = made(up_proj=nn.Linear(d, 40), down_proj=nn.Linear(40, d))
    return made(attn=attention(d, 8), mlp=mlp, norm=nn.LayerNorm(d), **more)


def trunk(count: int = 2, d: int = 16, **more: Callable[[], nn.Module]) -> nn.Module:
    blocks = (block(d, **{name: make() for name, make in more.items()}) for _ in range(count))
    return made(tokens=nn.Embedding(50, d), blocks=nn.ModuleList(blocks))


def adapted(*sizes: int) -> nn.Module:
    """A layer and its adapter, as the package peft has them; the outer module has their widths."""
    layer = made(base_layer=nn.Linear(*sizes), lora_A=nn.Linear(sizes[0], 2))
    layer.lora_B = nn.Linear(2, sizes[1])
    layer.in_features, layer.out_features = sizes
    return layer


def net(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for pair in pairwise(sizes):
        layers += [nn.Linear(*pair), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def auxiliary(classes: int = 10) -> nn.Module:
    return made(conv=nn.Conv2d(8, 12, 1), fc1=nn.Linear(48, 20), fc2=nn.Linear(20, classes))


def boxes() -> nn.Module:
    head = made(fc6=nn.Linear(8 * 49, 20), fc7=nn.Linear(20, 20))
    predictor = made(cls_score=nn.Linear(20, 3), bbox_pred=nn.Linear(20, 12))
    return made(box_head=head, box_predictor=predictor, mask=nn.Conv2d(8, 8, 3))


# A model, its heads, and the layers that may be some.
CASES: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "a value head": (
        lambda: made(body=trunk(), lm_head=nn.Linear(16, 50), v=net(16, 16, 3)),
        "lm_head v.2",
        "",
    ),
    "distilled": (
        lambda: made(vit=trunk(), fc=nn.Linear(16, 10), fc_dist=nn.Linear(16, 10)),
        "fc fc_dist",
        "",
    ),
    "auxiliary classifiers": (
        lambda: made(
            conv=nn.Conv2d(3, 8, 3), aux1=auxiliary(), aux2=auxiliary(), fc=nn.Linear(8, 10)
        ),
        "aux1.fc2 aux2.fc2 fc",
        "",
    ),
    "an actor and a critic": (
        lambda: made(actor=net(9, 16, 16, 5), critic=net(9, 16, 16, 7)),
        "actor.4 critic.4",
        "",
    ),
    # The critic may take the action.
    "a critic of actions": (
        lambda: made(actor=net(9, 16, 16, 5), critic=net(14, 16, 16, 7)),
        "critic.4",
        "actor.4",
    ),
    "a detector": (
        lambda: made(inner=made(fpn=nn.Conv2d(8, 8, 1), roi_heads=boxes())),
        "inner.roi_heads.box_predictor.cls_score inner.roi_heads.box_predictor.bbox_pred",
        "inner.roi_heads.mask",
    ),
    "convolutions as heads": (
        lambda: made(
            body=nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)),
            scores=nn.Conv2d(8, 21, 1), boxes=nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 5, 1)),
        ),
        "",
        "scores boxes.1",
    ),
    "a list of tasks": (
        lambda: made(body=net(9, 16, 24), tasks=nn.ModuleList(nn.Linear(24, 5) for _ in range(3))),
        "tasks.0 tasks.1 tasks.2",
        "",
    ),
    "networks as tasks": (
        lambda: made(body=net(9, 16), tasks=nn.ModuleDict({"a": net(16, 16, 3), "b": net(16, 5)})),
        "tasks.a.2 tasks.b.0",
        "",
    ),
    "one block with fewer keys": (
        lambda: made(body=trunk(1), head=nn.Linear(16, 50)),
        "head",
        "",
    ),
    "no head": (lambda: trunk(3), "", ""),
    "a router at the end of each block": (
        lambda: made(body=trunk(gate=lambda: nn.Linear(16, 4)), head=nn.Linear(16, 50)),
        "head",
        "",
    ),
    "a modulation in each block": (
        lambda: made(body=trunk(modulation=lambda: nn.Linear(16, 96)), head=nn.Linear(16, 50)),
        "head",
        "",
    ),
    "heads before the layers": (
        lambda: made(a=nn.Linear(16, 5), b=net(16, 16, 3), body=trunk()),
        "a b.2",
        "",
    ),
    "a pyramid of blocks": (
        lambda: nn.Sequential(net(30, 20), net(20, 16), net(16, 5)),
        "2.0",
        "",
    ),
    "an encoder and a decoder of one form": (
        lambda: made(encoder=net(30, 20, 8), decoder=net(8, 20, 30)),
        "decoder.2",
        "",
    ),
    "a bottleneck in two halves": (
        lambda: made(encoder=net(30, 20, 16), decoder=net(8, 20, 30)),
        "decoder.2",
        "encoder.2 decoder.2",
    ),
    "a convolution takes the last layer": (
        lambda: made(fc=nn.Linear(9, 8 * 16), up=nn.ConvTranspose2d(8, 3, 4)),
        "",
        "",
    ),
    "a layer with adapters": (
        lambda: made(body=net(9, 16), head=adapted(16, 5), value_head=adapted(16, 3)),
        "head.base_layer value_head.base_layer",
        "",
    ),
    "towers": (
        lambda: made(
            text=trunk(), image=trunk(2, 24),
            text_projection=nn.Linear(16, 16), visual_projection=nn.Linear(24, 16),
        ),
        "text_projection visual_projection",
        "",
    ),
    "names of a head as wide as the stream": (
        lambda: made(body=trunk(), state_head=nn.Linear(16, 16), reward_head=nn.Linear(16, 16)),
        "state_head reward_head",
        "",
    ),
    "norms at the end of a module of heads": (
        lambda: made(
            body=trunk(),
            post=made(
                feat_out=nn.Linear(16, 20), prob_out=nn.Linear(16, 2),
                conv1=nn.Conv1d(20, 32, 5), norm1=nn.BatchNorm1d(32),
                conv2=nn.Conv1d(32, 20, 5), norm2=nn.BatchNorm1d(20),
            ),
        ),
        "post.prob_out",
        "post.feat_out post.conv2",
    ),
    "a convolution and its norm behind the head": (
        lambda: made(
            body=trunk(),
            head=made(fc=nn.Linear(16, 10), conv=nn.Conv1d(10, 10, 3), norm=nn.BatchNorm1d(10)),
        ),
        "head.fc",
        "head.fc head.conv",
    ),
    # As SegFormer's: the projections of a head for each pixel are hidden.
    "a convolution behind a projection in a head": (
        lambda: made(
            body=net(9, 16, 16),
            decode_head=made(projection=nn.Linear(16, 16), fuse=nn.Conv2d(16, 5, 1)),
        ),
        "",
        "decode_head.fuse",
    ),
    "a hidden layer that is named by what follows": (
        lambda: made(
            body=trunk(),
            head=made(pre_logits=nn.Sequential(nn.Linear(16, 16), nn.Tanh()), fc=nn.Linear(16, 5)),
        ),
        "head.fc",
        "",
    ),
    "norms behind heads": (
        lambda: made(
            body=net(9, 16, 16),
            a=nn.Sequential(nn.Linear(16, 5), nn.BatchNorm1d(5)),
            b=nn.Sequential(nn.Linear(16, 6), nn.LayerNorm(6)),
            c=nn.Sequential(nn.Linear(16, 7), nn.RMSNorm(7)),
        ),
        "a.0 b.0 c.0",
        "",
    ),
    "towers with heads as wide as the stream": (
        lambda: made(
            text=made(body=trunk(), head=nn.Linear(16, 16)),
            image=made(body=trunk(), head=nn.Linear(16, 16)),
        ),
        "image.head",
        "text.head",
    ),
    "a classifier as wide as what a later head takes": (
        lambda: made(body=trunk(), classifier=nn.Linear(16, 16), aux=net(16, 16, 3)),
        "aux.2",
        "classifier",
    ),
    "numbered heads of which some are as wide as the stream": (
        lambda: made(
            body=trunk(2, 64), head1=nn.Linear(64, 64), head2=nn.Linear(64, 64),
            head3=nn.Linear(64, 3),
        ),
        "head3",
        "head1 head2",
    ),
    "heads in a dictionary, as wide as the stream": (
        lambda: made(
            body=trunk(),
            heads=nn.ModuleDict({"a": nn.Linear(16, 16), "b": net(16, 16, 16), "c": net(16, 3)}),
        ),
        "heads.c.0",
        "heads.a heads.b.2",
    ),
    "names of a head by capitals": (
        lambda: made(body=trunk(), policyHead=nn.Linear(16, 16), valueHead=nn.Linear(16, 16)),
        "policyHead valueHead",
        "",
    ),
    "networks in a row": (
        lambda: made(body=net(9, 32, 16), projector=net(16, 32, 8), predictor=net(8, 32, 8)),
        "predictor.2",
        "predictor.2",
    ),
    "sequences in a row": (
        lambda: nn.Sequential(net(10, 16, 16), net(16, 16, 16)),
        "1.2",
        "1.2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_heads(name: str) -> None:
    make, heads, doubtful = CASES[name]
    with torch.device("meta"):
        model = make()
    found = find_heads(model)
    assert (set(found.reasons), found.doubtful) == (set(heads.split()), set(doubtful.split()))


def test_an_exit_of_each_block_is_named_in_the_first_line() -> None:
    """It is as wide as the head. What the line says is an argument, after which it is gone."""
    with torch.device("meta"):
        model = made(body=trunk(3, leave=lambda: nn.Linear(16, 10)), fc=nn.Linear(16, 10))
        for one in model.body.blocks:
            one.norm2 = nn.Linear(16, 16)  # a block goes on after its exit
    optimizer: Any = Muon.for_model(model)
    first, second, *_ = str(optimizer).splitlines()
    assert first == (
        '3 layers may be output heads: write overrides={"body.blocks.*.leave.weight": "others"} '
        'for output heads, or "muon" in its place for hidden layers'
    )
    assert second.startswith("parameter ")
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert str(twin) == str(optimizer)
    names = [one.name for one in optimizer.assignments if one.may_be_head]
    overrides = ast.literal_eval(first[first.index("{") : first.index("}") + 1])
    for choice in ("others", "muon"):
        decided: Any = Muon.for_model(model, overrides=dict.fromkeys(overrides, choice))
        assert str(decided).startswith("parameter ")
        assert {one.choice for one in decided.assignments if one.name in names} == {choice}


def test_a_pattern_in_the_first_line_fits_no_other_layer() -> None:
    with torch.device("meta"):
        model = made(body=trunk(3, leave=lambda: nn.Linear(16, 10)), fc=nn.Linear(16, 10))
        for one in model.body.blocks:
            one.norm2 = nn.Linear(16, 16)
        model.body.blocks[1].leave = nn.Linear(16, 16)
    line = str(Muon.for_model(model)).partition("\n")[0]
    assert '"body.blocks.0.leave.weight": "others", "body.blocks.2.leave.weight": "others"' in line
    assert "*" not in line


@pytest.mark.parametrize("key", ["a[0]", "a*", "a?", "[!a]", 'a"b', "a\\b"])
def test_the_first_line_is_accepted_for_each_key_of_a_dictionary(key: str) -> None:
    """Also where the key is a pattern, which would fit other keys or none."""
    with torch.device("meta"):
        heads = {name: nn.Linear(16, 16) for name in (key, "ab")}
        model = made(body=trunk(), heads=nn.ModuleDict(heads), fc=nn.Linear(16, 5))
    line = str(Muon.for_model(model)).partition("\n")[0]
    overrides = ast.literal_eval(line[line.index("{") : line.rindex("}") + 1])
    assert list(overrides) == [f"heads.{name}.weight" for name in heads]
    del overrides["heads.ab.weight"]
    decided: Any = Muon.for_model(model, overrides=overrides)
    found = {one.name: one.choice for one in decided.assignments if one.reason == "override"}
    assert found == {f"heads.{key}.weight": "others"}


def test_a_lazy_layer_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LazyLinear(3))
    with pytest.raises(ConfigError, match=r"for_model: 1.weight, of a lazy layer, .* by a forward"):
        Muon.for_model(model)
    model(torch.ones(2, 4))
    assert not str(Muon.for_model(model)).startswith("1 layer")


def test_the_table_is_printed_where_stdout_is_ascii() -> None:
    """With heads in doubt, a convolution of groups and a weight of three matrices."""
    with torch.device("meta"):
        model = made(
            conv=nn.Conv2d(4, 8, 3, groups=2), qkv=nn.Linear(16, 48), halves=nn.Linear(8, 16),
            head=nn.Linear(8, 3),
        )  # fmt: skip
    for encoding in ("ascii", "utf-8"):
        stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        print(Muon.for_model(model), file=stdout, flush=True)
        assert "8x2x3x3" in stdout.buffer.getvalue().decode("ascii")
        with pytest.raises(UnicodeEncodeError):
            print("8×2", file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), flush=True)
