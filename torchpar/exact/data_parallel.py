# SPDX-License-Identifier: MIT
"""Data parallelism whose bits depend neither on the ranks nor on how a batch is cut.

A *unit* of work, such as a sequence, is computed by itself, and its gradient is rounded once.
Gradients of units are added as integers. A number x is cut into bins of 30 bits:

    d_b = trunc(x / 2^(30·b)) − 2³⁰·trunc(x / 2^(30·(b + 1)))

A sum keeps two bins: the bin of its largest term so far, and the next lower bin. The sums of the
bins that are left at the end do not depend on the order of the terms. All ranks agree on the upper
bin by a maximum, and add the integers. The cut leaves out less than 2⁻³⁰ of the largest term for
each term.

Source: Demmel and Nguyen, "Parallel reproducible summation", 2015, whose bins are of floating-point
numbers.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from torchpar.errors import ConfigError
from torchpar.exact.dispatch import is_active
from torchpar.library.sharding import is_dtensor
from torchpar.ops.exact_digits import DIGITS, rounded_to
from torchpar.ops.exact_squares import exponents_of
from torchpar.ops.matrix import ordinary
from torchpar.parallel.launch.agreement import check_same_bits

_WIDTH = 30
# Bins: of a sum without terms, of the smallest number, and of infinities and NaN.
_NONE, _LOWEST, _UNUSUAL = -7, -6, 6


class BinnedSum:
    """The sum of tensors of one shape, as integers of two bins."""

    def __init__(self, like: Tensor):
        self.top = _NONE
        # Float64 holds integers below 2⁵³ exactly, so that 2²³ units fit.
        self.bins = torch.zeros(2, *like.shape, dtype=torch.float64, device=like.device)

    def add(self, x: Tensor) -> None:
        x = x.double()
        largest = x.abs().amax() if x.numel() else x.new_zeros(())
        exponent, unusual = exponents_of(largest)
        top = _UNUSUAL if unusual else max(_LOWEST, (int(exponent) - 1) // _WIDTH)
        self.raise_to(top)
        upper = (x * 2.0 ** (-_WIDTH * self.top)).trunc_()
        rest = x - upper * 2.0 ** (_WIDTH * self.top)
        self.bins[0] += upper
        self.bins[1] += rest.mul_(2.0 ** (-_WIDTH * (self.top - 1))).trunc_()

    def raise_to(self, top: int) -> None:
        """Make ``top`` the upper bin, and drop the bins below the two that the sum then keeps."""
        if top > self.top:
            self.bins = torch.stack([torch.zeros_like(self.bins[0]), self.bins[0]])
            if top > self.top + 1:
                self.bins.zero_()
            self.top = top

    def total(self, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """The sum, rounded once; NaN if a term was not finite, None if there is no term."""
        if self.top == _NONE:
            return None
        if self.top >= _UNUSUAL:
            return torch.full_like(self.bins[0], torch.nan, dtype=dtype)
        upper, lower = self.bins
        total: Tensor = upper * 2.0**_WIDTH + lower
        return rounded_to(total * 2.0 ** (_WIDTH * (self.top - 1)), dtype)


class DataParallel:
    """The exact sum of the gradients of units of work, over micro-batches and ranks.

        parallel = torchpar.exact.DataParallel(model, world.mesh["dp"].get_group())
        for text in mine:  # this rank's units, in any order
            parallel.backward(loss_of(model, text) / number_of_all_units)
        loss = parallel.all_reduce()  # sets each p.grad
        optimizer.step()

    Args:
        model: its parameters are the same on every rank, and float32, bfloat16 or float16.
        group: the ranks that share the units; by default only this rank.

    Raises:
        ConfigError: a parameter of another dtype, or a DTensor; a BatchNorm that trains its running
            statistics; no group on several ranks.
    """

    def __init__(self, model: torch.nn.Module, group: dist.ProcessGroup | None = None):
        if group is None and dist.is_initialized() and (ranks := dist.get_world_size()) > 1:
            raise ConfigError(
                f"no group was given on {ranks} ranks, expected the ranks that share the units"
            )
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        for name, p in model.named_parameters():
            if p.requires_grad and (is_dtensor(p) or p.dtype not in DIGITS):
                kind = "a DTensor" if is_dtensor(p) else str(p.dtype)
                raise ConfigError(
                    f"{name} is {kind}, expected a parameter of float32, bfloat16 or float16, "
                    "replicated on all ranks"
                )
        self.group = group
        self._norms = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, _BatchNorm) and module.track_running_stats
        }
        self._check_norms()  # before a forward pass changes them
        self._is_checked = False
        self._restart()

    def _check_norms(self) -> None:
        for name, module in self._norms.items():
            if module.training:
                kind = type(module).__name__
                what = f"{name} is a {kind}" if name else f"the model is a {kind}"
                raise ConfigError(
                    f"{what} that trains its running statistics, which depend on the order of the "
                    "units and on the ranks; give it track_running_stats=False, call its eval(), "
                    "or take GroupNorm"
                )

    @staticmethod
    def _no_loss() -> Tensor:
        return torch.zeros((), device="cpu")

    def _restart(self) -> None:
        # The last sum is the sum of the losses.
        self._sums = [BinnedSum(t) for t in (*self.parameters, self._no_loss())]

    def backward(self, loss: Tensor, gradient: Tensor | None = None) -> None:
        """Compute the gradients of one unit's ``loss``, and add them and the loss.

        On every stage of a pipeline except the last, give the unit's activations and their
        ``gradient`` instead.

        Raises:
            ConfigError: the call is not in `torchpar.exact.mode`; a parameter has a gradient
                already, or was frozen or unfrozen after this object was made; there are several
                losses; or a BatchNorm trains its running statistics.
        """
        if not is_active():
            raise ConfigError(
                "DataParallel was called outside of torchpar.exact.mode(), expected within it"
            )
        if gradient is None and loss.numel() != 1:
            raise ConfigError(
                f"the loss has shape {tuple(loss.shape)}, expected one number; take its mean"
            )
        if [id(p) for p in self.model.parameters() if p.requires_grad] != [
            *map(id, self.parameters)
        ]:
            raise ConfigError(
                "parameters were frozen or unfrozen after DataParallel was made; make another"
            )
        if any(p.grad is not None for p in self.parameters):
            raise ConfigError(
                "a parameter has a gradient before the backward pass; call zero_grad() before"
            )
        self._check_norms()  # also a model whose train() was called after this object was made
        loss.backward(gradient)
        self._add(loss if gradient is None else self._no_loss())

    @ordinary()
    def _add(self, loss: Tensor) -> None:
        self._sums[-1].add(loss.detach().cpu().view(()))
        for p, binned in zip(self.parameters, self._sums, strict=False):
            if p.grad is not None:
                binned.add(p.grad)
                p.grad = None

    @ordinary()
    def all_reduce(self) -> Tensor:
        """Set each ``p.grad`` to the sum over all units, and return the sum of the losses, float32.

        On the stages of a pipeline that have no loss, this sum is 0.

        Raises:
            ConfigError: no loss on any rank; in the first call, parameters that differ between the
                ranks.
        """
        if self.group is not None and dist.get_world_size(self.group) > 1:
            if not self._is_checked:
                parameters = dict(self.model.named_parameters())
                check_same_bits(self.group, parameters, "start with the same weights on all")
                self._is_checked = True
            device = self._sums[0].bins.device
            tops = torch.tensor([binned.top for binned in self._sums], device=device)
            dist.all_reduce(tops, dist.ReduceOp.MAX, group=self.group)
            for binned, top in zip(self._sums, tops.tolist(), strict=True):
                binned.raise_to(top)
            bins = [binned.bins for binned in self._sums]
            flat = torch.cat([b.flatten().to(device) for b in bins])
            dist.all_reduce(flat, group=self.group)
            for b, part in zip(bins, flat.split([b.numel() for b in bins]), strict=True):
                b.copy_(part.view_as(b))
        loss = self._sums[-1].total()
        for p, binned in zip(self.parameters, self._sums, strict=False):
            p.grad = binned.total(p.dtype)
        self._restart()
        if loss is None:
            raise ConfigError(
                "no rank has called DataParallel.backward since the last all_reduce; call it "
                "for each unit, not loss.backward()"
            )
        return loss
