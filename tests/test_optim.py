# SPDX-License-Identifier: MIT
"""Tests of Muon and Newton–Schulz against float64 and `torch.optim.Muon`, on one rank and on several."""

import copy
import doctest
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.optim._muon import _zeropower_via_newtonschulz
from torch.utils._python_dispatch import TorchDispatchMode

from torchpar import reference
from torchpar.optim import ChainedOptimizer, Muon, muon, newton_schulz, orthogonalize
from torchpar.optim.newton_schulz import COEFFICIENTS, NewtonSchulz

TORCH = torch.optim.Muon


def torchs(x: Tensor, steps: int = 5) -> Tensor:
    return _zeropower_via_newtonschulz(x, COEFFICIENTS, steps, 1e-7).double()


def exact(x: Tensor, steps: int = 5) -> Tensor:
    return reference.orthogonalize(x.double(), steps)


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (2, 5, 8), (127, 129), (20, 3)])
def test_the_reference_applies_its_polynomial_to_the_singular_values(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    u, values, vh = torch.linalg.svd(x, full_matrices=False)
    values /= values.norm(dim=-1, keepdim=True)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    # Each of five iterations multiplies a rounding error of x by at most a = 3.4445.
    rounding = max(shape) * 3.4445**5 * torch.finfo(torch.float64).eps
    torch.testing.assert_close(
        reference.orthogonalize(x), u * values.unsqueeze(-2) @ vh, rtol=0, atol=rounding
    )
    assert torch.equal(reference.orthogonalize(torch.zeros(shape)), torch.zeros(shape))


def matrices(n: int, m: int) -> Iterator[Tensor]:
    torch.manual_seed(0)
    yield torch.randn(n, m)
    u, v = torch.linalg.qr(torch.randn(n, n))[0], torch.linalg.qr(torch.randn(m, n))[0]
    yield u * torch.logspace(0, -6, n) @ v.T
    yield torch.randn(n, 4) @ torch.randn(4, m)


def assert_as_orthogonal(found: Tensor, torchs: Tensor, exact: Tensor) -> None:
    """Singular values are at most twice as far as torch's from 1 and from each other.

    This holds for all of them, and for those of directions in which x is not near 0.
    """
    values_of = [torch.linalg.svdvals(x) for x in (found, torchs, exact)]
    large = values_of[2] > 0.6
    for kept in (large, torch.ones_like(large)):
        values, torchs_values = (v[kept] for v in values_of[:2])
        assert (values - 1).abs().max() <= 2 * (torchs_values - 1).abs().max()
        assert (values - 1).norm() <= 2 * (torchs_values - 1).norm()
        assert values.max() - values.min() <= 2 * (torchs_values.max() - torchs_values.min())


def compare_orthogonality(n: int, m: int, steps: int, ns: str, coefficients: Any = COEFFICIENTS) -> None:
    """Singular values as in `assert_as_orthogonal`; the error to float64 is at most twice torch's."""
    for x in matrices(n, m):
        ideal, expected = exact(x, steps), torchs(x, steps)
        found = orthogonalize(x, coefficients, steps, ns=ns).double()
        assert_as_orthogonal(found, expected, ideal)
        assert (found - ideal).norm() <= 2 * (expected - ideal).norm()


@pytest.mark.parametrize("ns", ["standard", "gram"])
@pytest.mark.parametrize("n, m", [(64, 64), (127, 129), (129, 258), (65, 300)])
def test_orthogonality_is_no_worse_than_torchs(n, m, ns):
    compare_orthogonality(n, m, 5, ns)


@pytest.mark.parametrize("ns", ["standard", "gram"])
def test_orthogonality_of_halved_products(ns):
    with patch.object(newton_schulz, "_SYMMETRIC_ROWS", 257):
        compare_orthogonality(257, 520, 5, ns)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8])
def test_orthogonality_after_other_numbers_of_steps(steps):
    compare_orthogonality(64, 130, steps, "gram")


