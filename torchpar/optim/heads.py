# SPDX-License-Identifier: MIT
"""Find the output heads of a model from the widths and the order of its layers.

A hidden layer gives a width that a later layer takes. No later layer takes the width of a head. So
a linear layer is a head if

1. no later layer takes its width, nor the width of the last product of any module that contains it,
   unless it is in a block of a trunk, or
2. its name says so, as those of its siblings do: `policy_head` beside `value_head`.

A key in attention, say, has a width that nobody takes, but the attention ends with a projection,
whose width the next layer takes. The blocks of a trunk are modules of the same types that follow
each other: a block gives the width that the next one takes. Modules of the same types that do not
follow each other, such as an actor and a critic, end with a head each. A norm or a scale takes no
width, since it gives the width that it takes.

The order is that of registration in the model. A layer is in doubt where a later layer could take
a part of the width, or the width beside others. So are

- the last linear layer of the model if it is in a trunk, unless its block has a number, is no
  sequence, and has the widths of another block,
- a layer with the name of a head whose width a later layer takes,
- a linear layer whose output convolutions beside it may correct, and
- a convolution like a head.
"""

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd

from torchpar.parallel.split.parts import part_of


class Heads(NamedTuple):
    """The output heads by their paths.

    Attributes:
        reasons: why a layer is a head.
        doubtful: layers that may be heads, or the last layer if it may be none.
    """

    reasons: dict[str, str]
    doubtful: set[str]


class _Layer(NamedTuple):
    """A module with matrices of its own.

    Attributes:
        takes: the widths of its inputs; of an unknown layer all sizes of its parameters.
        gives: the width of its output, if it multiplies or looks up.
        is_linear: whether it can be a head.
        is_conv: whether it can take an output that is reshaped to channels.
    """

    path: str
    takes: frozenset[int]
    gives: int | None = None
    is_linear: bool = False
    is_conv: bool = False

    @property
    def multiplies(self) -> bool:
        return self.gives is not None and bool(self.takes)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, also one of another library."""
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def find_heads(model: nn.Module) -> Heads:
    """The output heads, and the layers that may be some."""
    return _Search(model).find()


_NAMES = {"head", "heads", "classifier", "classifiers", "logits"}
# Of siblings with this last word all are heads if one is: CLIP has a visual_ and a text_projection.
_SHARED = {"head", "projection", "classifier", "logits"}
_ROUTERS = {"gate", "router", "routing"}
_INNER = {"q", "k", "v", "kv", "qkv", "wqkv", "attn", "query", "key", "value", "up", *_ROUTERS}
_MOST_JOINED = 4  # outputs of one width that a layer takes beside each other


def _words(path: str) -> list[str]:
    """The words of the last name in a path, which are `value` and `head` also in `valueHead`."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", path.rpartition(".")[2])
    return re.split(r"[_\d]+", name.lower())


def _is_name_of_head(name: str) -> bool:
    """Whether a name tells of a head; timm's `pre_logits` is a hidden layer before it."""
    words = _words(name)
    return not _NAMES.isdisjoint(words) and "pre" not in words


