# SPDX-License-Identifier: MIT
"""Nodes of autograd that a captured backward pass cannot run, as they belong to the default stream.

A node runs on the stream on which it was made. The node that accumulates a parameter's gradient
lives as long as a graph of autograd that uses the parameter. So a loss of the warm-up that is still
there lets the backward pass of a capture run on the stream of the warm-up. DistributedDataParallel
keeps these nodes, too, from where it is made. The default stream must not wait for captured work.
PyTorch 2.14 raises an error of its own, and CUDA does for others.
"""

import gc
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from nogpu.cuda import places
from nogpu.cuda.streams import Stream, Streams
from nogpu.triton.torch_operators import is_plain

Refuse = Callable[[str, str, str], None]
LEAF = "AccumulateGrad"
KEPT = (
    "by a forward pass whose result is still there; delete that, such as by `del loss`, or warm up "
    "on another stream"
)
KEPT_BY_DDP = (
    "by DistributedDataParallel; make that on another stream, within `with "
    "torch.cuda.stream(side):`"
)


def live_nodes() -> Iterator[Node]:
    """Yield the nodes of autograd that made the tensors of the device which exist now."""
    # Parameters have no node, and other classes of tensors no memory here.
    tensors = [one for one in gc.get_objects() if type(one) is Tensor]
    with torch._C.DisableTorchFunction():
        for t in tensors:
            if t.requires_grad and not t.is_leaf and is_plain(t) and places.is_on_device(t):
                node = t.grad_fn
                if node is not None:
                    yield node


def nodes_on(stream: Stream, streams: Streams) -> list[Node]:
    """Return the live nodes that were made on a stream.

    The node that accumulates a gradient has no number. It counts as made with the first node before
    it, by which a forward pass has made it.
    """
    # By the wrappers' numbers in Python; a wrapper lives as long as it is in here.
    found: dict[int, tuple[Node, int]] = {}
    waiting = [(node, node._sequence_nr()) for node in live_nodes()]
    while waiting:
        node, number = waiting.pop()
        before = found.get(id(node))
        if before is not None and before[1] <= number:
            continue
        found[id(node)] = node, number
        for one, _ in node.next_functions:
            if one is not None:
                is_leaf = one.name().endswith(LEAF)
                own = number if is_leaf else one._sequence_nr()
                waiting.append((one, own))
    return [node for node, number in found.values() if streams.of_number(number) is stream]


def accumulators_of(module: torch.nn.Module) -> list[Node]:
    """Return the nodes that accumulate the gradients of a module that keeps them."""
    with torch.enable_grad(), torch._C.DisableTorchFunction():
        views = [
            p.view_as(p)
            for p in module.parameters()
            if p.requires_grad and is_plain(p) and places.is_on_device(p)
        ]
        nodes = [one.grad_fn.next_functions[0][0] for one in views if one.grad_fn is not None]
    return [node for node in nodes if node is not None]


class StaleStreams:
    """What a capture lets autograd's nodes of the default stream do: raise an error.

    Args:
        streams: those of the GPU.
        refuse: called with a fault's name, its message and the words of PyTorch.
    """

    def __init__(self, streams: Streams, refuse: Refuse):
        self.streams, self.refuse = streams, refuse
        self._hooks: list[RemovableHandle] = []
        if threading.current_thread() is threading.main_thread():  # whose nodes are numbered
            self._watch(nodes_on(streams.default, streams), KEPT)
        for module, stream in streams.of_modules.items():
            if stream is streams.default:
                self._watch(accumulators_of(module), KEPT_BY_DDP)

    def _watch(self, nodes: list[Node], why: str) -> None:
        for node in nodes:
            self._hooks.append(node.register_prehook(self._check_of(node.name(), why)))

    def _check_of(self, name: str, why: str) -> Callable[[tuple[Tensor | None, ...]], None]:
        def check(gradients: tuple[Tensor | None, ...]) -> None:
            has_any = any(one is not None and places.is_on_device(one) for one in gradients)
            if has_any and self.streams.is_capturing(self.streams.current) and not is_overridden():
                self.refuse(
                    "stale stream in a capture",
                    f"the backward pass runs {name} on the default stream, where it was made "
                    f"before the capture, {why}",
                    f"During CUDA graph capture, autograd node '{name}' has a stale reference to "
                    "the default stream (stream 0) from warmup",
                )

        return check

    def end(self) -> None:
        for hook in self._hooks:
            hook.remove()


def is_overridden() -> bool:
    """Whether the program lets PyTorch 2.14 or newer put such nodes on the captured stream."""
    get = getattr(torch._C, "_override_stale_capture_stream", None)
    return get is not None and bool(get())