def hard_matrices(n: int, m: int) -> Iterator[tuple[Tensor, float]]:
    """Spectra for which Gram iterations lose accuracy, each with the factor that newton_schulz.py states."""
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(n, n))[0], torch.linalg.qr(torch.randn(m, n))[0]
    for decades, factor in ((1, 1.8), (2, 6), (3, 6)):
        yield u * torch.logspace(0, -decades, n) @ v.T, factor
    for times in (2, 4):
        yield torch.randn(n // times, m).repeat(times, 1), 11


@pytest.mark.parametrize("steps", [4, 5, 8])
def test_orthogonality_of_hard_matrices(steps):
    for x, factor in hard_matrices(256, 512):
        ideal, expected, found = exact(x, steps), torchs(x, steps), orthogonalize(x, steps=steps).double()
        assert_as_orthogonal(found, expected, ideal)
        assert steps != 5 or (found - ideal).norm() <= factor * (expected - ideal).norm()


def test_orthogonality_rejects_iterations_after_three_on_one_gram_matrix():
    with (
        patch.object(newton_schulz, "_iterations_per_gram", lambda *_: [2, 3, 3]),
        pytest.raises(AssertionError),
    ):
        test_orthogonality_of_hard_matrices(8)


@pytest.mark.parametrize("iterations", [[5], [2, 3], [1, 4]])
def test_orthogonality_rejects_missing_restarts(iterations):
    with (
        patch.object(newton_schulz, "_iterations_per_gram", lambda *_: iterations),
        pytest.raises(AssertionError),
    ):
        compare_orthogonality(64, 64, 5, "gram")


@pytest.mark.parametrize("ns", ["standard", "gram"])
def test_orthogonality_rejects_a_wrong_coefficient(ns):
    a, b, c = COEFFICIENTS
    with pytest.raises(AssertionError):
        compare_orthogonality(65, 300, 5, ns, (a, b, 1.03 * c))


@pytest.mark.parametrize("ns", ["standard", "gram"])
def test_any_layout(ns):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 20, 45)
    expected = orthogonalize(x, ns=ns)
    assert expected.dtype == torch.bfloat16
    for same in (torch.stack([x, x], -1)[..., 0], x.double()):
        torch.testing.assert_close(orthogonalize(same, ns=ns), expected, rtol=0, atol=0)
    torch.testing.assert_close(orthogonalize(x.mT, ns=ns), expected.mT, rtol=0, atol=0)
    by_columns = orthogonalize(x.mT.contiguous().mT, ns=ns)
    assert by_columns.mT.is_contiguous()
    for i in range(2):
        for j in range(3):
            error = (torchs(x[i, j]) - exact(x[i, j])).norm()
            for other in (by_columns[i, j], orthogonalize(x[i, j], ns=ns)):  # sums in other orders
                assert (other.double() - expected[i, j].double()).norm() <= 4 * error
    assert torch.equal(x, torch.stack([x, x], -1)[..., 0])


@pytest.mark.parametrize("ns", ["standard", "gram"])
def test_degenerate_matrices(ns):
    for shape in [(0, 5), (5, 0), (3, 0, 4), (0, 3, 4)]:
        assert orthogonalize(torch.ones(shape), ns=ns).shape == shape
    assert torch.equal(orthogonalize(torch.zeros(64, 200), ns=ns), torch.zeros(64, 200, dtype=torch.bfloat16))
    x = torch.randn(3, 7)
    assert torch.equal(orthogonalize(x, steps=0, ns=ns), (x.bfloat16() / x.bfloat16().norm()))


def test_auto_takes_the_faster():
    assert newton_schulz._iterations_per_gram(255, 4096, 5, "auto") == [1] * 5
    assert newton_schulz._iterations_per_gram(256, 511, 5, "auto") == [1] * 5
    assert newton_schulz._iterations_per_gram(256, 512, 5, "auto") == [2, 3]
    assert newton_schulz._iterations_per_gram(256, 511, 5, "gram") == [2, 1, 1, 1]
    assert newton_schulz._iterations_per_gram(256, 512, 5, "standard") == [1] * 5
    for steps in range(20):
        for n, m in [(300, 300), (300, 600), (300, 1200)]:
            assert sum(newton_schulz._iterations_per_gram(n, m, steps, "gram")) == steps


SHAPES = [(20, 30), (30, 20), (20, 30), (16, 80), (33, 33), (90, 17)]
ITERATION = "torch.optim._muon._zeropower_via_newtonschulz"


def fill_gradients(params: list[Tensor]) -> None:
    for p in params:
        p.grad = torch.randn_like(p)


