# SPDX-License-Identifier: MIT
"""Random models with one or several output heads, and the optimizers that `Muon.for_model` chooses.

A trial draws a trunk of many architectures' shapes, and heads that are attributes, lists, entries
of dictionaries, small networks or modules of their own, under telling names and others. The truth
is known, since the model is built here. Each head must go to the other optimizer, or the table's
first line must name it among the layers that may be heads. No hidden matrix is given away. What
the first line tells to write is then written, and must be right.
"""

import ast
import random
import re
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import torch
from driver import Found, Refused, run
from torch import nn

from torchpar.errors import ConfigError
from torchpar.optim import Muon, assign
from torchpar.optim.heads import Heads, _Search

# Widths of streams and of hidden layers, and numbers of outputs, have no number in common: a head
# as wide as what a later layer takes is only found by its name, as docs/muon.md says.
STREAMS = (16, 24, 32, 48, 64)
HIDDEN = (20, 36, 40, 56, 80, 100)
INPUTS = (6, 9, 14, 27)
OUTPUTS = (3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
TELLING = ("head", "lm_head", "classifier", "value_head", "policy_head", "cls_head", "logits")
OTHERS = ("fc", "fc9", "proj", "out", "final", "l9", "score", "to_y", "dense", "pred", "decode")
LISTS = ("heads", "classifiers", "outs", "tasks", "branches", "predictors")


class Model(nn.Module):
    """A model whose heads and hidden layers are known.

    Attributes:
        true: the heads.
        last: layers that the rules take for the head though they are hidden, as docs/muon.md says.
    """

    def __init__(self) -> None:
        super().__init__()
        self.true: set[nn.Module] = set()

    def forward(self, x: Any) -> Any:
        raise NotImplementedError


def act(rng: random.Random) -> nn.Module:
    return rng.choice([nn.ReLU, nn.GELU, nn.Tanh])()


def norm(rng: random.Random, width: int) -> list[nn.Module]:
    return rng.choice(
        [list, list, lambda: [nn.LayerNorm(width)], lambda: [nn.BatchNorm1d(width)]]
    )()


class Attention(nn.Module):
    """Query, key and value apart or in one weight, perhaps with fewer keys than queries."""

    def __init__(self, rng: random.Random, d: int, grouped: bool, fused: bool):
        super().__init__()
        names = rng.choice(
            [("q_proj", "k_proj", "v_proj", "o_proj"), ("query", "key", "value", "out"),
             ("wq", "wk", "wv", "wo")]
        )  # fmt: skip
        if fused:
            self.qkv = nn.Linear(d, 3 * d)
        else:
            for name in names[:3]:
                setattr(self, name, nn.Linear(d, d // 2 if grouped and name != names[0] else d))
        setattr(self, names[3], nn.Linear(d, d))


class Feedforward(nn.Module):
    def __init__(self, d: int, h: int, gated: bool):
        super().__init__()
        if gated:
            self.gate_proj = nn.Linear(d, h)
        self.up_proj, self.down_proj = nn.Linear(d, h), nn.Linear(h, d)


class Experts(nn.Module):
    """A mixture of experts, whose router is registered first or last."""

    def __init__(self, d: int, h: int, count: int, first: bool):
        super().__init__()
        if first:
            self.gate = nn.Linear(d, count)
        self.experts = nn.ModuleList(Feedforward(d, h, gated=True) for _ in range(count))
        if not first:
            self.gate = nn.Linear(d, count)


class Block(nn.Module):
    """A block of a transformer; norms may be registered before or after, or be missing."""

    def __init__(self, rng: random.Random, d: int, h: int, options: dict[str, Any]):
        super().__init__()
        if options["exit"] and options["exit_first"]:
            setattr(self, options["exit_name"], nn.Linear(d, options["exit"]))
        if options["norms"] == "first":
            self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn = Attention(random.Random(options["seed"]), d, options["grouped"], options["qkv"])
        self.mlp: nn.Module = (
            Experts(d, h, 4, options["router_first"])
            if options["experts"]
            else Feedforward(d, h, options["gated"])
        )
        if options["norms"] == "last":
            self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        if options["modulated"]:
            self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        if options["exit"] and not options["exit_first"]:
            setattr(self, options["exit_name"], nn.Linear(d, options["exit"]))


Trunk = tuple[nn.Module, int]  # and the width of its features


def mlp(rng: random.Random, inputs: int | None = None) -> Trunk:
    """A network of layers in a list, in attributes or in blocks, of equal widths or a pyramid."""
    depth, equal = rng.randint(1, 4), rng.random() < 0.4
    sizes = [inputs or rng.choice(INPUTS)]
    for _ in range(depth):
        sizes.append(sizes[-1] if equal and len(sizes) > 1 else rng.choice(STREAMS))
    pairs = list(pairwise(sizes))
    style = rng.choice(["sequence", "attributes", "blocks"])
    if style == "sequence":
        layers: list[nn.Module] = []
        for pair in pairs:
            layers += [nn.Linear(*pair), *norm(rng, pair[1]), act(rng)]
        return nn.Sequential(*layers), sizes[-1]
    if style == "blocks":
        blocks = [nn.Sequential(nn.Linear(*pair), nn.ReLU()) for pair in pairs]
        return nn.Sequential(*blocks), sizes[-1]
    whole = nn.Module()
    for i, pair in enumerate(pairs, 1):
        setattr(whole, f"fc{i}", nn.Linear(*pair))
    return whole, sizes[-1]


def transformer(rng: random.Random, exits: int = 0) -> Trunk:
    d, h = rng.choice(STREAMS), rng.choice(HIDDEN)
    options = {
        "norms": rng.choice(["first", "last", "last", ""]),
        "grouped": rng.random() < 0.4,
        "qkv": rng.random() < 0.3,
        "experts": rng.random() < 0.2,
        "router_first": rng.random() < 0.7,
        "gated": rng.random() < 0.5,
        "modulated": rng.random() < 0.15,
        "seed": rng.random(),
        "exit": exits,
        "exit_first": rng.random() < 0.5,
        "exit_name": rng.choice(["exit", "aux", "early_head"]),
    }
    count = rng.choice([1, 2, 2, 3, 5])
    # A single block has no equal ones: there a modulation, or a router at its end, is not known.
    if count == 1:
        options |= {"modulated": False, "router_first": True, "exit": 0}
    whole = nn.Module()
    if rng.random() < 0.8:
        whole.tokens = nn.Embedding(50, d)
    if rng.random() < 0.3:
        whole.position = nn.Parameter(torch.zeros(1, 12, d))
    whole.blocks = nn.ModuleList(Block(rng, d, h, options) for _ in range(count))
    if rng.random() < 0.7 or count == 1:
        whole.norm = nn.LayerNorm(d)
    return whole, d


def of_torch(rng: random.Random) -> Trunk:
    d = rng.choice(STREAMS)
    layer = nn.TransformerEncoderLayer(d, 4, rng.choice(HIDDEN))
    return nn.TransformerEncoder(layer, rng.choice([1, 2, 3]), enable_nested_tensor=False), d


def convolutions(rng: random.Random, ends: bool = True) -> Trunk:
    """Convolutions with a squeeze-and-excitation of linear layers, and perhaps a flattened end."""
    channels = [3, *(rng.choice(STREAMS) for _ in range(rng.randint(1, 3)))]
    whole = nn.Module()
    for i, pair in enumerate(pairwise(channels)):
        setattr(whole, f"conv{i}", nn.Conv2d(*pair, 3))
        if rng.random() < 0.6:
            setattr(whole, f"bn{i}", nn.BatchNorm2d(pair[1]))
    width = channels[-1]
    if rng.random() < 0.3:
        whole.se = nn.Sequential(
            nn.Linear(width, width // 4), nn.ReLU(), nn.Linear(width // 4, width)
        )
        whole.last = nn.Conv2d(width, width, 1)
    if ends and rng.random() < 0.5:
        width = width * rng.choice([1, 4, 9])
        features = rng.choice(STREAMS)
        whole.neck = nn.Sequential(nn.Flatten(), nn.Linear(width, features), nn.ReLU())
        width = features
    return whole, width


def recurrent(rng: random.Random) -> Trunk:
    d, h = rng.choice(STREAMS), rng.choice(HIDDEN)
    kind = rng.choice([nn.LSTM, nn.GRU])
    both = rng.random() < 0.3
    layers = rng.choice([1, 2])
    return (
        nn.ModuleDict(
            {"tokens": nn.Embedding(50, d), "rnn": kind(d, h, layers, bidirectional=both)}
        ),
        h * (1 + both),
    )


def bottleneck(rng: random.Random) -> Trunk:
    """An encoder, a bottleneck by two parallel layers or by one of twice the width, a decoder."""
    d, z, h = rng.choice(STREAMS), rng.choice((8, 10, 12)), rng.choice(HIDDEN)
    whole = nn.Module()
    whole.encoder = nn.Sequential(nn.Linear(rng.choice(INPUTS), d), nn.ReLU())
    if rng.random() < 0.5:
        whole.mean, whole.deviation = nn.Linear(d, z), nn.Linear(d, z)
    else:
        whole.moments = nn.Linear(d, 2 * z)
    whole.decoder = nn.Sequential(nn.Linear(z, h), nn.ReLU())
    return whole, h


def gated(rng: random.Random) -> Trunk:
    """Layers of which each gives two halves, whose product the next layer takes."""
    whole, d = nn.Module(), rng.choice(STREAMS)
    whole.first = nn.Linear(rng.choice(INPUTS), d)
    for i in range(rng.randint(1, 2)):
        h = rng.choice((d, *HIDDEN))
        setattr(whole, f"up{i}", nn.Linear(d, 2 * h))
        setattr(whole, f"down{i}", nn.Linear(h, d))
    return whole, d


def branches(rng: random.Random) -> Trunk:
    """Networks whose features are joined to one vector."""
    whole, widths = nn.Module(), []
    for i in range(rng.randint(2, 3)):
        branch, width = mlp(rng)
        setattr(whole, f"branch{i}", branch)
        widths.append(width)
    d = rng.choice(HIDDEN)
    whole.join = nn.Linear(sum(widths), d)
    return whole, d


def projected(rng: random.Random) -> Trunk:
    """A tower of pictures, a projection to the width of text, and a language model."""
    whole = nn.Module()
    whole.vision, a = transformer(rng)
    language, d = transformer(rng)
    h = rng.choice((d, *HIDDEN))
    whole.projector = nn.Sequential(nn.Linear(a, h), nn.GELU(), nn.Linear(h, d))
    whole.language = language
    return whole, d


def positions(rng: random.Random) -> Trunk:
    """Blocks whose attention adds a bias by a small network, as Swin's does."""
    whole, d = nn.Module(), rng.choice(STREAMS)
    whole.blocks = nn.ModuleList()
    for _ in range(rng.randint(1, 3)):
        block = nn.Module()
        block.norm1 = nn.LayerNorm(d)
        block.attn = nn.Module()
        block.attn.bias = nn.Sequential(nn.Linear(2, 4 * d), nn.ReLU(), nn.Linear(4 * d, 4))
        block.attn.qkv, block.attn.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        block.norm2 = nn.LayerNorm(d)
        block.mlp = Feedforward(d, 4 * d, gated=False)
        whole.blocks.append(block)
    whole.norm = nn.LayerNorm(d)
    return whole, d


TRUNKS: list[Callable[[random.Random], Trunk]] = [
    mlp, mlp, transformer, transformer, of_torch, convolutions, recurrent, bottleneck, gated,
    branches, projected, positions,
]  # fmt: skip


def head(rng: random.Random, d: int, outputs: int) -> tuple[nn.Module, nn.Module]:
    """A head, and its last layer."""
    last = nn.Linear(d, outputs, bias=rng.random() < 0.8)
    if rng.random() < 0.1:
        last = nn.utils.parametrizations.weight_norm(last)
    kind = rng.random()
    if kind < 0.5:
        return last, last
    if kind < 0.6:
        return nn.Sequential(last, *norm(rng, outputs)), last
    h = rng.choice((d, *HIDDEN))
    if h != d:
        last = nn.Linear(h, outputs)
    layers = [nn.Linear(d, h), *norm(rng, h), act(rng), last]
    behind = norm(rng, outputs) if rng.random() < 0.2 else []
    if kind < 0.8:
        return nn.Sequential(*layers, *behind), last
    whole = nn.Module()
    whole.dense, whole.out_proj = layers[0], last
    if behind:
        whole.norm = behind[0]
    return whole, last


def free_name(rng: random.Random, model: nn.Module, names: tuple[str, ...]) -> str:
    free = [name for name in names if not hasattr(model, name)]
    return rng.choice(free or [f"layer{len(list(model.children()))}"])


def add_heads(rng: random.Random, model: Model, d: int) -> None:
    """One or several heads that take features of width ``d``."""
    count = rng.choice([1, 1, 2, 2, 3, 4])
    same = rng.random() < 0.3
    sizes = [rng.choice(OUTPUTS)] * count if same else [rng.choice(OUTPUTS) for _ in range(count)]
    made = [head(rng, d, outputs) for outputs in sizes]
    if same and rng.random() < 0.3:  # heads that are copies of each other in form
        form = rng.random()
        made = [head(random.Random(form), d, sizes[0]) for _ in range(count)]
    model.true |= {last for _, last in made}
    modules = [one for one, _ in made]
    style = rng.choice(["attributes", "attributes", "list", "dictionary", "module"])
    names = TELLING if rng.random() < 0.4 else OTHERS
    if style == "attributes":
        for one in modules:
            setattr(model, free_name(rng, model, names), one)
    elif style == "list":
        setattr(model, free_name(rng, model, LISTS), nn.ModuleList(modules))
    elif style == "dictionary":
        keys = rng.sample(OTHERS, count)
        named = nn.ModuleDict(dict(zip(keys, modules, strict=True)))
        setattr(model, free_name(rng, model, LISTS), named)
    else:
        outer = nn.Module()
        for one in modules:
            setattr(outer, free_name(rng, outer, names), one)
        setattr(model, free_name(rng, model, ("predictor", "box_predictor", "top")), outer)


def trunk_and_heads(rng: random.Random) -> Model:
    model = Model()
    trunk, d = rng.choice(TRUNKS)(rng)
    before = rng.random() < 0.1 and isinstance(trunk, nn.Module) and hasattr(trunk, "norm")
    if not before:
        model.trunk = trunk
    add_heads(rng, model, d)
    if before:  # registered before the layers that give their input
        model.trunk = trunk
    return model


def tied(rng: random.Random) -> Model:
    """A head that shares the embedding, beside others."""
    model = Model()
    trunk, d = transformer(rng)
    trunk.tokens = nn.Embedding(50, d)
    model.trunk = trunk
    shared = nn.Linear(d, 50, bias=False)
    shared.weight = trunk.tokens.weight
    if rng.random() < 0.5:
        model.lm_head = shared
        add_heads(rng, model, d)
    else:
        add_heads(rng, model, d)
        setattr(model, free_name(rng, model, TELLING), shared)
    return model


def auxiliary(rng: random.Random) -> Model:
    """Classifiers beside the trunk, as GoogLeNet has, and one at its end."""
    model, classes = Model(), rng.choice(OUTPUTS)
    channels = [3, *(rng.choice(STREAMS) for _ in range(3))]
    for i, pair in enumerate(pairwise(channels)):
        setattr(model, f"stage{i}", nn.Sequential(nn.Conv2d(*pair, 3), nn.BatchNorm2d(pair[1])))
    h = rng.choice(HIDDEN)
    for i in range(rng.randint(1, 2)):
        aux = nn.Module()
        aux.conv = nn.Conv2d(channels[i + 1], 12, 1)
        aux.fc1, aux.fc2 = nn.Linear(12 * 16, h), nn.Linear(h, classes)
        setattr(model, f"aux{i + 1}", aux)
        model.true.add(aux.fc2)
    model.fc = nn.Linear(channels[-1], classes)
    model.true.add(model.fc)
    return model


def actor_and_critic(rng: random.Random) -> Model:
    """Two networks of the same form, or with layers that they share."""
    model, actions = Model(), rng.choice(OUTPUTS)
    values = rng.choice([1, 1, 51])
    h = rng.choice(STREAMS)
    names = rng.choice([("actor", "critic"), ("pi", "vf"), ("policy", "value")])
    if rng.random() < 0.4:
        model.shared, width = mlp(rng)
    else:
        width = rng.choice(INPUTS)
    # A critic may see more than the actor does, or take its action, too.
    more = rng.choice([0, 0, 0, 40, actions])
    if rng.random() < 0.1:  # linear functions of the observation
        h, more = width, 0
    form = rng.random()
    for name, outputs in zip(names, (actions, values), strict=True):
        draw = random.Random(form)
        inputs = width + (more if name == names[1] else 0)
        hidden = [] if h == width else [nn.Linear(inputs, h), act(draw)]
        if hidden and draw.random() < 0.6:
            hidden += [nn.Linear(h, h), act(draw)]
        last = nn.Linear(h, outputs)
        setattr(model, name, nn.Sequential(*hidden, last))
        model.true.add(last)
    return model


def distilled(rng: random.Random) -> Model:
    """A classifier for each of two tokens, as DeiT has."""
    model, classes = Model(), rng.choice(OUTPUTS)
    model.vit, d = transformer(rng)
    first, second = rng.choice(
        [("head", "head_dist"), ("cls_classifier", "distillation_classifier"), ("fc", "fc_dist")]
    )
    for name in (first, second):
        layer = nn.Linear(d, classes)
        setattr(model, name, layer)
        model.true.add(layer)
    return model


def detector(rng: random.Random) -> Model:
    """A backbone, a network of boxes, and its heads, perhaps in another module."""
    model = Model()
    backbone, _ = convolutions(rng, ends=False)
    c, d, classes = rng.choice(STREAMS), rng.choice(HIDDEN), rng.choice(OUTPUTS)
    inner = nn.Module()
    inner.fpn = nn.ModuleList(nn.Conv2d(c, c, 1) for _ in range(2))
    inner.box_head = nn.Module()
    inner.box_head.fc6, inner.box_head.fc7 = nn.Linear(c * 49, d), nn.Linear(d, d)
    inner.box_predictor = nn.Module()
    inner.box_predictor.cls_score = nn.Linear(d, classes)
    inner.box_predictor.bbox_pred = nn.Linear(d, 4 * classes)
    model.true |= set(inner.box_predictor.children())
    if rng.random() < 0.5:
        inner.mask = nn.Conv2d(c, c, 3)
    outer: nn.Module = model
    for _ in range(rng.randint(0, 2)):
        outer.inner = nn.Module()
        outer = outer.inner
    outer.backbone, outer.roi_heads = backbone, inner
    return model


def dense(rng: random.Random) -> Model:
    """Heads that are convolutions, for each place of an image, and perhaps a linear one."""
    model = Model()
    c = rng.choice(STREAMS)
    pairs = list(pairwise((3, *(c for _ in range(rng.randint(1, 3))))))
    model.body = nn.Sequential()
    for pair in pairs:
        model.body.extend([nn.Conv2d(*pair, 3), nn.ReLU()])
    for i in range(rng.randint(1, 3)):
        last = nn.Conv2d(c, rng.choice(OUTPUTS), rng.choice([1, 3]))
        hidden = [nn.Conv2d(c, c, 3), nn.ReLU()] if rng.random() < 0.5 else []
        setattr(model, f"branch{i}", nn.Sequential(*hidden, last))
        model.true.add(last)
    if rng.random() < 0.5:
        add_heads(rng, model, c)
    return model


def queries(rng: random.Random) -> Model:
    """A transformer with a head of classes and a small network of boxes, as DETR has."""
    model = Model()
    model.model, d = transformer(rng)
    model.class_labels = nn.Linear(d, rng.choice(OUTPUTS))
    model.bbox = nn.Module()
    h = rng.choice((d, *HIDDEN))
    last = nn.Linear(h, 4)
    model.bbox.layers = nn.ModuleList([nn.Linear(d, h), nn.Linear(h, h), last])
    model.true |= {model.class_labels, last}
    return model


def exits(rng: random.Random) -> Model:
    """A head in each block, as wide as that at the end."""
    model, classes = Model(), rng.choice([n for n in OUTPUTS if n > 8])
    model.body, d = transformer(rng, exits=classes)
    for name, module in model.body.named_modules():
        if re.fullmatch(r"blocks\.\d+\.(exit|aux|early_head)", name):
            model.true.add(module)
    model.classifier = nn.Linear(d, classes)
    model.true.add(model.classifier)
    return model


def two_towers(rng: random.Random) -> Model:
    """Two encoders whose projections are compared, as CLIP has."""
    model, width = Model(), rng.choice(OUTPUTS)
    model.text, a = transformer(rng)
    model.vision, b = transformer(rng)
    model.text_projection, model.visual_projection = nn.Linear(a, width), nn.Linear(b, width)
    model.true |= {model.text_projection, model.visual_projection}
    return model


def as_wide_as_the_stream(rng: random.Random) -> Model:
    """Heads of the width that other layers take, which their names tell."""
    model = Model()
    model.trunk, d = rng.choice(TRUNKS)(rng)
    first, second = rng.choice(
        [("state_head", "reward_head"), ("a_classifier", "b_classifier"), ("head1", "head2"),
         ("policyHead", "valueHead"), ("classifier", "aux")]
    )  # fmt: skip
    for name, outputs in ((first, d), (second, rng.choice((d, *OUTPUTS)))):
        layer = nn.Linear(d, outputs)
        setattr(model, name, layer)
        model.true.add(layer)
    return model


def equal_towers(rng: random.Random) -> Model:
    """Two encoders of one width, each with a head of that width, as SigLIP has."""
    model, form, name = Model(), rng.random(), rng.choice(("head", "classifier", "logits"))
    for tower in ("text", "image"):
        inner = nn.Module()
        inner.body, d = transformer(random.Random(form))
        layer = nn.Linear(d, d)
        setattr(inner, name, layer)
        setattr(model, tower, inner)
        model.true.add(layer)
    return model


def networks_in_a_row(rng: random.Random) -> Model:
    """Networks of one form, of which each takes what the one before gives."""
    model, draw = Model(), rng.choice([2, 3])
    h, widths = rng.choice(HIDDEN), [rng.choice(STREAMS) for _ in range(draw)]
    widths.append(widths[-1] if rng.random() < 0.5 else rng.choice(OUTPUTS))
    names = rng.choice([("0", "1", "2"), ("encoder", "projector", "predictor")])
    for name, (inputs, outputs) in zip(names, pairwise(widths), strict=False):
        last = nn.Linear(h, outputs)
        model.add_module(name, nn.Sequential(nn.Linear(inputs, h), act(rng), last))
    model.true.add(last)
    return model


def speech(rng: random.Random) -> Model:
    """A spectrum and its end by linear layers, and convolutions with norms that correct the
    spectrum, as SpeechT5 has."""
    model = Model()
    model.trunk, d = transformer(rng)
    outputs, channels = rng.choice(OUTPUTS), rng.choice(HIDDEN)
    model.post = nn.Module()
    model.post.feat_out, model.post.prob_out = nn.Linear(d, outputs), nn.Linear(d, 2)
    for i, pair in enumerate(pairwise((outputs, channels, channels, outputs))):
        setattr(model.post, f"conv{i}", nn.Conv1d(*pair, 5))
        setattr(model.post, f"norm{i}", nn.BatchNorm1d(pair[1]))
    model.true |= {model.post.feat_out, model.post.prob_out, model.post.conv2}
    return model


MODELS = [
    trunk_and_heads, trunk_and_heads, trunk_and_heads, tied, auxiliary, actor_and_critic,
    distilled, detector, dense, queries, exits, two_towers, as_wide_as_the_stream,
    equal_towers, networks_in_a_row, speech,
]  # fmt: skip
LINE = re.compile(r"overrides=(\{.*?\})")


def is_matrix(p: nn.Parameter) -> bool:
    return p.dim() > 1 and min(p.shape) > 1


def raise_unless_refused(error: ConfigError) -> None:
    if "has no hidden matrix" in str(error) or "no parameter is left for Muon" in str(error):
        raise Refused(str(error)) from None
    raise error


def trial(rng: random.Random) -> str:
    make = rng.choice(MODELS)
    with torch.device("meta"):
        model = make(rng)
    for layer in model.true:
        if rng.random() < 0.1:
            layer.requires_grad_(False)
    paths = {module: path for path, module in model.named_modules()}
    weights = ("weight", "parametrizations.weight.original1")
    known = dict(model.named_parameters())
    heads = {
        name
        for layer in model.true
        for name in (f"{paths[layer]}.{weight}" for weight in weights)
        if name in known and is_matrix(known[name])
    }
    try:
        optimizer: Any = Muon.for_model(model)
    except ConfigError as error:
        raise_unless_refused(error)
    check(optimizer, heads, model, "")
    first = str(optimizer).partition("\n")[0]
    if line := LINE.search(first):
        patterns: dict[str, Any] = ast.literal_eval(line[1])
        # What the line says: "others" for heads, and else "muon".
        overrides = {
            name: "others" if name in heads else "muon"
            for name in known
            if any(fnmatchcase(name, pattern) for pattern in patterns)
        }
        try:
            optimizer = Muon.for_model(model, overrides=overrides)
        except ConfigError as error:
            raise_unless_refused(error)
        check(optimizer, heads, model, " after what the first line says")
        if LINE.search(str(optimizer).partition("\n")[0]):
            raise Found("the first line repeats what overrides have decided")
    return f"{make.__name__} {len(heads)} {bool(line)}"


def check(optimizer: Any, heads: set[str], model: nn.Module, when: str) -> None:
    first = str(optimizer).partition("\n")[0]
    line = LINE.search(first)
    patterns = list(ast.literal_eval(line[1])) if line else []
    for one in optimizer.assignments:
        if len(one.shape) < 2 or min(one.shape) < 2:
            continue
        is_named = any(fnmatchcase(one.name, pattern) for pattern in patterns)
        if one.name in heads and one.choice == "muon" and not is_named:
            raise Found(f"the head {one.name} goes to Muon in silence{when}: {layers_of(model)}")
        is_head = one.reason.startswith("output head")
        if one.name not in heads and one.choice == "others" and is_head and not is_named:
            raise Found(
                f"{one.name} is hidden, and is called an {one.reason}{when}: {layers_of(model)}"
            )


def layers_of(model: nn.Module) -> str:
    return ", ".join(
        f"{name} {'x'.join(map(str, p.shape))}"
        for name, p in model.named_parameters()
        if p.dim() > 1
    )


def the_last_alone() -> None:
    """Take the last linear layer alone for a head, and be silent about others."""
    right = assign.find_heads

    def wrong(model: nn.Module) -> Heads:
        reasons = right(model).reasons
        return Heads({k: v for k, v in reasons.items() if v == "the last linear layer"}, set())

    assign.find_heads = wrong


def each_that_none_takes() -> None:
    """Take each layer whose width no later layer takes for a head, also in blocks of a trunk."""
    _Search._is_hidden_in_trunk = lambda self, i: False  # type: ignore[method-assign]
    _Search._is_at_ends = lambda self, i: True  # type: ignore[method-assign]


def silence() -> None:
    """Print no first line."""
    assign.ModelOptimizer._doubts = lambda self: []  # type: ignore[method-assign]


FAULTS = {"last": the_last_alone, "blocks": each_that_none_takes, "silent": silence}

if __name__ == "__main__":
    sys.exit(run(trial, FAULTS))
