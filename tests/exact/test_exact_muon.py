# SPDX-License-Identifier: MIT
"""Muon in the exact mode: its error, and its bits with other matrices, ranks, layouts and steps."""

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from placed_muon import Layer, Program, train
from playing import needs_cpp, playing
from torch import Tensor, nn

from torchpar import exact
from torchpar.errors import ConfigError
from torchpar.exact.tensor_parallel import Linear
from torchpar.ops.matrix import ordinary
from torchpar.optim import Muon, orthogonalize
from torchpar.optim import exchange as exchange_module
from torchpar.optim.chained import ChainedOptimizer
from torchpar.optim.matrices import orthogonalize_all
from torchpar.optim.newton_schulz import COEFFICIENTS
from torchpar.parallel import join_world
from torchpar.parallel.split.parts import part_of
from torchpar.parallel.split.reduction import all_gather

# Padded in batches, tall beside wide ones whose padded shape is the same, one row, larger.
SHAPES = [(20, 30), (30, 20), (33, 34), (34, 33), (1, 40), (40, 1), (2, 3), (127, 129), (300, 96)]


def iterated(x: Tensor, multiply: Callable[[Tensor, Tensor], Tensor] = torch.matmul) -> Tensor:
    """The standard iteration in the dtype of ``x``."""
    if x.shape[-2] > x.shape[-1]:
        return iterated(x.mT, multiply).mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        r = multiply(x, x.mT)
        x = a * x + multiply(b * r + c * multiply(r, r), x)
    return x


def matrix(shape: Sequence[int], decades: float = 2.0) -> Tensor:
    """A matrix whose singular values fall over some decades."""
    torch.manual_seed(sum(shape))
    u, s, v = torch.linalg.svd(torch.randn(*shape, dtype=torch.float64), full_matrices=False)
    s = torch.logspace(0, -decades, s.shape[-1], dtype=torch.float64)
    return ((u * s) @ v).float()


def error_of(found: Tensor, ideal: Tensor) -> float:
    return ((found.double() - ideal).norm() / ideal.norm()).item()


@pytest.mark.parametrize("shape", [(1, 1), (40, 1), (127, 129), (300, 96), (3, 20, 50)])
@pytest.mark.parametrize("decades", [0, 2, 4])
def test_the_error_is_at_most_twice_that_of_float32(shape, decades):
    x = matrix(shape, decades)
    ideal = iterated(x.double())
    with exact.mode():
        found = orthogonalize(x)
    assert found.dtype == torch.float32
    bound = 2 * error_of(iterated(x), ideal) + 2.0**-24
    assert error_of(found, ideal) <= bound
    # A product of bfloat16 in place of one of float32 would be noticed, except in one number.
    rounded = iterated(x, lambda a, b: a.bfloat16().float() @ b.bfloat16().float())
    assert min(shape) == 1 or error_of(rounded, ideal) > 20 * bound


def test_matrices_without_a_direction():
    with exact.mode():
        assert orthogonalize(torch.empty(0, 5)).shape == (0, 5)
        assert orthogonalize(torch.zeros(3, 4)).eq(0).all()
        assert orthogonalize(torch.full((3, 4), torch.nan)).isnan().all()


def test_auto_is_standard_where_gram_is_faster_outside():
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    with exact.mode():
        auto, standard, gram = (orthogonalize(x, ns=ns) for ns in ("auto", "standard", "gram"))
    assert torch.equal(auto, standard)
    assert not torch.equal(auto, gram)
    assert error_of(gram, iterated(x.double())) < 2.0**-10


def test_a_matrix_has_the_bits_that_it_has_alone():
    """Neither the matrices of its batch matter, nor its layout, the threads or C++."""
    matrices = [matrix(shape) for shape in SHAPES]
    run = partial(orthogonalize_all, coefficients=COEFFICIENTS, steps=5, eps=1e-7, ns="auto")
    with exact.mode():
        together = run(matrices)
        alone = [run([one])[0] for one in matrices]
        transposed = run([one.mT.contiguous().mT for one in matrices])
    for others in (alone, transposed):
        assert all(map(torch.equal, together, others))
    plain = run(matrices)  # outside of the mode, in the values of bfloat16
    assert not any(map(torch.equal, together[:1], plain[:1]))


# A training


