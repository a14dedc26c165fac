# SPDX-License-Identifier: MIT
"""Checks of a reader's functions: their values and gradients beside PyTorch's and float64's."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from torchpar.errors import ConfigError
from torchpar.testing.operators.compare import farthest


def result_of(
    function: Callable[..., Tensor],
    *arguments: object,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    **options: object,
) -> Tensor:
    """Call a reader's function, whose result goes into an operator, and return the result.

    Raises:
        ConfigError: it is no tensor of that shape and dtype, of which the operator would complain.
    """
    result: object = function(*arguments, **options)
    if isinstance(result, Tensor) and tuple(result.shape) == tuple(shape) and result.dtype is dtype:
        return result
    found = "None" if result is None else f"an object of type {type(result).__name__}"
    if not isinstance(result, Tensor) and hasattr(result, "shape"):
        found += f" and shape {tuple(result.shape)}"
    if isinstance(result, Tensor):
        found = f"a tensor of shape {tuple(result.shape)} and {result.dtype}"
    name = getattr(function, "__name__", type(function).__name__)
    file = getattr(sys.modules.get(function.__module__), "__file__", None) or "?"
    raise ConfigError(
        f"{name} in {Path(file).name} returns {found}, expected a tensor of shape {tuple(shape)} "
        f"and {dtype}; mend what it returns"
    )


def compare(
    part: str, result: Tensor, reference: Callable[..., Tensor], *inputs: Tensor, terms: int = 1
) -> dict[str, str | float]:
    """Print the errors of ``result`` and of PyTorch's ``reference(*inputs)``, and return them.

    An error is the largest distance from ``reference`` in float64. Sums of ``terms`` numbers in
    another order may differ by √terms roundings of the largest result.

    Raises:
        ConfigError: another shape, or an error above those roundings and twice PyTorch's error.
    """
    exact = reference(*(t.double() for t in inputs))
    found = tuple(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
    if found != tuple(exact.shape):
        raise ConfigError(
            f"{part} is {found}, expected the shape {tuple(exact.shape)}; mend its formula"
        )
    error, native = ((t - exact).abs().max().item() for t in (result, reference(*inputs)))
    largest = exact.abs().max().item()
    most = 2 * native + terms**0.5 * torch.finfo(result.dtype).eps * largest
    print(
        f"{part}: error {error:.1e} against float64, PyTorch's {native:.1e}; "
        f"the largest number is {largest:.3g}"
    )
    if not error <= most:
        off = f"{part} is off by {error:.1e}, expected {most:.1e} at most"
        raise ConfigError(
            f"{off}: {farthest(result, exact)}; mend its formula, and do not let it change its "
            "inputs"
        )
    return {"part": part, "error": error, "pytorch_error": native}


def compare_gradients(
    part: str,
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    terms: int = 1,
) -> list[dict[str, str | float]]:
    """Compare the gradients of Σ G ⊙ f with respect to each of the ``inputs``, as `compare` does.

    Args:
        function: of the inputs, differentiable by autograd; ``reference`` is PyTorch's.

    Raises:
        ConfigError: as from `compare`, or ``function`` has no gradient.
    """

    def gradients(f: Callable[..., Tensor], *values: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in values]
        y = f(*leaves)
        if not y.requires_grad:
            raise ConfigError(
                f"{part} has no gradient, expected one; compute it by PyTorch's operators"
            )
        g = torch.linspace(-1, 2, y.numel(), device=y.device).to(y).view(y.shape)
        return torch.autograd.grad(y, leaves, g, materialize_grads=True)

    found = gradients(function, *inputs.values())
    return [
        compare(
            f"{part}, gradient of {name}",
            found[i],
            lambda *values, i=i: gradients(reference, *values)[i],
            *inputs.values(),
            terms=terms,
        )
        for i, name in enumerate(inputs)
    ]
