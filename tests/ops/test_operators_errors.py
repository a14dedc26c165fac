# SPDX-License-Identifier: MIT
"""Arguments that an operator refuses: the error names the operator, the argument and what is
expected.

The errors are the same in eager mode, under torch.func and in a trace.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, vmap

import torchpar
from benchmarks.records import OPERATORS
from benchmarks.records.record import Refused

ones = torch.ones
REFUSED = [(name, refused) for name, operator in OPERATORS.items() for refused in operator.refused]


def in_fake_mode(op: Callable[..., Any], args: tuple[Tensor, ...]) -> None:
    with FakeTensorMode() as mode:
        op(*map(mode.from_tensor, args))


def in_vmap_of_the_first(op: Callable[..., Any], args: tuple[Tensor, ...]) -> None:
    first, *others = args
    vmap(op, in_dims=(-1, *[None] * len(others)))(
        first.unsqueeze(-1).expand(*first.shape, 5), *others
    )


CALLS: dict[str, Callable[[Callable[..., Any], tuple[Tensor, ...]], Any]] = {
    "eager": lambda op, args: op(*args),
    "with gradient": lambda op, args: op(*(t.requires_grad_(t.is_floating_point()) for t in args)),
    "grad": lambda op, args: grad(lambda scale: (scale * op(*args)).sum())(ones(())),
    "vmap": lambda op, args: vmap(op)(*(arg.expand(2, *arg.shape) for arg in args)),
    "vmap of the first": in_vmap_of_the_first,
    "fake": in_fake_mode,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "name, refused", REFUSED, ids=lambda v: v.message if isinstance(v, Refused) else v
)
def test_errors(name: str, refused: Refused, call: str, device: str) -> None:
    args = tuple(arg.detach().to(device) for arg in refused.args)
    message = refused.message.replace("{where}", str(args[0].device))
    expected = f"torchpar::{name}: {message}"
    with pytest.raises(RuntimeError, match=re.escape(expected)) as caught:
        CALLS[call](partial(OPERATORS[name].function, **refused.kwargs), args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("call", ["eager", "with gradient", "grad"])
@pytest.mark.parametrize("name", OPERATORS)
def test_every_argument_on_another_device_is_refused(name: str, call: str, device: str) -> None:
    operator, shapes = OPERATORS[name], OPERATORS[name].small[0]
    op = partial(operator.function, **operator.factors(len(shapes)))
    arguments = operator.overload._schema.arguments
    for moved in range(1, len(shapes)):
        args = tuple(
            ones(shape, device="meta" if i == moved else device) for i, shape in enumerate(shapes)
        )
        message = rf"torchpar::{name}: {arguments[moved].name} is .*meta.*, expected .*{device}"
        with pytest.raises(RuntimeError, match=message):
            CALLS[call](op, args)


def test_a_scalar_elsewhere_than_on_the_cpu_is_refused(device: str) -> None:
    with pytest.raises(RuntimeError, match="torchpar::maximum: b is on meta"):
        torchpar.maximum(ones(3, device=device), ones((), device="meta"))


def test_autocast_makes_one_dtype_of_floats_only(device: str) -> None:
    x, weight = ones(2, 3, device=device), ones(4, 3, device=device)
    with torch.autocast(device, torch.bfloat16):
        assert torchpar.linear_sigmoid(x, weight.bfloat16()).dtype == torch.bfloat16
        for wrong in (weight.double(), weight.long()):
            with pytest.raises(RuntimeError, match="torchpar::linear_sigmoid: weight has dtype"):
                torchpar.linear_sigmoid(x, wrong)