class Model(nn.Module):
    """An embedding tied to the output head, attention, a convolution, and a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 12)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.mix = nn.Conv1d(12, 12, 3, padding=1, groups=2)
        self.up, self.down = nn.Linear(12, 40), nn.Linear(40, 12)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, text: Tensor) -> Tensor:
        x = self.tokens(text)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.mix(x.mT).mT
        return self.head(self.norm(x + self.down(nn.functional.gelu(self.up(x)))))  # type: ignore[no-any-return]


UNITS = 3


def made(group: dist.ProcessGroup | None, lr: float | Tensor = 0.02) -> tuple[Model, Any]:
    torch.manual_seed(0)
    model = Model()
    adamw = partial(torch.optim.AdamW, lr=1e-2, foreach=False)
    return model, Muon.for_model(model, lr, others=adamw, process_group=group)


def take_steps(
    model: nn.Module, optimizer: Any, steps: Sequence[int], group: dist.ProcessGroup | None
) -> None:
    rank, ranks = (group.rank(), group.size()) if group else (0, 1)
    parallel = exact.DataParallel(model, group)
    for step in steps:
        for unit in range(rank, UNITS, ranks):
            torch.manual_seed(100 * step + unit)
            text = torch.randint(11, (2, 9))
            logits = model(text[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
            parallel.backward(loss / UNITS)
        parallel.all_reduce()
        optimizer.step()
        optimizer.zero_grad()


def digest(tensors: Mapping[str, Tensor]) -> str:
    both = sorted(tensors.items())
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for _, t in both)).hexdigest()


Saved = tuple[dict[str, Tensor], dict[str, Any]]


def trained(
    steps: Sequence[int], saved: Saved | None = None, rounded: bool = False
) -> tuple[str, Saved]:
    """Train on the ranks that there are, from a saved state; the digest, and the new state.

    Args:
        rounded: send bfloat16, which the mode must not.
    """
    group = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
    wire = patch.object(exchange_module, "dtype_of_updates", lambda: torch.bfloat16)
    with exact.mode(), wire if rounded else nullcontext():
        model, optimizer = made(group)
        if saved is not None:
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(copy.deepcopy(saved[1]))
        take_steps(model, optimizer, steps, group)
        if group is not None and not saved:
            (exchange,), _ = optimizer.optimizers[0]._exchanges()
            assert 0 < len(exchange.owned) < len(exchange.params)  # the ranks divide the work
    return digest(dict(model.named_parameters())), (model.state_dict(), optimizer.state_dict())


RECORDED = "f03981791a14322ad8a53e64716cfb396111153d52934454e6b3b75a3e4ec4d8"


def test_ranks_that_divide_the_work_have_the_bits_of_one(ranks):
    """A state that some ranks saved is resumed on another number of ranks, bit for bit."""
    expected, _ = trained(range(3))
    assert expected == RECORDED
    for first, then in ((2, 3), (3, 1)):
        saved = ranks(first, trained, range(1))
        assert len({found for found, _ in saved}) == 1
        assert {found for found, _ in ranks(then, trained, range(1, 3), saved[0][1])} == {expected}
    assert expected not in {found for found, _ in ranks(2, trained, range(3), None, True)}


@pytest.mark.parametrize("lr", [torch.tensor(0.02), torch.tensor(0.02, dtype=torch.float64)])
def test_a_rate_may_be_a_tensor(lr):
    with exact.mode():
        model, optimizer = made(None, lr)
        take_steps(model, optimizer, range(3), None)
    assert digest(dict(model.named_parameters())) == RECORDED


outside = pytest.mark.filterwarnings(r"ignore:.* outside of torchpar\.exact\.mode")


@outside
def test_the_mode_may_begin_and_end_between_steps():
    """The state is the same within and without; a step is of the mode in which it is taken."""
    x = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(0))

    def found(modes: Sequence[bool]) -> list[Tensor]:
        weights = [matrix((8, 12)).requires_grad_(), matrix((12, 30)).requires_grad_()]
        optimizer, results = Muon(weights, lr=0.1), []
        for step, is_exact in enumerate(modes):
            with exact.mode() if is_exact else nullcontext():
                weights[0].grad = x[step].clone()
                weights[1].grad = x[step].T @ x[step, :, :1].expand(8, 30)
                optimizer.step()
            results += [p.detach().clone() for p in weights]
        return results

    mixed, plain, first = found([True, False]), found([False, False]), found([True])
    assert all(map(torch.equal, mixed[:2], first))
    assert not torch.equal(mixed[0], plain[0])


@needs_cpp
@outside
def test_cpp_does_not_play_steps_of_the_mode():
    def found(context: Any) -> Tensor:
        p = matrix((20, 30)).requires_grad_()
        optimizer = Muon([p], lr=0.1)
        with context:
            for step in range(12):
                p.grad = matrix((20, 30)) * (step + 1)
                with exact.mode() if step % 3 == 2 else nullcontext():
                    optimizer.step()
        return p.detach()

    assert torch.equal(found(playing()), found(nullcontext()))


# Shards


SIZES = (10, 12, 9, 7)


class Split(nn.Module):
    """Layers cut by rows and by columns, and one that each rank has whole."""

    def __init__(self, mesh: Any):
        super().__init__()
        first, second, third = pairwise(SIZES)
        self.layers = nn.ModuleList([Linear(*first, mesh, 0), Linear(*second, mesh, 1)])
        self.middle, self.head = nn.Linear(SIZES[2], SIZES[2]), nn.Linear(*third)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, self.middle):
            x = layer(x).sigmoid()
        return self.head(x)  # type: ignore[no-any-return]


def train_split(dp: int, tp: int) -> str:
    """Train split layers; all ranks divide the work. The digest of the whole weights."""
    with join_world("cpu") as world:
        world = world.with_mesh(dp=dp, tp=tp)
        with exact.mode():
            torch.manual_seed(0)
            model = Split(world.mesh["tp"])
            adamw = partial(torch.optim.AdamW, lr=1e-2, foreach=False)
            every = world.mesh["dp", "tp"] if dp * tp > 1 else None
            optimizer: ChainedOptimizer = Muon.for_model(
                model, 0.02, others=adamw, process_group=every
            )
            assert [one.choice for one in optimizer.assignments if len(one.shape) == 2] == [
                *["muon"] * 3,
                "others",
            ]
            parallel = exact.DataParallel(model, world.mesh["dp"].get_group())
            for step in range(3):
                for unit in range(world.dp_rank, 4, dp):
                    torch.manual_seed(100 * step + unit)
                    parallel.backward(model(torch.rand(5, SIZES[0])).square().sum())
                parallel.all_reduce()
                optimizer.step()
                optimizer.zero_grad()
            with ordinary():
                return digest(
                    {
                        name: all_gather(p, part_of(p)) if part_of(p).is_slice else p
                        for name, p in model.named_parameters()
                    }
                )


@pytest.mark.parametrize(
    "mesh", [(1, 2), *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ((2, 2), (1, 3)))]
)
def test_split_layers_have_the_bits_of_whole_ones(ranks, mesh):
    (expected,) = ranks(1, train_split, 1, 1)
    assert set(ranks(mesh[0] * mesh[1], train_split, *mesh)) == {expected}


PROGRAM = Program(
    mesh=(3,),
    layers=(),
    order=(),
    cut=0,
    of_model=False,
    group="",
    named=True,
    dtype=torch.float32,
    nesterov=True,
    edits=("lr", "resume"),
    seed=0,
    exact=True,
)
# Of the matrices of one optimizer some are sharded, each in its own way, and others are not.
MIXED = {
    "rows beside whole": [(8, 17, "rows"), (17, 32, "whole"), (3, 2, "columns")],
    "whole alone, a copy and a layer": [(32, 17, "whole"), (8, 8, "copies"), (17, 8, "row layer")],
    "with a group": [(8, 17, "fully_shard"), (17, 3, "whole"), (2, 32, "column layer")],
}


@pytest.mark.parametrize("name", MIXED)
def test_matrices_of_which_some_are_sharded(ranks, name):
    layers = tuple(Layer(*layer) for layer in MIXED[name])
    group = "world" if name == "with a group" else ""
    program = PROGRAM._replace(layers=layers, order=(2, 0, 1), group=group)
    assert ranks(3, train, program) == [""] * 3
    if name == "whole alone, a copy and a layer":
        assert any(ranks.outcomes(3, train, program, "exchange"))  # a planted fault


def one_rank_leaves_the_mode() -> None:
    parameters = [matrix((4, 6)).requires_grad_(), matrix((6, 4)).requires_grad_()]
    optimizer = Muon(parameters, process_group=dist.group.WORLD)
    for p in parameters:
        p.grad = torch.ones_like(p)
    with (
        exact.mode() if dist.get_rank() else nullcontext(),
        pytest.raises(ConfigError, match=r"dtype of a step's messages .*bfloat16.*float32"),
    ):
        optimizer.step()


def test_ranks_in_the_mode_and_outside_of_it_are_refused(ranks):
    ranks(2, one_rank_leaves_the_mode)
