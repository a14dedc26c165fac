# SPDX-License-Identifier: MIT
"""Arguments that are no dense tensors: an operator refuses each in one line."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

import torchpar
from torchpar.library import custom_op

x = torch.arange(6.0).view(2, 3)
A_NUMBER = "has type int, expected Tensor; pass a tensor, as by torch.tensor"
SPARSE = "has layout torch.sparse_coo, expected torch.strided; pass {}.to_dense()"
NESTED = "is a nested tensor, expected a dense one; pass each tensor of {}.unbind()"


def nested(layout: torch.layout = torch.strided) -> Tensor:
    return torch.nested.nested_tensor([x, x[:1]], layout=layout)


CALLS: dict[str, Callable[[], Tensor]] = {
    f"torchpar::maximum: b {A_NUMBER}": lambda: torchpar.maximum(x, 0),
    f"torchpar::maximum: a {A_NUMBER}": lambda: torchpar.maximum(0, x),
    "torchpar::matmul_t: x has type list, expected Tensor; pass a tensor, as by torch.tensor": (
        lambda: torchpar.matmul_t([[1.0]])
    ),
    "torchpar::linear_sigmoid: bias has type int, expected Optional[Tensor]; pass a tensor, as by "
    "torch.tensor": lambda: torchpar.linear_sigmoid(x, x, 0),
    f"torchpar::maximum: b {SPARSE.format('b')}": lambda: torchpar.maximum(x, x.to_sparse()),
    f"torchpar::matmul_t: x {SPARSE.format('x')}": lambda: torchpar.matmul_t(x.to_sparse()),
    f"torchpar::linear_sigmoid: weight {SPARSE.format('weight')}": (
        lambda: torchpar.linear_sigmoid(x, x.to_sparse())
    ),
    f"torchpar::symmetric_matmul: b {SPARSE.format('b')}": (
        lambda: torchpar.symmetric_matmul(x, x.to_sparse())
    ),
    f"torchpar::maximum: b {NESTED.format('b')}": lambda: torchpar.maximum(x, nested()),
    f"torchpar::matmul_t: x {NESTED.format('x')}": lambda: torchpar.matmul_t(
        x=nested(torch.jagged)
    ),
    f"torchpar::linear_sigmoid: x {NESTED.format('x')}": (
        lambda: torchpar.linear_sigmoid(nested(), x)
    ),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("profiled", [False, True])
@pytest.mark.parametrize("message", CALLS)
def test_an_argument_that_is_no_dense_tensor_is_refused_in_one_line(message, profiled):
    # Without acc_events PyTorch 2.11 warns.
    profiler = torch.profiler.profile(acc_events=True) if profiled else nullcontext()
    with profiler, pytest.raises(RuntimeError) as e:
        CALLS[message]()
    assert str(e.value) == message


@pytest.mark.parametrize("context", [nullcontext, torch.inference_mode])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("leaf", [x, x.clone().requires_grad_()])
def test_a_tensor_that_is_none_is_refused_in_one_line(context, named, leaf):
    """Such as the gradient of a parameter that took no part in the loss."""
    ops = torch.ops.torchpar
    calls: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "maximum: b": (ops.maximum, (leaf,)),
        "matmul_t: x": (ops.matmul_t, ()),
        "linear_sigmoid: weight": (ops.linear_sigmoid, (leaf,)),
        "symmetric_matmul: b": (ops.symmetric_matmul, (leaf,)),
        "exact_matmul: b": (ops.exact_matmul, (leaf,)),
    }
    for name, (op, given) in calls.items():
        last = {name.partition(": ")[2]: None} if named else {}
        with context(), pytest.raises(RuntimeError) as e:
            op(*given, *([] if named else [None]), **last)
        assert str(e.value) == f"torchpar::{name} is None, expected Tensor; pass a tensor"


def test_an_operators_own_error_stays_as_it_is():
    """It may have several lines, and begin as PyTorch's message does within one of them."""
    own = "no luck\nf() Expected a value of type 'A' for argument 'b' but instead found type 'c'."

    @custom_op("misuse::fail", mutates_args=())
    def fail(x: Tensor) -> Tensor:
        raise RuntimeError(own)

    with pytest.raises(RuntimeError) as e:
        fail(x)
    assert str(e.value) == own