def run(
    *kinds: Callable[..., TORCH],
    dtype: torch.dtype = torch.float32,
    carry: Callable[[dict[str, Any]], dict[str, Any]] = copy.deepcopy,
    **arguments: Any,
) -> list[Tensor]:
    """The parameters after three steps of each kind of optimizer, which loads the state of the one before.

    The gradients do not depend on the parameters, so that every run orthogonalises the same matrices.
    """
    torch.manual_seed(0)
    params = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in SHAPES]
    state = None
    for kind in kinds:
        optimizer = kind(params, **{"lr": 0.1, **arguments})
        if state is not None:
            optimizer.load_state_dict(carry(state))
        for _ in range(3):
            fill_gradients(params)
            optimizer.step()
        state = optimizer.state_dict()
    return [p.detach().double() for p in params]


def compare_runs(*kinds: Callable[..., TORCH], **arguments: Any) -> None:
    """Parameters are at most twice as far as torch's from those of an orthogonalisation in float64."""
    found = run(*kinds, **arguments)
    arguments.pop("carry", None)
    expected = run(*[TORCH] * len(kinds), **arguments)
    with patch(ITERATION, lambda x, coefficients, steps, eps: exact(x, steps).to(x.dtype)):
        ideal = run(*[TORCH] * len(kinds), **arguments)
    for x, y, z in zip(found, expected, ideal, strict=True):
        assert (x - z).norm() <= 2 * (y - z).norm()


def gram(params: Any, **arguments: Any) -> Muon:
    return Muon(params, ns="gram", **arguments)


@pytest.mark.parametrize("ours", [Muon, gram])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"nesterov": False, "momentum": 0.5},
        {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw", "ns_steps": 4},
        {"dtype": torch.float64, "eps": 1e-3},
        {"dtype": torch.bfloat16},
        {"lr": torch.tensor(0.1)},
    ],
)
def test_steps_are_torchs(ours, arguments):
    compare_runs(ours, **arguments)


@pytest.mark.parametrize("ours", [Muon, gram])
def test_checkpoints_interchange_with_torchs(ours):
    compare_runs(TORCH, ours)
    compare_runs(ours, TORCH)


def test_the_comparison_of_runs_rejects_a_lost_momentum():
    with pytest.raises(AssertionError):
        compare_runs(TORCH, Muon, carry=lambda state: {**state, "state": {}})


@pytest.mark.parametrize(
    "wrong", [{"lr": 0.11}, {"weight_decay": 0.11}, {"nesterov": False}, {"ns_steps": 4}]
)
def test_the_comparison_of_runs_rejects(wrong):
    with pytest.raises(AssertionError):
        compare_runs(lambda params, **arguments: Muon(params, **{**arguments, **wrong}))


def test_every_adjustment_of_the_installed_torch():
    for name in ("original", "match_rms_adamw", "spectral_unclamped", "unknown"):
        try:
            TORCH([torch.zeros(2, 2)], adjust_lr_fn=name)
        except ValueError:
            with pytest.raises(ValueError, match=name):
                Muon([torch.zeros(2, 2)], adjust_lr_fn=name)
        else:
            compare_runs(Muon, adjust_lr_fn=name)


def test_the_state_dict_is_torchs():
    params = [torch.randn(shape).requires_grad_() for shape in SHAPES]
    fill_gradients(params)
    ours, theirs = Muon(params, ns="gram"), TORCH(params)
    for optimizer in (ours, theirs):
        optimizer.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    assert copy.deepcopy(ours).ns == "gram"


@contextmanager
def record_batches() -> Iterator[list[tuple[int, ...]]]:
    """A list of the shapes that `Muon` orthogonalises meanwhile."""
    shapes: list[tuple[int, ...]] = []
    update = muon._Batch.update

    def recorded(batch: muon._Batch, ns: NewtonSchulz) -> Tensor:
        shapes.append(tuple(batch.shape))
        return update(batch, ns)

    with patch.object(muon._Batch, "update", recorded):
        yield shapes


def test_matrices_of_one_shape_are_orthogonalised_together():
    params = [torch.randn(s).requires_grad_() for s in [(20, 30), (30, 20), (33, 33), (20, 30), (20, 30)]]
    params.append(torch.randn(33, 33, dtype=torch.float64).requires_grad_())
    fill_gradients(params)
    for work, expected in [
        (muon._BATCH_MULTIPLICATIONS, [(3, 20, 30), (1, 30, 20), (1, 33, 33), (1, 33, 33)]),
        (2 * 20 * 20 * 30, [(2, 20, 30), (1, 20, 30), (1, 30, 20), (1, 33, 33), (1, 33, 33)]),
        (1, [(1, 20, 30)] * 3 + [(1, 30, 20), (1, 33, 33), (1, 33, 33)]),
    ]:
        with record_batches() as shapes, patch.object(muon, "_BATCH_MULTIPLICATIONS", work):
            Muon(params).step()
        assert shapes == expected