class _Search:
    """The layers of a model in their order, and what follows from it."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.layers: list[_Layer] = []
        self.spans: dict[str, range] = {}  # the layers in each module
        self.ends: dict[str, int] = {}  # the last of them that multiplies
        self._signatures: dict[nn.Module, Hashable] = {}
        self._visit("", model)
        self.linear = [i for i, layer in enumerate(self.layers) if layer.is_linear and layer.path]
        self.last = self.linear[-1] if self.linear else -1
        # By a width, the last layer that takes it.
        self.last_taker = {w: i for i, layer in enumerate(self.layers) for w in layer.takes}
        self.last_conv = {
            w: i for i, layer in enumerate(self.layers) if layer.is_conv for w in layer.takes
        }
        self.early = self._find_early_heads()
        self.entries: dict[str, set[int]] = {}
        self.trunks = self._find_trunks()

    def _visit(self, path: str, module: nn.Module) -> None:
        self._signatures[module] = None  # until its children have theirs
        start = len(self.layers)
        if (layer := _layer_of(path, module)) is not None:
            self.layers.append(layer)
        children = []
        for name, child in module.named_children():
            if name == "parametrizations" or name.startswith("lora_"):
                continue
            if child not in self._signatures:  # else it has been met under another name
                self._visit(f"{path}.{name}".lstrip("."), child)
            children.append((name, self._signatures[child]))
        self.spans[path] = range(start, len(self.layers))
        products = (i for i in reversed(self.spans[path]) if self.layers[i].multiplies)
        self.ends[path] = next(products, -1)
        self._signatures[module] = hash((type(module), *children))

    def _find_early_heads(self) -> dict[int, int]:
        """By the width that it takes, a head that is registered before what gives the width."""
        early, given = dict[int, int](), set[int | None]()
        for i, layer in enumerate(self.layers):
            parts = layer.path.split(".")
            ends = {i, *(self.ends[".".join(parts[:depth])] for depth in range(1, len(parts)))}
            if layer.is_linear and any(self.layers[j].gives not in self.last_taker for j in ends):
                early |= {width: i for width in layer.takes - given}
            given.add(layer.gives)
        return early

    def _entries_of(self, path: str) -> set[int]:
        """The widths that a module takes from outside."""
        if path not in self.entries:
            taken, given = set[int](), set[int | None]()
            for i in self.spans[path]:
                taken |= self.layers[i].takes - given
                given.add(self.layers[i].gives)
            self.entries[path] = taken
        return self.entries[path]

    def _outputs_of(self, path: str) -> Iterable[int]:
        """The widths that a module gives to others: no later product in it takes them.

        A router and a modulation, which is several times as wide as its input, give none.
        """
        taken = set[int]()
        for i in reversed(self.spans[path]):
            layer = self.layers[i]
            if layer.gives is not None and layer.gives not in taken:
                yield layer.gives
            is_router = not _ROUTERS.isdisjoint(_words(layer.path))
            if layer.gives is not None and not is_router and not _is_multiple(layer):
                taken |= layer.takes

    def _find_trunks(self) -> list[list[str]]:
        """Groups of modules of the same types of which one takes what the one before gives."""
        trunks: list[list[str]] = []
        for path, module in self.model.named_modules():
            if path not in self.spans:
                continue
            groups: dict[Hashable, list[str]] = defaultdict(list)
            for name, child in module.named_children():
                inner = f"{path}.{name}".lstrip(".")
                if self.spans.get(inner) and not is_linear(child):
                    groups[self._signatures[child]].append(inner)
            trunks += filter(self._is_trunk, groups.values())
        return trunks

    def _is_trunk(self, blocks: list[str]) -> bool:
        return any(
            not self._entries_of(after).isdisjoint(self._outputs_of(before))
            for before, after in pairwise(blocks)
        )

    def _is_taken(self, i: int) -> bool:
        """Whether a later layer takes the width of layer ``i``."""
        layer = self.layers[i]
        assert layer.gives is not None
        if i == self.last:  # sizes of unknown layers behind it may be other things than widths
            return self._is_taken_by_conv(i)
        is_taken = self.last_taker.get(layer.gives, -1) > i or self._is_taken_by_conv(i)
        return is_taken or self._is_taken_early(i)

    def _is_taken_early(self, i: int) -> bool:
        """Whether a head that is registered before layer ``i`` takes its width."""
        width = self.layers[i].gives
        assert width is not None
        return self.early.get(width, i) < i

    def _is_taken_by_conv(self, i: int) -> bool:
        width = self.layers[i].gives
        assert width is not None
        return any(
            last > i and width % channels == 0 and channels > 1
            for channels, last in self.last_conv.items()
        )

    def _is_hidden_in_trunk(self, i: int) -> bool:
        """Whether layer ``i`` is in a block of a trunk, and does not end the trunk.

        The last block of a pyramid gives another width than its input's. The layers at its place in
        the other blocks give what the next block takes.
        """
        path, width = self.layers[i].path, self.layers[i].gives
        for *others, last in self.trunks:
            block = next((one for one in [*others, last] if path.startswith(f"{one}.")), None)
            if block is None:
                continue
            if block != last or i != self.ends[last] or width in self._entries_of(last):
                return True
            place = path.removeprefix(last)
            twins = [
                j
                for j, layer in enumerate(self.layers)
                for one in others
                if layer.path == one + place
            ]
            if not all(map(self._is_taken, twins)):
                return True
        return False

    def _is_in_numbered_block(self, i: int) -> bool:
        """Whether layer ``i`` is in a numbered block of a trunk, which adds to what it takes.

        The blocks are modules of the same types and widths. A sequence, or a module with a name
        such as `decoder`, may be a network behind another one.
        """
        path = self.layers[i].path
        for blocks in self.trunks:
            block = next((one for one in blocks if path.startswith(f"{one}.")), None)
            if block is None or not block.rpartition(".")[2].isdigit():
                continue
            of_block = self._widths_of(block)
            is_equal = any(one != block and self._widths_of(one) == of_block for one in blocks)
            if is_equal and not isinstance(self.model.get_submodule(block), nn.Sequential):
                return True
        return False

    def _widths_of(self, path: str) -> list[tuple[frozenset[int], int | None]]:
        return [(self.layers[i].takes, self.layers[i].gives) for i in self.spans[path]]

    def _is_at_ends(self, i: int) -> bool:
        """Whether later layers take nothing of the modules that contain layer ``i``."""
        parts = self.layers[i].path.split(".")
        ends = {self.ends[".".join(parts[:depth])] for depth in range(1, len(parts))}
        return not any(self._is_taken(end) for end in ends)

    def _is_named(self, i: int) -> bool:
        """Whether layer ``i`` ends a module that is called a head, or is one of its modules."""
        parts = self.layers[i].path.split(".")
        for depth, part in enumerate(parts, 1):
            if not _is_name_of_head(part):
                continue
            module = self.model.get_submodule(".".join(parts[:depth]))
            is_list = isinstance(module, nn.ModuleList | nn.ModuleDict) or _words(part)[
                -1
            ].endswith("s")
            named = ".".join(parts[: depth + (is_list and depth < len(parts))])
            if i == self.ends[named]:
                return True
        return False

    def _is_refined(self, i: int, last_convolutions: set[str]) -> bool:
        """Whether convolutions beside layer ``i`` take its output and give one of the same width.

        They may correct it, as those behind SpeechT5's spectrum do.
        """
        width = self.layers[i].gives
        assert width is not None
        parent = self.layers[i].path.rpartition(".")[0]
        later = [self.layers[j] for j in self.spans[parent] if j > i and self.layers[j].is_conv]
        given = {layer.gives or 1 for layer in later if layer.path in last_convolutions} - {1}
        return any(
            width % channels == 0 and any(channels in layer.takes for layer in later)
            for channels in given
        )

    def _has_name_of_its_own(self, i: int) -> bool:
        """Whether layer ``i`` itself is called a head, or the list or sequence that it ends."""
        names = self.layers[i].path.split(".")
        lists = (nn.ModuleList, nn.ModuleDict)
        while len(names) > 1:
            above = self.model.get_submodule(".".join(names[:-1]))
            ends = isinstance(above, nn.Sequential) and self.ends[".".join(names[:-1])] == i
            if not ends and not isinstance(above, lists):
                break
            names.pop()
        return _is_name_of_head(names[-1])

    def _is_fed(self, i: int) -> bool:
        """Whether another layer gives what layer ``i`` takes.

        The layer may take several outputs beside each other, or the pixels of a convolution.
        """
        (width,) = self.layers[i].takes
        return any(
            width % given == 0 and (layer.is_conv or width <= _MOST_JOINED * given)
            for j, layer in enumerate(self.layers)
            if j != i and (given := layer.gives or 1) > 1
        )

    def _is_in_doubt(self, i: int) -> bool:
        """Whether layer ``i`` may be hidden.

        No layer gives what it takes, or a later layer could take its width in parts, or
        beside others.
        """
        layer = self.layers[i]
        assert layer.gives is not None
        if _is_multiple(layer) or not self._is_fed(i):
            return True
        if not _INNER.isdisjoint(_words(layer.path)):
            return True
        seen = set[int]()
        channels = set[int]()
        for j, other in enumerate(self.layers):
            if j > i:
                for width in other.takes - seen:
                    flattened = any(width % one == 0 for one in channels)
                    if not flattened and (width > layer.gives or layer.gives % width == 0):
                        return True
            seen |= other.takes | ({other.gives} if other.gives is not None else set())
            if other.is_conv and other.gives is not None and other.gives > 1:
                channels.add(other.gives)
        return False

    def _last_as_head(self, convolutions: set[str]) -> Literal["certain", "in doubt"] | None:
        """Whether the last linear layer is a head; None if not."""
        i = self.last
        if self._is_taken(i):
            return "in doubt" if self._is_refined(i, convolutions) else None
        if self._is_hidden_in_trunk(i):
            return None if self._is_in_numbered_block(i) else "in doubt"
        if not self._is_at_ends(i):
            return None
        return "in doubt" if self._is_taken_early(i) else "certain"

    def find(self) -> Heads:
        convolutions = self._last_convolutions()
        reasons, doubtful, inner = dict[str, str](), convolutions.copy(), list[int]()
        for i in self.linear:
            path = self.layers[i].path
            if i == self.last and (last := self._last_as_head(convolutions)) is not None:
                reasons[path] = "the last linear layer"
                doubtful |= {path} if last == "in doubt" else set()
            elif self._is_taken(i):
                if self._is_refined(i, convolutions) or self._has_name_of_its_own(i):
                    doubtful.add(path)
            elif self._is_hidden_in_trunk(i) or not self._is_at_ends(i):
                inner.append(i)
            elif self._is_named(i) or not self._is_in_doubt(i):
                reasons[path] = "no later layer takes it"
            else:
                doubtful.add(path)
        self._add_siblings(reasons, doubtful)
        # A model may have exits of its blocks, which are as wide as its head.
        widths = {self.layers[i].gives for i in self.linear if self.layers[i].path in reasons}
        for layer in (self.layers[i] for i in inner):
            if layer.gives in widths - {1} and _INNER.isdisjoint(_words(layer.path)):
                doubtful.add(layer.path)
        return Heads(reasons, doubtful)

    def _last_convolutions(self) -> set[str]:
        """The convolutions whose channels no later layer takes, nor their pixels as one vector."""
        found, given = set[str](), set[int | None]()
        flattened: dict[int, int] = {}  # by a width that no layer before gives, its last taker
        for i, layer in enumerate(self.layers):
            flattened |= dict.fromkeys(layer.takes - given, i)
            given.add(layer.gives)
        for i, layer in enumerate(self.layers):
            channels = layer.gives
            if not layer.is_conv or channels is None or self._is_taken_early(i):
                continue
            is_flattened = any(j > i and width % channels == 0 for width, j in flattened.items())
            is_last = not is_flattened and self.last_taker.get(channels, -1) <= i
            is_inner = self._is_hidden_in_trunk(i) or not self._is_at_ends(i)
            if is_last and not is_inner and not self._is_in_doubt(i):
                found.add(layer.path)
        return found

    def _add_siblings(self, reasons: dict[str, str], doubtful: set[str]) -> None:
        """Add the heads that have the names of other heads."""
        known = [path.split(".") for path in reasons]
        for i in self.linear:
            path = self.layers[i].path
            above, words = path.split(".")[:-1], _words(path)
            if path in reasons or len(words) == 1:
                continue
            for *parents, theirs in known:
                word = _words(theirs)[-1]
                if word in _SHARED and words[-1] == word and above == parents:
                    doubtful.discard(path)
                    reasons[path] = f"as {theirs} is"


def _is_multiple(layer: _Layer) -> bool:
    """Whether the output is several times as wide as the input, such as a modulation."""
    return layer.gives is not None and any(
        layer.gives > width > 1 and layer.gives % width == 0 for width in layer.takes
    )


def _layer_of(path: str, module: Any) -> _Layer | None:  # noqa: PLR0911  # a line for each kind
    """The widths of a module itself; None if it has none, or gives the width that it takes."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    # A wrapper, such as a layer with adapters, may have the attributes of the layer that it holds.
    if is_linear(module) and (own or hasattr(module, "parametrizations")):
        return _Layer(path, frozenset([module.in_features]), module.out_features, is_linear=True)
    if isinstance(module, _ConvNd):
        takes = frozenset([module.in_channels])
        return _Layer(path, takes, module.out_channels, is_conv=True)
    if isinstance(module, nn.MultiheadAttention):
        takes = frozenset([module.embed_dim, module.kdim, module.vdim])
        return _Layer(path, takes, module.embed_dim)
    if isinstance(module, nn.RNNBase):
        width = (module.proj_size or module.hidden_size) * (1 + module.bidirectional)
        return _Layer(path, frozenset([module.input_size]), width)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return _Layer(path, frozenset(), module.embedding_dim)
    if isinstance(module, nn.Bilinear):
        return _Layer(
            path, frozenset([module.in1_features, module.in2_features]), module.out_features
        )
    sizes = [part_of(p).whole for p in module.parameters(recurse=False)]
    if not sizes:
        return None
    if hasattr(module, "nf") and len(sizes[0]) == 2:  # transformers' Conv1D, stored (in, out)
        return _Layer(path, frozenset([sizes[0][0]]), module.nf)
    widths = [[n for n in size if n > 1] for size in sizes]
    if all(len(of_one) <= 1 for of_one in widths):
        return None  # a norm or a scale, which gives the width that it takes
    return _Layer(path, frozenset(n for of_one in widths for n in of_one))
