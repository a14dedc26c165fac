# SPDX-License-Identifier: MIT
"""One optimizer in one situation on this rank: a model, its gradients, a record of the steps."""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol, Self, TypedDict, TypeVar
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchpar.parallel.split.parts import Part, part_of
from torchpar.parallel.split.reduction import all_gather

SHAPES = {
    "square": (32, 32),
    "tall": (64, 24),
    "wide": (24, 64),
    "uneven": (13, 10),
    "alike": (13, 10),  # for optimizers that stack matrices of one shape
    "flat": (4, 20),
}
STEPS = range(3)
# Muon's iterations amplify rounding where a gradient is singular, as it is for a small batch.
FAMILIES = ("full rank", "low rank", "large weights")
# Factor of the third family's weights: the decay of small weights hides in the rounding of updates.
LARGE = 320.0
Array = NDArray[np.float64]
T = TypeVar("T", bound=Array | None)
Batch = dict[str, tuple[Tensor, Tensor]]
Make = Callable[..., torch.optim.Optimizer]
View = Callable[[Tensor], Iterable[Tensor]]


class Failure(Exception):
    """A verdict and its detail. Other processes can unpickle it."""


class Layers(nn.Module):
    """Linear layers, and convolutions for weights of four axes, side by side.

    The loss of a batch ``{name: (x, y)}`` is Σ (layer(x)·y), so the batch alone determines the
    gradients: the gradient of a linear layer is yᵀ·x.
    """

    def __init__(self, weights: Mapping[str, Tensor]):
        super().__init__()
        for name, weight in weights.items():
            n, m, *kernel = weight.shape
            layer = nn.Conv2d(m, n, kernel, bias=False) if kernel else nn.Linear(m, n, bias=False)  # type: ignore[arg-type]
            layer.weight = nn.Parameter(weight.clone())
            self.add_module(name, layer)

    def __iter__(self) -> NoReturn:  # called by an optimizer that takes parameters
        raise Failure("crashes", "make gets a model; give its optimizer model.parameters()")

    def forward(self, batch: Batch) -> Any:
        return sum((self.get_submodule(name)(x) * y).sum() for name, (x, y) in batch.items())


