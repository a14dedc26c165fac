# SPDX-License-Identifier: MIT
"""Steps of Muon that C++ plays: the same bits as Python's, also after any change.

The keys of the CPU stand for CUDA's. Launches are executed by an emulator.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from playing import needs_cpp, played, playing
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import _disable_current_modes

from torchpar.optim import Muon

pytestmark = needs_cpp
SHAPES = [(20, 30), (30, 20), (20, 30), (16, 80), (33, 33)]
Change = Callable[[Muon, list[Tensor], int], None]


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def train(optimizer: Muon, params: list[Tensor], change: Change | None, steps: int = 7) -> int:
    """Take steps, with a change before each; the number of tapes that were played."""
    generator = torch.Generator().manual_seed(1)
    tapes = 0
    for step in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        if change is not None:
            change(optimizer, params, step)
        momenta = [optimizer.state[p]["momentum_buffer"] for p in params if p in optimizer.state]
        written = [*momenta, *(p for p in params if p.grad is not None)]
        before = [t._version for t in written]
        tapes += played(optimizer.step)[1]
        if all(p.grad is not None for p in params):
            assert all(t._version > one for t, one in zip(written, before, strict=True))
    return tapes


def momentum_of(optimizer: Muon, p: Tensor) -> Tensor:
    momentum: Tensor = optimizer.state[p]["momentum_buffer"]
    return momentum


def check(make: Callable[[], tuple[Muon, list[Tensor]]], change: Change | None = None) -> int:
    """Compare the parameters and momenta after steps by C++ with Python's; the tapes played."""
    expected, params = make()
    with playing():
        found, own = make()
        tapes = train(found, own, change)
    assert train(expected, params, change) == 0
    for p, q in zip(own, params, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(momentum_of(found, p), momentum_of(expected, q))
    return tapes


def rates(optimizer: Muon, params: list[Tensor], step: int) -> None:
    optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)


def rate_of_a_tensor(optimizer: Muon, params: list[Tensor], step: int) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1 / (1 + step))


def momenta(optimizer: Muon, params: list[Tensor], step: int) -> None:
    optimizer.param_groups[0]["momentum"] = 0.9 + step / 100


def another_decay(optimizer: Muon, params: list[Tensor], step: int) -> None:
    optimizer.param_groups[0]["weight_decay"] = 0.5 if step > 4 else 0.1


def other_options(optimizer: Muon, params: list[Tensor], step: int) -> None:
    optimizer.param_groups[0]["nesterov"] = step < 4
    optimizer.param_groups[0]["ns_steps"] = 3 if step > 5 else 5


def gradients_of_other_layouts(optimizer: Muon, params: list[Tensor], step: int) -> None:
    if step in (4, 6):
        assert params[0].grad is not None
        params[0].grad = params[0].grad.t().contiguous().t()


def a_gradient_fewer(optimizer: Muon, params: list[Tensor], step: int) -> None:
    if step in (3, 5):
        params[1].grad = None


def a_state_that_was_loaded(optimizer: Muon, params: list[Tensor], step: int) -> None:
    if step == 4:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def another_parameter(optimizer: Muon, params: list[Tensor], step: int) -> None:
    if step == 4:
        with torch.no_grad():
            params[0] = params[0].clone().requires_grad_()
        params[0].grad = torch.ones_like(params[0])
        optimizer.param_groups[0]["params"][0] = params[0]


CHANGES: list[tuple[Change | None, int]] = [
    (None, 5),
    (rates, 5),
    (rate_of_a_tensor, 5),
    (momenta, 0),
    (another_decay, 5),
    (other_options, 2),
    (gradients_of_other_layouts, 4),
    (a_state_that_was_loaded, 5),
]


@pytest.mark.parametrize("change, tapes", CHANGES)
@pytest.mark.parametrize("count", [1, len(SHAPES)])
def test_steps_have_the_bits_of_pythons(count, change, tapes):
    def make() -> tuple[Muon, list[Tensor]]:
        params = parameters(SHAPES[:count])
        return Muon(params, lr=0.1), params

    assert check(make, change) == tapes


@pytest.mark.parametrize("change", [a_gradient_fewer, another_parameter])
def test_parameters_that_change_are_followed(change):
    def make() -> tuple[Muon, list[Tensor]]:
        params = parameters(SHAPES)
        return Muon(params, lr=0.1), params

    assert check(make, change) > 0


def test_groups_views_and_dtypes_have_the_bits_of_pythons():
    def make() -> tuple[Muon, list[Tensor]]:
        params = parameters([(60, 20), (8, 20), (20, 20)])
        params += parameters([(9, 20)], torch.bfloat16)
        views: Any = {"a": lambda t: t.unflatten(0, (3, 20)), "d": lambda t: t.mT}
        named = list(zip("abcd", params, strict=True))
        groups: Any = [
            {"params": named[:3], "adjust_lr_fn": "match_rms_adamw"},
            {"params": named[3:], "lr": 0.2, "momentum": 0.5},
        ]
        return Muon(groups, lr=0.1, views=views), params

    assert check(make) == 10  # two groups


def test_equal_gradients_are_told_from_different_ones():
    def same(optimizer: Muon, params: list[Tensor], step: int) -> None:
        if step < 4:
            params[2].grad = params[0].grad

    def make() -> tuple[Muon, list[Tensor]]:
        params = parameters(SHAPES)
        return Muon(params, lr=0.1), params

    assert check(make, same) == 4


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)])
@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (32, 32)])
def test_a_matrix_is_one_tape_of_launches(shape, lr):
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    from nogpu import emulate

    def make() -> tuple[Muon, list[Tensor]]:
        params = parameters([shape])
        return Muon(params, lr=lr), params

    with emulate("sm_90") as gpu, _disable_current_modes():
        assert check(make, rates if isinstance(lr, float) else None) == 5
    assert not gpu.faults
    updates = [launch for launch in gpu.launches if launch.kernel == "update_kernel"]
    assert len(updates) == 14


def test_a_failed_step_leaves_what_was():
    """Also of the groups before the one that fails."""
    params = parameters([(4, 6), (6, 4)])
    optimizer = Muon([{"params": params[:1]}, {"params": params[1:]}], lr=0.1)
    with playing():
        train(optimizer, params, None)
        before = copy.deepcopy((params, optimizer.state_dict()["state"]))
        optimizer.state[params[1]]["momentum_buffer"] = torch.zeros(3, 3)
        with pytest.raises(ValueError, match="and its momentum"):
            optimizer.step()
    after = params, optimizer.state_dict()["state"]
    assert all(map(torch.equal, after[0], before[0]))
    assert torch.equal(after[1][0]["momentum_buffer"], before[1][0]["momentum_buffer"])


def some_sharded() -> None:
    mesh = init_device_mesh("cpu", (2,))
    results = []
    for by_cpp in (False, True):
        params = parameters(SHAPES)
        for i, place in ((1, Shard(0)), (3, Shard(1))):
            params[i] = distribute_tensor(params[i].detach(), mesh, [place]).requires_grad_()
        optimizer = Muon(params, lr=0.1)
        tapes = 0
        with playing() if by_cpp else nullcontext():
            for step in range(5):
                for i, p in enumerate(params):
                    p.grad = p.detach() * (step + i + 1)
                tapes += played(optimizer.step)[1]
        assert (tapes > 0) == by_cpp
        results.append([p.to_local() if i in (1, 3) else p for i, p in enumerate(params)])  # type: ignore[attr-defined]
    assert all(map(torch.equal, *results))
    dist.barrier()


def test_matrices_of_which_some_are_sharded(ranks):
    ranks(2, some_sharded)
