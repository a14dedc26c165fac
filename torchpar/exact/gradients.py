# SPDX-License-Identifier: MIT
"""Gradients of layers in exact arithmetic, summed over all samples of a step."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from torchpar.errors import ConfigError
from torchpar.exact.layers import ExactLayer
from torchpar.exact.operands import Operand, rounded_sums, row_sums
from torchpar.ops import _exact
from torchpar.ops._exact import row_exponents
from torchpar.parallel.launch.world import World
from torchpar.parallel.split.reduction import all_reduce
from torchpar.parallel.split.shared_memory import SharedSum, make_shared_sum
from torchpar.profile.collectives import all_reduced
from torchpar.profile.phases import phase


class ExactGradients:
    """Sums the gradients of a model's weights and biases over all samples of a step.

        (loss_sum(model(x), labels) / global_size).backward()
        exact_gradients()  # sets each p.grad

    With dz = dL/dz ``(b, out)`` of a layer, and e_b the exponent of sample b in its input x:

        dL/dweight = (2^e ⊙ dz)ᵀ·(2^−e ⊙ x)        dL/dbias = Σ_b dz_b

    so that the digits of the forward pass serve here too.

    Args:
        model: its linear layers are in exact arithmetic, as those of `torchpar.exact.parallel_mlp`.
            It passes over a layer whose parameters are all frozen. The inputs and the incoming gradients of
            its layers must not be changed between the passes and the call.
        world: its "dp" ranks share each batch. Every rank must make and call this object.

    A call sums all backward passes since the last call. ``zero_grad()`` discards none of them, so call this
    object in a step that is skipped, too. A sample that is not finite makes a weight's whole gradient NaN.

    Raises:
        ConfigError: a parameter of the model belongs to no layer in exact arithmetic.
    """

    def __init__(self, model: torch.nn.Module, world: World):
        self._all = {name: layer for name, layer in model.named_modules() if isinstance(layer, ExactLayer)}
        own = {p for layer in self._all.values() for p in layer.parameters()}
        for name, p in model.named_parameters():
            if p not in own:
                raise ConfigError(
                    f"{name} belongs to no layer in exact arithmetic, expected those of parallel_mlp"
                )
        self.layers = [layer for layer in self._all.values() if layer.is_trainable()]
        self.mesh = world.mesh["dp"]
        self._maximum: SharedSum | None = None
        self._sum: SharedSum | None = None
        if self.layers and self.mesh.size() > 1 and world.device.type == "cpu":
            parameters = [p for layer in self.layers for p in layer.parameters()]
            exponents, sums = [(len(p), 1) for p in parameters], [p.shape for p in parameters]
            group, timeout = self.mesh.get_group(), world.timeout
            self._maximum = make_shared_sum(group, exponents, torch.int32, timeout, torch.maximum)
            self._sum = make_shared_sum(group, sums, torch.int64, timeout)

    def __call__(self, passes: int | None = None) -> None:
        """Add the gradients to each ``p.grad``, and discard the backward passes.

        Args:
            passes: number of the last backward passes to sum, by default all since the last call. A pipeline
                first runs one on arbitrary numbers, to learn the shapes.

        Raises:
            ConfigError: there were fewer backward passes, or none; or a layer was frozen or unfrozen after
                this object was made.
        """
        if passes is not None and passes < 1:
            raise ConfigError(f"passes is {passes}, expected at least 1")
        for name, layer in self._all.items():
            if layer.is_trainable() != (layer in self.layers):
                change = "unfrozen" if layer.is_trainable() else "frozen"
                raise ConfigError(f"{name} was {change} after ExactGradients was made; make another one")
        with phase("backward"):
            terms = [term for layer in self.layers for term in _terms(layer, passes)]
            exponents = [row_exponents(term.left) for term in terms]
            self._reduce(exponents, self._maximum, dist.ReduceOp.MAX)
            totals = [term.sums(e) for term, e in zip(terms, exponents, strict=True)]
            self._reduce(totals, self._sum, dist.ReduceOp.SUM)
            for term, total, e in zip(terms, totals, exponents, strict=True):
                p = term.parameter
                if p.requires_grad:
                    gradient = term.gradient(total, e)
                    p.grad = gradient if p.grad is None else p.grad.add_(gradient)

    def _reduce(self, tensors: list[Tensor], shared: SharedSum | None, op: Any) -> None:
        """Replace ``tensors`` by their sums or maxima over the ranks."""
        if shared is not None:
            with all_reduced("dp", shared.ranks, shared.nbytes):
                shared(tensors)
        elif tensors and self.mesh.size() > 1:
            flat = all_reduce(torch.cat([t.flatten() for t in tensors]), self.mesh, op)
            for t, reduced in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                t.copy_(reduced.view_as(t))


class _Term(NamedTuple):
    """The gradient of a parameter: ``left (out, b)``·x, for a weight, or the sums of the rows of ``left``."""

    parameter: Tensor
    left: Tensor
    x: Operand | None

    def sums(self, e: Tensor) -> Tensor:
        if self.x is None:
            return row_sums(self.left, e).view(-1)
        return Operand(self.left, e).sums(self.x)

    def gradient(self, total: Tensor, e: Tensor) -> Tensor:
        if self.x is None:
            return rounded_sums(total.view(-1, 1), e).view(-1)
        return _exact.rounded(total, e, self.x.e)


def _terms(layer: ExactLayer, passes: int | None) -> list[_Term]:
    kept, layer.passes = layer.passes[-(passes or 0) :], []
    if len(kept) < (passes or 1):
        actual = f"a layer saw {len(kept)} backward passes since the last call, expected {passes or 1}"
        raise ConfigError(f"{actual}; call backward() of the loss before")
    x = Operand.cat([one.x for one in kept])
    dz = torch.cat([one.dz for one in kept]) if len(kept) > 1 else kept[0].dz
    left = torch.where(x.e > _exact.MAX_EXPONENT, torch.nan, _exact.scaled(dz, x.e))
    terms = [_Term(layer.weight, left.T, x.columns())]
    return terms if layer.bias is None else [*terms, _Term(layer.bias, dz.T, None)]