def halves(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The first and the second half of a model's layers."""
    layers = list(model.named_children())
    half = (len(layers) + 1) // 2
    return nn.ModuleDict(dict(layers[:half])), nn.ModuleDict(dict(layers[half:]))


def named_layers(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The weights by their layers' names, also within a wrapper such as DistributedDataParallel."""
    return [(path.split(".")[-2], p) for path, p in model.named_parameters()]


def local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def other_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Other settings than those of a parameter group, for arguments that most optimizers have."""
    factors = {
        "lr": 0.5,
        "weight_decay": 3.0,
        "momentum": 0.9,
        "alpha": 0.9,
        "rho": 0.9,
        "eps": 100.0,
    }
    numbers = [key for key in factors if isinstance(group.get(key), int | float | Tensor)]
    settings: dict[str, Any] = {key: group[key] * factors[key] for key in numbers}
    if "lr" not in settings:
        raise Failure("not applicable", "the groups of the optimizer have no lr, a number")
    if settings.get("weight_decay") == 0:
        settings["weight_decay"] = 0.1
    if isinstance(group.get("betas"), tuple | list):
        settings["betas"] = tuple(0.9 * beta for beta in group["betas"])
    if (
        isinstance(group.get("nesterov"), bool)
        and group.get("momentum")
        and not group.get("dampening")
    ):
        settings["nesterov"] = not group["nesterov"]
    return settings


class HasGroups(Protocol):
    """An optimizer, or several that step together."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...


def multiply_rates(optimizer: HasGroups, factor: float) -> None:
    """Multiply the learning rates, as a scheduler does."""
    for group in optimizer.param_groups:
        if "lr" in group:
            group["lr"] = group["lr"] * factor


@dataclass
class Record:
    """The weights before and after each step, and the gradients or None: unsharded, in float64.

    Attributes:
        parts: the parts of each matrix that ranks had in a step; empty parts are left out.
    """

    weights: dict[str, list[Array]] = field(default_factory=dict)
    gradients: dict[str, list[Array | None]] = field(default_factory=dict)
    parts: dict[str, set[Part]] = field(default_factory=dict)

    def check_finite(self) -> None:
        """Raise a Failure if the last step, whose gradients were finite, has made weights that are
        not."""
        for name, weights in self.weights.items():
            if not np.isfinite(weights[-1]).all():
                raise Failure("wrong", f"a step makes {name} infinite or NaN")

    def shards(self) -> "Record":
        """The shards of each sharded matrix, as matrices of their own: ``tall_0``, ``tall_1``."""
        return Record(self.split(self.weights), self.split(self.gradients))

    def split(self, matrices: Mapping[str, list[T]]) -> dict[str, list[T]]:
        """The shards of ``matrices``, which are named and shaped as the weights."""
        return {
            f"{name}_{i}": [_narrow(matrix, part) for matrix in matrices[name]]
            for name, parts in self.parts.items()
            if _divide(parts)
            for i, part in enumerate(sorted(parts, key=lambda part: part.start))
        }


def _divide(parts: set[Part]) -> bool:
    """Whether a matrix is divided into ``parts``: they overlap if other ranks loaded it later."""
    sizes = [math.prod(part.size) for part in parts]
    return len(parts) > 1 and sum(sizes) == math.prod(next(iter(parts)).whole)


def _narrow(matrix: T, part: Part) -> T:
    return None if matrix is None else part.narrow(torch.from_numpy(matrix)).numpy()  # type: ignore[return-value]


class Before(NamedTuple):
    """A parameter's local tensors before a step."""

    weight: Tensor
    grad: Tensor | None
    version: int

    @classmethod
    def of(cls, p: Tensor) -> Self:
        grad = None if p.grad is None else local(p.grad).clone()
        return cls(local(p.detach()).clone(), grad, p._version)

    def check(self, name: str, p: Tensor, has_closure: bool) -> None:
        """Raise a Failure if the weight moved without a gradient, or the gradient changed.

        A closure may change the gradient.
        """
        moves = not torch.equal(local(p.detach()).nan_to_num(), self.weight.nan_to_num())
        if self.grad is None:
            if moves:
                raise Failure("wrong", f"{name} moves without a gradient")
        elif not has_closure and (p.grad is None or not torch.equal(local(p.grad), self.grad)):
            raise Failure("wrong", f"the step changes the gradient of {name}")


class Setup(TypedDict, total=False):
    """The arguments of a `Trial` by which situations differ."""

    dtype: torch.dtype
    shapes: Mapping[str, tuple[int, ...]]
    decades: float
    scale: float
    size: float
    factor: float
    views: Mapping[str, View]
    options: Mapping[str, object]
    rates: Sequence[float]
    groups: bool
    versions: bool
    zeros: Mapping[str, Sequence[int]]
    length: int


@dataclass
class Trial:
    """The model, batches and steps of a situation on a rank.

    Attributes:
        record: the weights and gradients of the steps; in a second phase also those of the first.
        family: one of `FAMILIES`: gradients of full or of low rank, or of full rank with large
            weights.
        folder: a folder of all ranks, which is empty at first.
        decades: the decades over which the singular values of a gradient are spread.
        scale: the standard deviation of the first weights.
        size: the largest singular value of a gradient.
        factor: a factor of the gradients. The reference steps have gradients without this factor.
        views: the views that the optimizer gets, by the name of a parameter.
        options: further arguments of the optimizer, in the reference steps, too.
        rates: factors of the learning rate, by step.
        groups: whether the second half of the layers is a group with other settings
            (`other_settings`).
        versions: whether autograd must notice each change of a weight.
        zeros: the steps in which a matrix has a gradient of zeros, by its name.
        length: the number of steps.
        returned: the result of each step.
    """

    make: Make
    record: Record
    family: str = ""
    folder: Path = Path()
    dtype: torch.dtype = torch.float32
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: SHAPES)
    decades: float = 1.0
    scale: float = 0.05
    size: float = 1.0
    factor: float = 1.0
    views: Mapping[str, View] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)
    rates: Sequence[float] = ()
    groups: bool = False
    versions: bool = False
    zeros: Mapping[str, Sequence[int]] = field(default_factory=dict)
    length: int = len(STEPS)
    returned: list[float | Tensor | None] = field(default_factory=list)

    def model(self) -> Layers:
        """The layers of `shapes`, the same on every rank."""
        large = (
            self.family == FAMILIES[2] and self.dtype == torch.float32
        )  # bfloat16 would round updates away
        scale = self.scale * LARGE if large else self.scale
        weights = {
            name: scale * torch.randn(shape, generator=self._generator(name), device="cpu")
            for name, shape in self.shapes.items()
        }
        return Layers({name: weight.to(self.dtype) for name, weight in weights.items()})

    def optimizer(self, model: nn.Module, **options: object) -> torch.optim.Optimizer:
        """Make the optimizer. Raise a Failure if ``make`` lacks an argument of the situation."""
        options |= dict(self.options) | ({"views": dict(self.views)} if self.views else {})
        # `signature` fails for a `partial` with an unknown argument, which the call then names.
        if options and (unknown := options.keys() - inspect.signature(self.make).parameters):
            raise Failure("not applicable", f"make has no argument {min(unknown)}")
        if not self.groups:
            return self.make(model, **options)
        first, second = halves(model)
        optimizer = self.make(first, **options)
        group = optimizer.param_groups[0]
        named = "param_names" in group
        params = list(second.named_parameters() if named else second.parameters())
        settings = {key: x for key, x in group.items() if key not in ("params", "param_names")}
        optimizer.add_param_group({**settings, **other_settings(group), "params": params})
        return optimizer

    def batch(self, step: int, share: int = 0, shares: int = 1) -> Batch:
        """Inputs and their weights in the loss, of one of several ``shares`` of the samples."""
        samples = {name: self._samples(name, shape, step) for name, shape in self.shapes.items()}
        return {name: (x[share::shares], y[share::shares]) for name, (x, y) in samples.items()}

    def steps(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *closure: Callable[[], Any],
        among: Sequence[int] | None = None,
        stale: Callable[[], None] | None = None,
    ) -> Iterator[int]:
        """Take and record steps, whose gradients the body of a loop computes.

        for step in trial.steps(model, optimizer):
            model(trial.batch(step)).backward()

        ``among`` are the numbers of the steps, by default all of the situation. ``stale`` replaces
        the recorded gradients, which a closure is to compute again.
        """
        for step in range(self.length) if among is None else among:
            optimizer.zero_grad()
            if left := [
                name
                for name, p in named_layers(model)
                if p.grad is not None and local(p.grad).any()
            ]:
                raise Failure("wrong", f"zero_grad leaves the gradient of {left[0]}")
            yield step
            if not self.record.weights:
                self._append(self.record.weights, model)
            self._append(self.record.gradients, model, "grad")
            before = {name: Before.of(p) for name, p in named_layers(model)}
            if stale:
                stale()
            self.returned.append(optimizer.step(*closure))
            for name, p in named_layers(model):
                before[name].check(name, p, has_closure=bool(closure))
                if self.versions and p._version == before[name].version:
                    raise Failure(
                        "wrong", f"autograd does not notice that {name} changes, as by p.data"
                    )
            self._append(self.record.weights, model)
            self.record.check_finite()
            for name, p in named_layers(model):
                part = part_of(p)._replace(mesh=None)  # which other processes cannot unpickle
                if name in self.record.weights and all(part.size):
                    self.record.parts.setdefault(name, set()).add(part)

    def _append(self, record: dict[str, list[Any]], model: nn.Module, of: str = "data") -> None:
        """Append the unsharded matrices by parameters' names. Several views get numbers."""
        for name, p in named_layers(model):
            t = getattr(p, of)
            if isinstance(t, DTensor):
                t = t.full_tensor()
            elif part_of(p).is_slice:
                t = all_gather(t, part_of(p))
            matrices = {name: t if t is None else t.contiguous()}
            if view := self.views.get(f"{name}.weight"):
                matrices = {f"{name}_{i}": matrix for i, matrix in enumerate(view(matrices[name]))}  # type: ignore[arg-type]
            for key, matrix in matrices.items():
                # A tensor would travel between processes by shared memory.
                record.setdefault(key, []).append(
                    None if matrix is None else matrix.to(torch.float64, copy=True).numpy()
                )

    def _samples(self, name: str, shape: tuple[int, ...], step: int) -> tuple[Tensor, Tensor]:
        """Inputs x and weights y with yᵀ·x = U·Σ·Vᵀ, where Σ is spread over `decades`."""
        n, m = shape[0], math.prod(shape[1:])
        generator = self._generator(name, step)
        rank = min(n, m) if self.family != FAMILIES[1] else min(16, max(min(n, m) // 2, 1))
        like: Any = {"dtype": torch.float64, "device": "cpu"}
        u, v, mixed = (
            torch.linalg.qr(torch.randn(size, rank, generator=generator, **like)).Q
            for size in (n, m, max(rank, 16))
        )
        mixed = mixed * math.sqrt(self.size) * torch.logspace(0, -self.decades / 2, rank, **like)
        x, y = (mixed @ v.T).to(self.dtype), (mixed @ u.T).to(self.dtype)
        if step in self.zeros.get(name, ()):
            y = torch.zeros_like(y)
        return x.view(-1, *shape[1:]), y.view(*y.shape, *[1] * (len(shape) - 2))

    def _generator(self, *of: object) -> torch.Generator:
        return torch.Generator().manual_seed(crc32(repr((0, self.family, *of)).encode()))
