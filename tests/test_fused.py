# SPDX-License-Identifier: MIT
"""Gradients of an MLP by formulas: equal to autograd's, for any optimizer, on any number of ranks."""

import copy
from pathlib import Path
from typing import Any

import plain_loop
import pytest
import torch
from samples import assert_accurate, bits, halves, normal, to_numpy
from test_training import SIZES, InDouble, assert_as_accurate, samples, train
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from torchpar import training
from torchpar.errors import ConfigError
from torchpar.nn import MLP, Linear
from torchpar.optim import SGD, ChainedOptimizer, Muon
from torchpar.parallel import join_world, parallel_mlp
from torchpar.parallel.split.clip import clip_grad_norm_
from torchpar.parallel.split.pipeline import stage_mlp
from torchpar.training import CheckpointConfig
from torchpar.training import fused as fused_module
from torchpar.training.fused import FusedGradients, why_not_fused


def make(sizes: tuple[int, ...], dtype: torch.dtype = torch.float32, hidden: Any = "sigmoid") -> MLP:
    torch.manual_seed(0)
    model = MLP(sizes, hidden, dtype=dtype)
    for layer in model.layers:  # biases begin at 0, with which a lost one would not be seen
        torch.nn.init.normal_(layer.bias)
    return model


def batch(b: int, sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return normal(b, sizes[0], dtype=dtype), torch.randint(sizes[-1], (b,), generator=generator)


def by_autograd(model: MLP, x: Tensor, labels: Tensor, global_size: int, smoothing: float = 0.0) -> Tensor:
    outputs = model(x)
    outputs = outputs.float() if outputs.dtype.itemsize == 2 else outputs  # as under autocast
    loss = cross_entropy(outputs, labels, reduction="sum", label_smoothing=smoothing)
    (loss / global_size).backward()
    return loss.detach()


def gradients(model: MLP) -> list[Tensor]:
    return [p.grad for p in model.parameters()]


def compare(
    sizes: tuple[int, ...],
    b: int,
    smoothing: float = 0.0,
    calls: int = 1,
    dtype: torch.dtype = torch.float32,
    hidden: str = "sigmoid",
) -> None:
    """Loss and gradients have at most twice the error of autograd's, both against float64."""
    fused, plain, exact = (make(sizes, dtype, hidden) for _ in range(3))
    exact.double()
    x, labels = batch(b, sizes, dtype)
    compute = FusedGradients(fused, label_smoothing=smoothing)
    for _ in range(calls):
        loss = compute(x, labels, b + 1)
        expected = by_autograd(plain, x, labels, b + 1, smoothing)
        ideal = by_autograd(exact, x.double(), labels, b + 1, smoothing)
    # z + b, the sigmoid's 3, the derivative's 3 for each hidden layer. The softmax: z + b, z - max, exp, sum,
    # log, their difference, exp; minus targets, over N.
    roundings = 9 + 7 * (len(sizes) - 2)
    for a, n, e in zip(
        [loss, *gradients(fused)], [expected, *gradients(plain)], [ideal, *gradients(exact)], strict=True
    ):
        assert (a.shape, a.dtype, a.stride()) == (n.shape, n.dtype, n.stride())
        assert_accurate(a, n, to_numpy(e), roundings)


CASES = [
    ((5, 3), 1),
    ((127, 1), 129),
    ((1, 2), 127),
    ((33, 17, 10), 0),
    ((33, 17, 10), 1),
    ((129, 127, 10), 64),
    ((20, 0, 3), 5),
    ((0, 4, 3), 5),
    ((65, 127, 129, 10), 128),
    ((784, 512, 10), 128),  # layers that oneDNN takes where it is used
    ((20, 16, 16), 300),  # the most classes in columns
    ((20, 16, 17), 300),
    ((20, 16, 100), 300),
    ((20, 16, 1000), 300),
]


@pytest.mark.parametrize("hidden", ["sigmoid", "relu"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("sizes, b", CASES, ids=str)
def test_gradients_are_as_accurate_as_autograds(
    sizes: tuple[int, ...], b: int, smoothing: float, hidden: str
) -> None:
    compare(sizes, b, smoothing, hidden=hidden)


@pytest.mark.parametrize("hidden", ["sigmoid", "relu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes, b", CASES, ids=str)
def test_gradients_in_16_bits(sizes: tuple[int, ...], b: int, dtype: torch.dtype, hidden: str) -> None:
    compare(sizes, b, 0.1, dtype=dtype, hidden=hidden)


def test_a_relu_at_exactly_0_has_no_gradient() -> None:
    """As torch.relu; autograd through torchpar.maximum takes one half."""
    fused, plain = MLP((3, 4, 2), "relu"), MLP((3, 4, 2), "relu")
    plain.load_state_dict(fused.state_dict())
    x, labels = torch.zeros(2, 3), torch.tensor([1, 1])  # the biases are 0, and so is each sum
    FusedGradients(fused)(x, labels, 3)
    by_autograd(plain, x, labels, 3)
    assert not fused.layers[0].bias.grad.any()
    assert plain.layers[0].bias.grad.any()
    assert torch.equal(fused.layers[1].bias.grad, plain.layers[1].bias.grad)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, "bfloat16"])
def test_products_of_an_unsuitable_dtype_are_refused(dtype: Any) -> None:
    with pytest.raises(ConfigError, match=r"dtype is .*, expected one of torch\.float16, torch\.bfloat16, "):
        FusedGradients(make((4, 3)), dtype=dtype)


@pytest.mark.parametrize("hidden", ["sigmoid", "relu"])
@pytest.mark.parametrize("sizes, b", [*CASES[3:5], *CASES[8:11]], ids=str)
def test_products_of_another_dtype(sizes: tuple[int, ...], b: int, hidden: str) -> None:
    """The gradients have the bits of a model of that dtype, and the parameters' dtype."""
    mixed, low = make(sizes, hidden=hidden), make(sizes, hidden=hidden)
    low.bfloat16()
    x, labels = batch(b, sizes)
    loss = FusedGradients(mixed, label_smoothing=0.1, dtype=torch.bfloat16)(x, labels, b + 1)
    expected = FusedGradients(low, label_smoothing=0.1)(x, labels, b + 1)
    assert torch.equal(bits(loss), bits(expected))
    for a, e in zip(gradients(mixed), gradients(low), strict=True):
        assert (a.dtype, e.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(bits(a), bits(e.float()))
    narrow, exact = make(sizes, torch.bfloat16, hidden), make(sizes, torch.bfloat16, hidden)
    FusedGradients(narrow, dtype=torch.float32)(x, labels, b + 1)
    FusedGradients(exact.float())(x, labels, b + 1)
    for a, e in zip(gradients(narrow), gradients(exact), strict=True):
        assert torch.equal(bits(a), bits(e.bfloat16()))


def test_gradients_accumulate() -> None:
    compare((33, 17, 10), 20, calls=2)
    model = make((33, 17, 10))
    x, labels = batch(20, (33, 17, 10))
    compute = FusedGradients(model)
    compute(x, labels, 20)
    first = [g.clone() for g in gradients(model)]
    compute(x, labels, 20)
    assert all(torch.equal(g, 2 * f) for g, f in zip(gradients(model), first, strict=True))
    model.zero_grad()
    compute(x, labels, 20)
    assert all(torch.equal(bits(g), bits(f)) for g, f in zip(gradients(model), first, strict=True))


@pytest.mark.parametrize("wrong", ["smoothing", "bias", "sigmoid", "relu"])
def test_the_comparison_rejects_wrong_formulas(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if wrong == "relu":
        monkeypatch.setattr(FusedGradients, "_hidden_gradient", lambda self, g, y: (g, g.sum(0)))
    elif wrong == "smoothing":
        whole = FusedGradients.__init__
        monkeypatch.setattr(FusedGradients, "__init__", lambda self, model, **_: whole(self, model))
    else:

        def lost(g: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            dz = g * y if wrong == "sigmoid" else g * y * (1 - y)
            return dz, dz.sum(0) * (1 + 1e-5 * (wrong == "bias"))

        monkeypatch.setattr(fused_module, "sigmoid_backward", lost)
    with pytest.raises(AssertionError):
        compare((33, 17, 10), 20, smoothing=0.1, hidden="relu" if wrong == "relu" else "sigmoid")


def test_float64_and_shared_parameters() -> None:
    sizes = (6, 6, 6, 6)
    fused, plain = make(sizes, torch.float64), make(sizes, torch.float64)
    for model in (fused, plain):
        model.layers[1].weight, model.layers[1].bias = model.layers[0].weight, model.layers[0].bias
    x, labels = batch(9, sizes, torch.float64)
    torch.testing.assert_close(
        FusedGradients(fused)(x, labels, 9), by_autograd(plain, x, labels, 9), rtol=1e-14, atol=0
    )
    assert len(gradients(fused)) == 4
    torch.testing.assert_close(gradients(fused), gradients(plain), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, -1e30])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_logits_that_are_not_finite_or_huge(value: float, smoothing: float) -> None:
    sizes = (3, 4)
    fused, plain = make(sizes), make(sizes)
    x, labels = halves(5, 3, dtype=torch.float32), torch.tensor([0, 1, 2, 3, 1])
    with torch.no_grad():
        for model in (fused, plain):
            model.layers[0].bias[1] = value
    loss = FusedGradients(fused, label_smoothing=smoothing)(x, labels, 5)
    expected = by_autograd(plain, x, labels, 5, smoothing)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    for a, b in zip(gradients(fused), gradients(plain), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_autocast_changes_nothing() -> None:
    sizes = (33, 17, 10)
    plain, cast = make(sizes), make(sizes)
    FusedGradients(plain)(*batch(20, sizes), 20)
    with torch.autocast("cpu", torch.bfloat16):
        FusedGradients(cast)(*batch(20, sizes), 20)
    assert all(torch.equal(a, b) for a, b in zip(gradients(plain), gradients(cast), strict=True))


def muon(model: MLP) -> ChainedOptimizer:
    return training.muon(model, lr=0.02, momentum=0.9, weight_decay=0.01)


OPTIMIZERS = {
    "torch.optim.SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "SGD": lambda model: SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
    "Muon": muon,
}


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_steps_and_clips(name: str, clip: bool) -> None:
    """Gradients like autograd's give parameters like autograd's, those of the previous step being equal."""
    sizes = (33, 17, 10)
    model = make(sizes)
    optimizer, compute = OPTIMIZERS[name](model), FusedGradients(model, label_smoothing=0.1)
    assert (name == "Muon") == isinstance(optimizer.__dict__.get("optimizers", [None])[0], Muon)
    losses = []
    with join_world("cpu") as world:
        for _ in range(5):
            plain = copy.deepcopy(model)
            by_autograd(plain, *batch(20, sizes), 20, smoothing=0.1)
            loss = compute(*batch(20, sizes), 20)
            if clip:
                norm = clip_grad_norm_(plain, 0.01, world)
                torch.testing.assert_close(clip_grad_norm_(model, 0.01, world), norm)
                assert norm > 0.02
            torch.testing.assert_close(gradients(model), gradients(plain))
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.step()
            assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
            optimizer.zero_grad()
            assert gradients(model) == [None] * 4
            losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.fixture(scope="module")
def trained(ranks: Any) -> dict[str, Any]:
    """Runs of one process: in float64, by autograd, and by formulas."""
    runs = {"exact": (203, 50, True), "plain": (203, 50), "fused": (203, 50, False, False, True)}
    return {name: ranks(1, train, *arguments)[0] for name, arguments in runs.items()}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_runs_are_as_accurate_as_autograds(ranks: Any, trained: dict[str, Any], world_size: int) -> None:
    """A batch remainder of 3 leaves a rank of four without samples; 50 split unevenly over three and four."""
    runs = ranks(world_size, train, 203, 50, False, False, True)
    for run in runs:
        assert run[0] == runs[0][0]
        assert all((a == b).all() for a, b in zip(run[1], runs[0][1], strict=True))
        assert run[2] == trained["plain"][2]
    assert_as_accurate(runs[0], trained["plain"], trained["exact"])
    (again,) = ranks(world_size, train, 203, 50, False, False, True)[:1]
    assert again[0] == runs[0][0]
    assert all((a == b).all() for a, b in zip(again[1], runs[0][1], strict=True))


def on_means() -> Any:
    """A wrong run, which divides a share's gradient by the samples of the share."""
    whole = FusedGradients.__call__

    def call(self: Any, x: Tensor, labels: Tensor, global_size: int) -> Tensor:
        return whole(self, x, labels, max(len(x), 1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusedGradients, "__call__", call)
        return train(203, 51, fused=True)


def test_the_comparison_of_runs_rejects_a_mean_of_shares(ranks: Any, trained: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        assert_as_accurate(ranks(2, on_means)[0], trained["plain"], trained["exact"])


def in_two_parts(folder: Path, first: bool, rest: bool, double: bool = False) -> Any:
    """Losses and weights of two epochs, each by formulas or not; the second resumes the checkpoint."""
    for epochs, fused in ((1, first), (2, rest)):
        torch.manual_seed(0)
        model: Any = InDouble(MLP(SIZES)) if double else MLP(SIZES)
        optimizer = training.sgd(model, lr=0.3, momentum=0.9, weight_decay=1e-4)
        with join_world("cpu") as world:
            run = plain_loop.train(
                *(model, optimizer, world, samples(203, 1), samples(50, 2)),
                replica=DistributedDataParallel(model) if world.world_size > 1 and not fused else model,
                fused=FusedGradients(model, world) if fused else None,
                epochs=epochs,
                batch_size=50,
                schedule="constant",
                checkpoint=CheckpointConfig(folder, every=3),
            )
    losses = [(r.train_loss, r.test_loss) for r in run.results]
    return losses, [p.detach().double().numpy() for p in model.parameters()]


@pytest.mark.parametrize("world_size", [1, 2])
def test_either_way_resumes_the_others_checkpoint(ranks: Any, tmp_path: Path, world_size: int) -> None:
    runs = {
        ways: ranks(world_size, in_two_parts, tmp_path / str(ways), *ways)[0]
        for ways in ((True, True), (False, False), (True, False), (False, True))
    }
    (exact,) = ranks(1, in_two_parts, tmp_path / "exact", False, False, True)
    for (first, _), run in runs.items():
        assert len(run[0]) == 2
        assert run[0][0] == runs[first, first][0][0]
        assert_as_accurate(run, runs[False, False], exact)
    with pytest.raises(AssertionError):  # an epoch fewer
        assert_as_accurate((exact[0][:1] * 2, exact[1]), runs[False, False], exact)


def hooked_forward(model: MLP) -> None:
    model.layers[0].register_forward_hook(lambda *_: None)


def hooked_backward(model: MLP) -> None:
    model.register_full_backward_hook(lambda *_: None)


def hooked_parameter(model: MLP) -> None:
    model.layers[0].bias.register_hook(lambda _: None)


def hooked_accumulation(model: MLP) -> None:
    model.layers[0].bias.register_post_accumulate_grad_hook(lambda _: None)


def frozen(model: MLP) -> None:
    model.layers[1].bias.requires_grad_(False)


def replaced(model: MLP) -> None:
    model.layers[0] = Linear(4, 3)


def lengthened(model: MLP) -> None:
    model.layers.append(torch.nn.Dropout())


def parametrised(model: MLP) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.layers[1])


def without_bias(model: MLP) -> None:
    model.layers[0].bias = None


def of_another_size(model: MLP) -> None:
    model.layers[-1] = Linear(3, 5)


def with_another_forward(model: MLP) -> None:
    model.forward = lambda x: x  # type: ignore[method-assign]


CHANGES = {
    of_another_size: "a layer of the model has another size",
    with_another_forward: "the model's forward has been replaced",
    hooked_forward: "hooks",
    hooked_backward: "hooks",
    hooked_parameter: "hooks",
    hooked_accumulation: "hooks",
    frozen: "a parameter needs no gradient",
    MLP.compile: "the model is compiled",
    replaced: "a layer of the model has been replaced",
    lengthened: "a layer of the model has been replaced",
    parametrised: "a layer of the model has been replaced",
    without_bias: "a weight or a bias is not an ordinary parameter",
}


class Subclass(MLP):
    pass


MODELS = {
    "no class": (lambda: MLP((4, 0)), "the model has 0 classes, not 1 to 1000"),
    "many classes": (lambda: MLP((4, 1001)), "the model has 1001 classes, not 1 to 1000"),
    "module": (lambda: torch.nn.Linear(4, 3), "the model is a Linear, not a torchpar.nn.MLP"),
    "subclass": (lambda: Subclass((4, 3)), "the model is a Subclass, not a torchpar.nn.MLP"),
    "sigmoid": (lambda: MLP((4, 3, 2), output="sigmoid"), "the model has sigmoid outputs, not logits"),
}


def refuse(model: torch.nn.Module, reason: str) -> None:
    assert reason in why_not_fused(model)
    with pytest.raises(ConfigError, match=r"gradients cannot be fused: .*; take autograd") as caught:
        FusedGradients(model)
    assert reason in str(caught.value)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_mlp_is_refused(change: Any) -> None:
    model = MLP((4, 3, 2))
    assert why_not_fused(model) == ""
    change(model)
    refuse(model, CHANGES[change])


@pytest.mark.parametrize("make_model, reason", MODELS.values(), ids=MODELS)
def test_other_models_are_refused(make_model: Any, reason: str) -> None:
    refuse(make_model(), reason)


@pytest.mark.parametrize("label_smoothing", [-0.1, 1.1, float("nan")])
def test_label_smoothing_out_of_range(label_smoothing: float) -> None:
    with pytest.raises(ConfigError, match=r"label_smoothing is .*, expected 0 to 1"):
        FusedGradients(MLP((4, 3, 2)), label_smoothing=label_smoothing)


def refuse_split_models() -> None:
    with join_world("cpu") as world:
        refuse(parallel_mlp(MLP((4, 3, 2)), world.with_mesh(tp=2).mesh["tp"]), "has been replaced")
        refuse(stage_mlp(MLP((4, 3, 2)), world.with_mesh(pp=2).mesh["pp"]), "has been replaced")


def test_split_models_are_refused(ranks: Any) -> None:
    ranks(2, refuse_split_models)


def test_a_run_keeps_each_loss_of_a_reused_tensor() -> None:
    total = torch.zeros(())
    model = MLP(SIZES)

    def fused(x: Tensor, labels: Tensor, global_size: int) -> Tensor:
        return total.copy_(FusedGradients(model)(x, labels, global_size))

    losses = []
    for gradients_of in (FusedGradients(model), fused):
        torch.manual_seed(0)
        model.load_state_dict(MLP(SIZES).state_dict())
        with join_world("cpu") as world:
            run = plain_loop.train(
                *(model, SGD(model.parameters(), lr=0.1), world, samples(100, 1), samples(10, 2)),
                fused=gradients_of,
                epochs=1,
                batch_size=30,
            )
        losses.append(run.results[0].train_loss)
    assert losses[0] == losses[1]
