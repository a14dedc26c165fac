# SPDX-License-Identifier: MIT
"""Boxes of a step: what the marks that its hooks left say on what ran from when to when."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torchpar.training.profile.messages import Sent
from torchpar.training.profile.recorded_ranks import Box, Explained, Key, Message, RecordedStep


class Mark(NamedTuple):
    """A moment of a step.

    | kind | what | moment |
    |---|---|---|
    | batch | None | its making ended |
    | begin, ended | None | the model's forward pass began, ended |
    | forward | layer | its forward pass ended |
    | backward begins, backward ended | None | of a call of backward |
    | backward | layer | its backward pass ended |
    | … by hand | layer | its forward or backward pass, or the loss, ended |
    | message | Sent | it began |
    | wait, waited | Sent | Python began to wait for it, and went on |
    | optimizer | None | its step began |
    """

    kind: str
    what: Any
    when: Any

    @property
    def of(self) -> Any:
        """The same in every step: a message's operation and ranks, in place of the message."""
        return (self.what.operation, self.what.ranks) if isinstance(self.what, Sent) else self.what


class Boxes:
    """Make the boxes of a step from its marks.

    Args:
        names: of the layers.
        explained: of the marks, by kind, object and number.
        seconds: turns a mark's time into seconds.
        has_loss: whether this rank computes the loss, as the last stage of a pipeline. Its box ends
            at the next mark of any kind; without, only at a backward pass.
    """

    def __init__(
        self,
        names: Sequence[str],
        explained: Mapping[Key, Explained],
        seconds: Callable[[Any], float],
        has_loss: bool = False,
    ):
        self._has_loss = has_loss
        self._names, self._explained, self._seconds = names, explained, seconds
        self._boxes: list[Box] = []
        self._waits: list[tuple[Box, Sent]] = []
        self._counts: Counter[tuple[str, Any]] = Counter()
        self._previous = 0.0  # the moment where the next box begins
        self._has_layers = False  # whether the pass has marked any
        self._is_loss = False  # whether only the loss lies between the last mark and the next
        self._waiting: list[float] = []  # since when, from outer to inner
        self._unawaited: Sent | None = None  # the last message, if Python has not waited for it

    def step(
        self, start: float, end: float, marks: Sequence[tuple[Any, ...]], sent: Sequence[Sent]
    ) -> RecordedStep:
        """Return the step from ``start`` to ``end``."""
        self._previous = start
        memory: list[tuple[float, Mapping[str, int]]] = []
        for mark in map(Mark._make, marks):
            key = mark.kind, mark.of, self._counts[mark.kind, mark.of]
            self._counts[mark.kind, mark.of] += 1
            t = self._seconds(mark.when)
            if key in self._explained:
                memory.append((t, self._explained[key].memory))
            is_backward = mark.kind == "backward begins"
            if self._is_loss and (self._has_loss or is_backward):
                self._add("loss", "loss", t, None)
            getattr(self, "_" + mark.kind.replace(" ", "_"))(t, key, mark.what)
            self._is_loss = mark.kind == "ended"
        if self._counts["optimizer", None]:
            self._add("optimizer", "step", end, ("optimizer", None, 0))
        if ("end", None, 0) in self._explained:
            memory.append((end, self._explained["end", None, 0].memory))
        places = {id(one): i for i, one in enumerate(sent)}
        waits = [box._replace(message=places[id(one)]) for box, one in self._waits]
        messages = [self._message_of(one) for one in sent]
        return RecordedStep(start, end, [*self._boxes, *waits], messages, memory)

    def _message_of(self, one: Sent) -> Message:
        start = self._seconds(one.start)
        end = self._seconds(one.end) if one.end is not None else None
        given = one.operation, one.dimension, one.ranks, one.number, one.nbytes
        return Message(*given, start, end, one.about, one.line)

    def _add(self, kind: str, name: str, end: float, key: Key | None) -> None:
        """Add the box from the last moment to ``end``."""
        if end > self._previous:
            self._boxes.append(Box(kind, name, self._previous, end, key))
        self._previous = max(end, self._previous)

    def _part(self, key: Key) -> str:
        """The name of a layer, with the number of its pass where there are several."""
        _, layer, number = key
        several = any((f"forward{hand}", layer, 1) in self._explained for hand in ("", " by hand"))
        return f"{self._names[layer]} ({number})" if several else self._names[layer]

    # A method for each kind of mark

    def _batch(self, t: float, key: Key, _: object) -> None:
        self._add("data", "batch", t, key)

    def _begin(self, t: float, *_: object) -> None:
        self._previous, self._has_layers = t, False

    def _ended(self, t: float, *_: object) -> None:
        if not self._has_layers:  # they are compiled
            self._add("forward", "the model", t, None)
        self._previous = t

    def _optimizer(self, t: float, *_: object) -> None:
        self._previous = t

    def _forward(self, t: float, key: Key, _: object) -> None:
        self._has_layers = True
        self._add("forward", self._part(key), t, key)

    _forward_by_hand = _forward

    def _loss_by_hand(self, t: float, key: Key, _: object) -> None:
        self._add("loss", "loss", t, key)

    def _backward_begins(self, t: float, *_: object) -> None:
        self._previous, self._unawaited, self._has_layers = t, None, False

    def _backward(self, t: float, key: Key, _: object) -> None:
        self._has_layers = True
        self._add("backward", self._part(key), t, key)

    _backward_by_hand = _backward

    def _backward_ended(self, t: float, *_: object) -> None:
        if not self._has_layers:  # fully_shard sets gradients itself, which marks no layer
            self._add("backward", "the model", t, None)
        last, self._unawaited = self._unawaited, None
        if last is not None:
            # DistributedDataParallel waits in C++. Its last message begins when the last gradient
            # is there.
            start = max(self._previous, self._seconds(last.start))
            self._waits.append((Box("wait", "", start, t), last))
        self._previous = t

    def _message(self, _t: float, key: Key, sent: Sent) -> None:
        if key in self._explained:
            sent.about, sent.line = self._explained[key][:2]
            if sent.about and sent.operation == "send" and (*key[:2], 1) in self._explained:
                sent.about += f" of micro-batch {key[2]}"
        self._unawaited = sent

    def _wait(self, t: float, *_: object) -> None:
        self._waiting.append(t)

    def _waited(self, t: float, _: object, sent: Sent) -> None:
        self._waits.append((Box("wait", "", self._waiting.pop(), t), sent))
        self._unawaited = None
