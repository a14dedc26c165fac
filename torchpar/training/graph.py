# SPDX-License-Identifier: MIT
"""A training step as one CUDA graph.

A step of a small network launches about twenty kernels. Each runs for some microseconds, and launching it
takes the host as long. CUDA captures the launches of a step once, and replays them by one call: no Python
runs, and the host waits for nothing. The graph reads its batch by indices, so that gathering and scaling the
samples is part of it.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from torchpar.data import Samples
from torchpar.errors import ConfigError
from torchpar.optim import ChainedOptimizer, Muon
from torchpar.parallel.launch.world import World

Step = Callable[[Tensor, Tensor, int], Tensor]  # inputs, labels, samples of the global batch → loss


def why_not_graphed(optimizer: Optimizer, world: World, fused: bool) -> str:
    """Return why a step cannot be a `GraphedStep`, or "" if it can.

    Args:
        fused: `torchpar.training.fused.FusedGradients` computes the gradients.
    """
    if world.device.type != "cuda":
        return "it needs a GPU"
    if world.world_size > 1 and dist.get_backend() != "nccl":
        return "the ranks share a GPU, and gloo's messages start on the host"
    if world.world_size > 1 and not fused:
        return "DistributedDataParallel needs 11 steps before it can be captured"
    for one in optimizer.optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]:
        if type(one) is not Muon and not (type(one) is torch.optim.SGD and one.defaults["fused"]):
            name = type(one).__name__
            return f"{name} would keep the learning rate of the capture; take SGD with fused=True, or Muon"
    return ""


@dataclass(frozen=True)
class _Graph:
    replay: Callable[[], None]
    index: Tensor
    loss: Tensor


class GraphedStep:
    """A training step as one CUDA graph for each size of a batch, the remainder of an epoch included.

    The first batch of a size runs without a graph: kernels are compiled, and the optimizer makes its state.
    The second is captured. If that fails, steps go on without graphs.

    A graph reads and writes the memory addresses of its capture. After it, change parameters and the
    optimizer's state in place only, and none of the optimizer's options but ``lr``. Leave the context, or
    call `close`, before the process group ends.

    Args:
        step: computes the gradients and the loss of a batch, steps the optimizer and removes the gradients.
            It reads nothing back from the device. It does not step a learning-rate scheduler: that is done
            after each step.
        samples: on the device of the model.
        optimizer: of the parameters. Its groups' ``lr`` may change between steps.
        on_failure: called with the reason if the capture fails; by default it warns.

    Raises:
        ConfigError: ``step`` changes a learning rate.
    """

    def __init__(
        self,
        step: Step,
        samples: Samples,
        optimizer: Optimizer,
        on_failure: Callable[[str], object] = warnings.warn,
    ):
        self.step = step
        self.samples = samples
        self.optimizer = optimizer
        self.on_failure = on_failure
        device, groups = samples.labels.device, optimizer.param_groups
        # A graph reads the learning rates from the device.
        self._lr_tensors = [torch.zeros((), device=device) for _ in groups]
        self._lr_values: list[float | None] = [None] * len(groups)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._graphs: dict[tuple[int, int], _Graph | None] = {}
        self._failed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop the graphs: NCCL's communicators do not end before the graphs that use them."""
        if self._stream is not None:
            torch.cuda.synchronize(self._stream.device)
        self._graphs.clear()

    def __call__(self, index: Tensor, global_size: int) -> Tensor:
        """Train on the samples at ``index (b)`` int64 of a batch of ``global_size`` on all ranks.

        Returns:
            The loss of ``step``. The next step overwrites it.
        """
        for at, group in enumerate(self.optimizer.param_groups):
            if (lr := float(group["lr"])) != self._lr_values[at]:
                self._lr_values[at] = lr
                self._lr_tensors[at].fill_(lr)
        size = (len(index), global_size)
        if self._failed or size not in self._graphs:
            self._graphs[size] = None
            with self._on_capture_stream(), self._lr_on_device():
                return self._on_samples(index, global_size)
        graph = self._graphs[size]
        if graph is None:
            try:
                graph = self._graphs[size] = self._captured(index, global_size)
            except RuntimeError as e:
                self._failed = True
                self.optimizer.zero_grad()
                first: BaseException = e
                while first.__context__ is not None:  # the last error says only that the capture has failed
                    first = first.__context__
                self.on_failure(f"{first}".partition("\n")[0])
                return self(index, global_size)
        graph.index.copy_(index)
        graph.replay()
        return graph.loss

    def _on_samples(self, index: Tensor, global_size: int) -> Tensor:
        return self.step(self.samples.inputs(index), self.samples.labels.index_select(0, index), global_size)

    def _captured(self, index: Tensor, global_size: int) -> _Graph:
        index = index.clone()
        with self._lr_on_device():
            replay, loss = self._capture(lambda: self._on_samples(index, global_size))
        return _Graph(replay, index, loss)

    @contextmanager
    def _lr_on_device(self) -> Iterator[None]:
        """Let the optimizer read its learning rates from the device."""
        groups = self.optimizer.param_groups
        before = [group["lr"] for group in groups]
        for group, lr in zip(groups, self._lr_tensors, strict=True):
            group["lr"] = lr
        given = [(id(group["lr"]), group["lr"]._version) for group in groups]
        try:
            yield
            if given != [(id(group["lr"]), group["lr"]._version) for group in groups]:
                raise ConfigError(
                    "the step changes the learning rate, which a graph cannot do; step the scheduler after it"
                )
        finally:
            for group, value in zip(groups, before, strict=True):
                group["lr"] = value

    def _capture(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Capture ``function``; returns the graph's replay, and where the result then is."""
        graph = torch.cuda.CUDAGraph()
        # In PyTorch 2.11 a failed capture leaves its stream current. The mode is thread_local because NCCL's
        # watchdog thread queries events during the capture.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
        ):
            loss = function()
        return graph.replay, loss

    @contextmanager
    def _on_capture_stream(self) -> Iterator[None]:
        # Autograd adds a parameter's gradients on the stream of its first use, which must be the graph's.
        if self._stream is None:
            yield
            return
        current: Any = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)
