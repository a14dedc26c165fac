# SPDX-License-Identifier: MIT
"""Steps of Muon that are timed: their weights, other packages' optimizers, and a GPU's queue."""

import csv
from functools import partial

import pytest
import torch

pytest.importorskip("rich", reason="rich prints the tables")
from benchmarks.muon import others
from benchmarks.muon import steps as muon

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def without_training(monkeypatch):
    monkeypatch.setattr(muon, "train", lambda epochs, samples: [])


@pytest.fixture
def gpu_in_name(monkeypatch):
    """The CPU stands for a GPU, as it does under ``nogpu --cuda-is-cpu``."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def add_other(monkeypatch, make):
    monkeypatch.setitem(muon.OPTIMIZERS, "other", make)
    monkeypatch.setitem(others.INSTALLED, "other", make)


def broken(params):
    raise RuntimeError("it needs a GPU\nof its own")


# The parameters of the models' matrices, without embeddings, norms and biases.
@pytest.mark.parametrize(
    "label, parameters",
    [("48 of GPT-2 small", 12 * 12 * 768**2), ("112 of Llama 3.2 1B", 973_078_528)],
)
def test_the_weights_are_those_of_a_model(label, parameters):
    shapes = muon.GPU_WEIGHTS[label]
    assert len(shapes) == int(label.split()[0])
    assert sum(m * n for m, n in shapes) == parameters


def test_gpu_quick_leaves_out_the_longest_steps():
    assert [*muon.GPU_WEIGHTS][:-1] == [*muon.GPU_QUICK]
    largest = max(muon.GPU_WEIGHTS, key=lambda label: muon.memory(muon.GPU_WEIGHTS[label], 7))
    assert largest not in muon.GPU_QUICK


@pytest.mark.parametrize(
    "make, reason",
    [
        (broken, "not ok: other 24x64 RuntimeError: it needs a GPU"),
        (partial(torch.optim.SGD, lr=1e-3), "not ok: other 24x64 the weights ended"),
        (partial(torch.optim.Muon, weight_decay=0.2), "not ok: other 24x64 the weights ended"),
    ],
)
def test_another_package_that_fails_is_named_and_no_failure(monkeypatch, capsys, make, reason):
    add_other(monkeypatch, make)
    assert muon.main(["--quick", "--weights", "24x64"]) == 0
    printed = capsys.readouterr().out
    assert reason in printed
    assert printed.count("not ok:") == 1


def test_an_optimizer_of_torchpar_that_fails_is_a_failure(monkeypatch, capsys):
    monkeypatch.setitem(muon.OPTIMIZERS, "torchpar", broken)
    assert muon.main(["--quick", "--weights", "24x64"]) == 1
    assert "not ok: torchpar 24x64 RuntimeError: it needs a GPU\n" in capsys.readouterr().out


def test_quick_leaves_out_what_compiles(monkeypatch, capsys):
    monkeypatch.setitem(muon.OPTIMIZERS, "dion", broken)
    assert muon.main(["--quick", "--weights", "24x64"]) == 0
    printed = capsys.readouterr().out
    assert "left out of --quick:" in printed
    assert "it needs a GPU" not in printed


def test_a_step_on_a_gpu_has_a_time_in_a_full_queue(gpu_in_name):
    """Both steps of a turn are made, with the same gradients: the weights agree with those of
    Muon in a loop."""
    names = [muon.REFERENCE, "torchpar"]
    results = muon.compare_steps("24x64", [(24, 64)], 2, CPU, names)
    for one in results:
        assert one.ok
        assert one.samples == 2
        assert one.columns["queued_ms"] > 0
        assert one.columns["queued_speedup"] > 0
    assert results[0].columns["queued_speedup"] == 1

    torch.manual_seed(0)
    start, gradient = torch.randn(24, 64), torch.empty(24, 64)
    steps, loop = muon.Steps("torchpar", [start]), torch.nn.Parameter(start.clone())
    optimizer = muon.OPTIMIZERS["torchpar"]([loop])
    for index in range(3):
        gradient.normal_()
        (seconds,) = steps.turn([gradient], index)
        assert seconds > 0
        for _ in range(2):
            loop.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(steps.weights[0], loop)
    assert len(steps.queued.rounds) == 2  # without the first turn, which warms up


def test_a_step_on_a_cpu_has_one_time(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("the command times the GPU")
    flags = ["--quick", "--weights", "24x64", f"--output={tmp_path}"]
    assert muon.main(flags) == 0
    rows = list(csv.DictReader((tmp_path / "muon.csv").read_text().splitlines()))
    assert {row["weight"] for row in rows} == {"24x64"}
    assert "queued_ms" not in rows[0]


def test_weights_too_large_for_the_gpu_are_left_out(monkeypatch, capsys, gpu_in_name):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**10, 10**10))
    monkeypatch.setattr(muon, "OPTIMIZERS", dict(list(muon.OPTIMIZERS.items())[:4]))
    monkeypatch.setattr(muon, "compare_steps", None)  # is not called
    assert muon.main(["--weights", "112 of Llama 3.2 1B"]) == 0
    printed = capsys.readouterr().out
    # Twelve times 973,078,528 numbers of four bytes.
    assert "left out: 112 of Llama 3.2 1B, which needs 47 GB of the GPU's memory" in printed


@pytest.mark.slow  # two of them compile
@pytest.mark.filterwarnings("ignore:bf16 and fp16 are mixed")  # of compiling gram-newton-schulz
@pytest.mark.parametrize("name", [name for name, _ in others.MAKERS.values()])
def test_another_package_ends_where_pytorch_does(name):
    if name not in others.INSTALLED:
        pytest.skip(f"{name} is not installed")
    for shapes in ([(24, 64)], [(64, 24)] * 2, [(24, 64), (33, 33)]):
        _, other = muon.compare_steps("some", shapes, 2, CPU, [muon.REFERENCE, name])
        assert other.ok, other.reason
        assert other.columns["distance"] < muon.DISTANCE
