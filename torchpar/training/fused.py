# SPDX-License-Identifier: MIT
"""Gradients of an MLP by hand, without autograd.

With A₀ = X, hidden layers Aₗ = f(Aₗ₋₁·Wₗᵀ + bₗ), logits Z of the last layer, and N samples in the
batch:

    dL/dZ = (softmax(Z) − targets) / N
    dL/dWₗ = (dL/dZₗ)ᵀ·Aₗ₋₁        dL/dbₗ = Σ dL/dZₗ over the rows
    dL/dZₗ₋₁ = (dL/dZₗ·Wₗ) ⊙ f′    f′ = A ⊙ (1 − A) for a sigmoid, 1 − A² for tanh, [A > 0] for ReLU

Autograd's bookkeeping takes as long as the arithmetic of a small network (`benchmarks.train`). The
softmax of a few classes is taken along dim 0 of ``(classes, b)``: along rows of ten numbers it
takes 8 to 25 times as long on a CPU.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import nll_loss
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from torchpar.errors import ConfigError
from torchpar.nn import MLP
from torchpar.ops import linear_sigmoid
from torchpar.ops.cpu import linear_forward, mm
from torchpar.ops.linear_sigmoid import dz_and_db
from torchpar.parallel.launch.agreement import check_same_on_all_ranks
from torchpar.parallel.launch.world import World
from torchpar.parallel.split.shared_memory import make_shared_sum
from torchpar.training.profile.phases import phase

# Set by a profiler: called with "forward", "loss" or "backward" and a layer's number, when that has
# been computed.
watch: Callable[[str, int], None] | None = None

MAX_CLASSES = 1000  # the table of targets has a row and a column for each
# Up to so many classes the softmax is taken along dim 0. Along dim 0 PyTorch adds one number after
# the other, so that the rounding error grows with the number of classes.
MAX_CLASSES_ALONG_DIM_0 = 16
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def why_not_fused(model: torch.nn.Module) -> str:  # noqa: PLR0911  # a return for each reason
    """Return why `FusedGradients` cannot replace autograd for ``model``, or "" if it can."""
    if type(model) is not MLP:
        return f"the model is a {type(model).__name__}, not a torchpar.nn.MLP"
    if model.hidden not in _ACTIVATIONS:
        return f"the model has {model.hidden} layers, not one of {', '.join(_ACTIVATIONS)}"
    if model.output != "logits":
        return f"the model has {model.output} outputs, not logits"
    if not 0 < model.sizes[-1] <= MAX_CLASSES:
        return f"the model has {model.sizes[-1]} classes, not 1 to {MAX_CLASSES}"
    layers, made = model.layers, MLP(model.sizes, model.hidden, device="meta").layers
    if [*map(type, layers)] != [*map(type, made)] or any(
        (a.in_features, a.out_features) != (b.in_features, b.out_features)
        for a, b in zip(layers, made, strict=True)
    ):
        return "a layer of the model has been replaced"
    parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
    if not all(type(p) is torch.nn.Parameter and p.requires_grad for p in parameters):
        return "a weight or a bias is not an ordinary parameter, or needs no gradient"
    if any(getattr(module, hooks) for module in model.modules() for hooks in _HOOKS) or any(
        p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters
    ):
        return "the model has hooks, which autograd would call"
    if any(
        "forward" in vars(one) or one._compiled_call_impl is not None for one in model.modules()
    ):
        return "the model's forward has been replaced or compiled"
    return ""


def _sigmoid(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (
        linear_sigmoid(x, weight, bias) if x.is_cuda else linear_forward(x, weight, bias).sigmoid_()
    )


def _tanh(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear_forward(x, weight, bias).tanh_()


def _tanh_backward(g: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    dz = torch.ops.aten.tanh_backward(g, y)
    return dz, dz.sum(0)


def _relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear_forward(x, weight, bias).relu_()


def _relu_backward(g: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    dz = torch.ops.aten.threshold_backward(g, y, 0)
    return dz, dz.sum(0)


# For each kind of hidden layers, two functions: x, weight, bias → y, and g = dL/dY, y → dL/dZ and
# dL/db.
_ACTIVATIONS: dict[
    str, tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]
] = {
    "sigmoid": (_sigmoid, dz_and_db),
    "tanh": (_tanh, _tanh_backward),
    "relu": (_relu, _relu_backward),
}


class FusedGradients:
    """The gradients of an MLP with sigmoid, tanh or ReLU layers and cross-entropy.

    The model stays an ordinary module: its parameters, state dict and ``p.grad`` are as with
    autograd, and any optimizer can step. `torch.autocast` is ignored; ``dtype`` takes its place.

    Make this object when the model is complete, in its dtype and on its device: afterwards the
    parameters may be replaced, but hooks that are added are not called. All ranks must have equal
    parameters.

    Args:
        model: a `torchpar.nn.MLP` for which `why_not_fused` returns "".
        world: its "dp" ranks share each batch; None if this process trains alone. Every rank must
            call the constructor. The gradients are added in one all-reduce, through shared memory
            where possible.
        label_smoothing: ε in [0, 1]; targets are ``(1 − ε)·onehot(labels) + ε/classes``.
        dtype: the dtype of the products, such as bfloat16; by default the model's dtype. The loss
            is computed in at least float32, and ``p.grad`` has the dtype of p.

    Raises:
        ConfigError: the reason of `why_not_fused`; ``label_smoothing`` out of range; ranks whose
            dtypes, sizes, hidden layers or ``label_smoothing`` differ.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        world: World | None = None,
        label_smoothing: float = 0.0,
        dtype: torch.dtype | None = None,
    ):
        if reason := why_not_fused(model):
            raise ConfigError(f"gradients cannot be fused: {reason}; take autograd")
        if not 0 <= label_smoothing <= 1:
            raise ConfigError(f"label_smoothing is {label_smoothing}, expected 0 to 1")
        assert isinstance(model, MLP)
        self._linears: list[Any] = [*model.layers]  # of torchpar.nn, each with a bias
        weight, classes = self._linears[-1].weight, model.sizes[-1]
        self.label_smoothing = label_smoothing
        self._activate, self._activation_gradient = _ACTIVATIONS[model.hidden]
        self.dtype = None if dtype == weight.dtype else dtype
        # The dimension of the classes, in which the softmax adds.
        self._classes_dim = 0 if classes <= MAX_CLASSES_ALONG_DIM_0 else 1
        # Losses of 16-bit logits are computed in float32, as under autocast.
        loss_dtype = torch.promote_types(weight.dtype, torch.float32)
        self.targets = torch.eye(classes, dtype=loss_dtype, device=weight.device)
        self.targets.mul_(1 - label_smoothing).add_(label_smoothing / classes)
        self._sum: Callable[[list[Tensor]], None] | None = None  # over the ranks, in place
        if world is not None and world.dp_size > 1:
            group = world.mesh.get_group("dp")
            settings = {
                "dtype": str(weight.dtype),
                "products": str(self.dtype or weight.dtype),
                "sizes": model.sizes,
                "hidden": model.hidden,
                "label_smoothing": label_smoothing,
            }
            check_same_on_all_ranks(group, "the model", settings)
            shapes = [p.shape for layer in self._linears for p in (layer.weight, layer.bias)]
            shared = (
                make_shared_sum(group, shapes, weight.dtype, world.timeout)
                if weight.is_cpu
                else None
            )
            self._sum = shared or partial(_all_reduce, group)

    @torch.no_grad()
    def __call__(self, x: Tensor, labels: Tensor, global_size: int) -> Tensor:
        """Add to each ``p.grad`` the gradient of the mean loss over the global batch.

        Args:
            x: ``(b, features)``, this rank's share of the batch, converted to ``dtype``; b may be
                0.
            labels: ``(b)`` int64 in [0, classes).
            global_size: samples of the batch, over all ranks.

        Returns:
            The sum of this rank's losses.
        """
        if torch.is_autocast_enabled(self.targets.device.type):
            with torch.autocast(self.targets.device.type, enabled=False):
                return self(x, labels, global_size)
        parameters = [(layer.weight, layer.bias) for layer in self._linears]
        with phase("backward"):
            loss, gradients = self._gradients(parameters, x, labels, global_size)
            if self._sum is not None:
                self._sum([g for layer in gradients for g in layer])
        for (weight, bias), (dw, db) in zip(parameters, gradients, strict=True):
            weight.grad = dw if weight.grad is None else weight.grad.add_(dw)
            bias.grad = db if bias.grad is None else bias.grad.add_(db)
        return loss

    def _gradients(
        self, layers: list[tuple[Tensor, Tensor]], x: Tensor, labels: Tensor, global_size: int
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The sum of the losses, and dL/dW and dL/db of each layer."""
        stored = layers[0][0].dtype
        if self.dtype:
            layers = [(weight.to(self.dtype), bias.to(self.dtype)) for weight, bias in layers]
        activations = [x.to(layers[0][0].dtype)]
        for i, (weight, bias) in enumerate(layers[:-1]):
            activations.append(self._activate(activations[-1], weight, bias))
            _computed("forward", i)
        last = len(layers) - 1
        logits = linear_forward(activations[-1], *layers[-1])
        _computed("forward", last)
        loss, dz = self._loss_and_gradient(logits, labels, global_size)
        _computed("loss", last)
        gradients = [(mm(dz.t(), activations[-1]), dz.sum(0))]
        _computed("backward", last)
        for i in range(last, 0, -1):
            dz, db = self._activation_gradient(mm(dz, layers[i][0]), activations[i])
            gradients.append((mm(dz.t(), activations[i - 1]), db))
            _computed("backward", i - 1)
        if self.dtype:
            gradients = [(dw.to(stored), db.to(stored)) for dw, db in gradients]
        return loss, gradients[::-1]

    def _loss_and_gradient(
        self, logits: Tensor, labels: Tensor, global_size: int
    ) -> tuple[Tensor, Tensor]:
        """The sum of the losses, and dL/dZ ``(b, classes)``."""
        dim = self._classes_dim
        z = logits if dim else logits.t()
        log_p = torch.log_softmax(z, dim, dtype=self.targets.dtype)
        targets = self.targets.index_select(1 - dim, labels)
        if self.label_smoothing:
            loss = -(targets * log_p).sum()
        else:
            loss = nll_loss(log_p if dim else log_p.t(), labels, reduction="sum")
        by_log_p = targets.div_(-global_size)
        dz = torch._log_softmax_backward_data(by_log_p, log_p, dim, log_p.dtype).to(logits.dtype)
        return loss, dz if dim else dz.t()


def _computed(kind: str, layer: int) -> None:
    if watch is not None:
        watch(kind, layer)


def _all_reduce(group: dist.ProcessGroup, tensors: list[Tensor]) -> None:
    flat = parameters_to_vector(tensors)
    dist.all_reduce(flat, group=group)
    vector_to_parameters(flat, tensors)