def test_a_step_moves_parameters_with_a_gradient_and_returns_the_loss():
    p, other = torch.randn(4, 6).requires_grad_(), torch.randn(4, 6).requires_grad_()
    before = other.detach().clone()
    optimizer = Muon([p, other], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    loss = closure().item()
    assert optimizer.step(closure).item() == loss
    assert p.square().sum() < loss
    assert torch.equal(other, before)
    optimizer.zero_grad()
    assert optimizer.step() is None


class NoReading(TorchDispatchMode):
    """Refuse to copy a value from a device to Python."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lr", [0.1, torch.tensor([0.1])])
def test_a_step_reads_nothing_back(lr):
    params = [torch.randn(shape).requires_grad_() for shape in SHAPES]
    for kind in (Muon, gram):
        optimizer = kind(params, lr=lr)
        fill_gradients(params)
        with NoReading():
            optimizer.step()
    if isinstance(lr, Tensor):
        with pytest.raises(AssertionError), NoReading():
            TORCH(params, lr=lr).step()


def shared_and_not(expected_collectives: int) -> list[list[tuple[int, ...]]]:
    """Compare shared steps with unshared ones; returns the shapes that this rank orthogonalised in each."""
    torch.manual_seed(0)
    whole = [torch.randn(s).requires_grad_() for s in SHAPES * 2]
    shared = [p.detach().clone().requires_grad_() for p in whole]

    def groups(params: list[Tensor]) -> list[dict[str, Any]]:
        return [{"params": params[:7]}, {"params": params[7:], "ns_steps": 3, "nesterov": False}]

    reference = Muon(groups(whole), lr=0.1)
    optimizer = Muon(groups(shared), lr=0.1, process_group=dist.group.WORLD)
    shapes = []
    for step in range(3):
        fill_gradients(whole)
        for p, q in zip(whole, shared, strict=True):
            p.grad = None if step == 1 and p is whole[3] else p.grad
            q.grad = p.grad
        reference.step()
        with record_batches() as mine, CommDebugMode() as collectives:
            optimizer.step()
        assert collectives.get_total_counts() == expected_collectives
        shapes.append(mine)
        for p, q in zip(whole, shared, strict=True):
            torch.testing.assert_close(q, p, rtol=0, atol=0)
    one = [torch.randn(3, 4).requires_grad_()]  # no matrix is left for the second rank
    fill_gradients(one)
    Muon(one, process_group=dist.group.WORLD).step()
    Muon([torch.randn(3, 4)], process_group=dist.group.WORLD).step()
    return shapes


def test_shared_steps_have_the_bits_of_unshared_ones(ranks):
    first, second = ranks(2, shared_and_not, 1)
    for step, (a, b) in enumerate(zip(first, second, strict=True)):
        work = [sum(muon._multiplications(torch.Size(shape)) for shape in share) for share in (a, b)]
        assert 0.8 < work[0] / work[1] < 1.25
        assert sum(shape[0] for shape in a + b) == 2 * len(SHAPES) - (step == 1)


def shared_without_gathering() -> None:
    with patch.object(dist, "all_gather_into_tensor", lambda everyone, mine, group: everyone.fill_(mine[0])):
        shared_and_not(0)


def test_sharing_needs_the_other_ranks(ranks):
    with pytest.raises(AssertionError, match="Tensor-likes are not equal"):
        ranks(2, shared_without_gathering)


def sharded_steps() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for placement in (Shard(0), Shard(1), Replicate()):
        torch.manual_seed(0)
        whole = [torch.randn(s).requires_grad_() for s in [(8, 12), (8, 12), (12, 5)]]
        split = [distribute_tensor(p.detach(), mesh, [placement]).requires_grad_() for p in whole]
        fill_gradients(whole)
        for p, q in zip(whole, split, strict=True):
            q.grad = distribute_tensor(p.grad, mesh, [placement])
        for ns in ("standard", "gram"):
            Muon(whole, lr=0.1, ns=ns).step()
            Muon(split, lr=0.1, ns=ns).step()
            for p, q in zip(whole, split, strict=True):
                # Partial sums over a split axis are rounded to bfloat16: 5 steps of 3 products, on 2 ranks.
                torch.testing.assert_close(q.full_tensor(), p, rtol=0, atol=2 * 0.1 * 15 * 2**-8)
        with pytest.raises(ValueError, match="process_group needs replicated parameters"):
            Muon(split, process_group=dist.group.WORLD)


def test_sharded_parameters(ranks):
    ranks(2, sharded_steps)


def test_the_parameters_are_torchs():
    """A torch with other parameters fails this test: write them out in Muon too."""
    ours, theirs = (inspect.signature(kind).parameters for kind in (Muon, TORCH))
    described = [[(p.name, p.kind, p.default) for p in kind.values()] for kind in (ours, theirs)]
    assert described[0][: len(theirs)] == described[1]
    assert list(ours)[len(theirs) :] == ["ns", "process_group"]
    with pytest.raises(TypeError, match="momentm"):
        Muon([torch.zeros(2, 2)], momentm=0.3)


def test_the_recipe_gives_muon_the_hidden_matrices_alone():
    (example,) = doctest.DocTestFinder(recurse=False).find(Muon, "Muon", module=muon)
    names: dict[str, Any] = {}
    example.globs = names
    assert doctest.DocTestRunner().run(example, clear_globs=False) == (0, len(example.examples))
    model, chain = names["model"], names["optimizer"]
    by_muon = {id(p) for group in chain.optimizers[0].param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert (id(p) in by_muon) == (name.startswith("1.") and p.dim() == 2), name
    model(torch.arange(10)).square().mean().backward()
    before = copy.deepcopy(model.state_dict())
    chain.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_a_chain_of_optimizers_is_one():
    """It can be copied, takes a closure, and refuses a group, which none of its optimizers would step."""
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    chain = ChainedOptimizer(torch.optim.SGD([p], lr=0.1), torch.optim.SGD([q], lr=0.2))
    copied = copy.deepcopy(chain)
    for optimizer in (chain, copied):
        (a,), (b,) = (group["params"] for group in optimizer.param_groups)

        def closure(a: torch.Tensor = a, b: torch.Tensor = b) -> torch.Tensor:
            loss = (a + 2 * b).sum()
            loss.backward()
            return loss

        assert optimizer.step(closure).item() == 6
        torch.testing.assert_close(a, torch.full((2,), 0.9))
        torch.testing.assert_close(b, torch.full((2,), 0.6))
    with pytest.raises(NotImplementedError, match="add the group to one of its optimizers"):
        chain.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})


def test_a_chain_of_optimizers_keeps_their_state():
    p, q, r = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    members = torch.optim.SGD([p], lr=0.1, momentum=0.9), torch.optim.SGD([q], lr=0.1, momentum=0.5)
    for _ in range(2):
        for t in (p, q):
            t.grad = torch.ones(2)
        for member in members:
            member.step()
    chain = ChainedOptimizer(*members)
    torch.testing.assert_close(chain.state[p]["momentum_buffer"], torch.full((2,), 1.9))
    torch.testing.assert_close(chain.state[q]["momentum_buffer"], torch.full((2,), 1.5))
    saved = chain.state_dict()
    members[0].add_param_group({"params": [r]})
    with pytest.raises(RuntimeError, match="a group was added to one of its optimizers; make a new chain"):
        chain.load_state_dict(saved)
    assert len(ChainedOptimizer(*members).state) == 2


def test_refusals():
    for kind in (orthogonalize, lambda x, ns: Muon([x], ns=ns)):
        with pytest.raises(ValueError, match="ns is 'gramm', expected 'auto', 'standard' or 'gram'"):
            kind(torch.randn(3, 4), ns="gramm")
    for x in (torch.randn(3), torch.ones(3, 4, dtype=torch.int64), torch.ones(3, 4, dtype=torch.complex64)):
        with pytest.raises(ValueError, match=r"x is .*, expected floating \(\*, n, m\)"):
            orthogonalize(x)
    with pytest.raises(ValueError, match=r"2 coefficients, expected 3"):
        orthogonalize(torch.randn(3, 4), (1.0, 2.0))
    for steps in (-1, 100):
        with pytest.raises(ValueError, match=f"steps is {steps}, expected 0 to 99"):
            orthogonalize(torch.randn(3, 4), steps=steps)
    with pytest.raises(ValueError, match="2D"):
        Muon([torch.randn(3)])
