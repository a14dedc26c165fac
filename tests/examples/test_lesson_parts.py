# SPDX-License-Identifier: MIT
"""Parts of the training lessons: the orthogonality penalty, schedules, and flags that complete."""

import dataclasses
import math

from support.cli import Output
from support.learning_rate import LRSchedule, lr_scheduler
from support.orthogonality import add_orthogonality_gradient, orthogonality_penalty

import pytest
import torch
import train_ddp

from torchpar.errors import ConfigError
from torchpar.nn import MLP


def test_orthogonality_penalty(device):
    model = MLP([6, 5, 3], device=device, dtype=torch.float64)
    eye = [torch.eye(n, device=device, dtype=torch.float64) for n in (5, 3)]
    weights = [layer.weight for layer in model.layers]
    expected = sum((w @ w.T - i).norm() ** 2 for w, i in zip(weights, eye, strict=True))
    torch.testing.assert_close(orthogonality_penalty(model), expected)
    of_weights = torch.autograd.grad(expected, weights)
    weights[0].grad = torch.ones_like(weights[0])
    add_orthogonality_gradient(model, 0.5)
    torch.testing.assert_close(weights[0].grad, 1 + of_weights[0] / 2)
    assert weights[1].grad is None
    for weight in weights:
        torch.nn.init.orthogonal_(weight)
    assert orthogonality_penalty(model) < 1e-24


def test_schedules():
    def course(schedule: LRSchedule) -> list[float]:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
        (factor,) = lr_scheduler(optimizer, schedule, 4).lr_lambdas
        return [factor(step) for step in range(6)]

    assert course("linear") == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert course("constant") == [1.0] * 6
    assert course("cosine") == pytest.approx(
        [(1 + math.cos(math.pi * i / 4)) / 2 for i in (*range(5), 4)]
    )
    with pytest.raises(ConfigError, match="schedule is 'cosin', expected one of"):
        course("cosin")


def test_flags_are_completed_before_they_are_checked(tmp_path):
    """`check` changes nothing, and `completed` leaves the flags as they were given."""
    flags = train_ddp.Flags
    for given, changed in (
        (flags(), {}),
        (flags(plain=True), flags.PLAIN),
        (flags(activation="relu"), {"lr": 0.2}),
        (flags(activation="relu", lr=0.3), {}),
        (flags(activation="relu", plain=True), flags.PLAIN),
        (
            flags(dry_run=True, metrics=tmp_path / "metrics", epochs=5),
            {"epochs": 1, "metrics": None},
        ),
    ):
        before = dataclasses.asdict(given)
        completed = given.completed()
        expected = before | changed
        assert dataclasses.asdict(given) == before
        assert dataclasses.asdict(completed) == expected
        completed.check()
        assert (
            dataclasses.asdict(completed) == dataclasses.asdict(completed.completed()) == expected
        )
    assert not (tmp_path / "metrics").exists()
    with pytest.raises(ConfigError, match="--plain sets --optimizer to sgd; drop one of the two"):
        dataclasses.replace(flags(plain=True), crop=3, pool=2, optimizer="adam").completed()


def test_a_place_is_tried_before_the_run_and_no_file_is_left(tmp_path):
    page, kept = tmp_path / "new" / "step.html", tmp_path / "kept.html"
    kept.write_text("the page of an earlier run")
    for path in (page, kept):
        Output(is_folder=False).check("--replay", path)
    assert not [*page.parent.iterdir()]
    assert kept.read_text() == "the page of an earlier run"
    Output(is_folder=True).check("--report", tmp_path / "pages")
    assert (tmp_path / "pages").is_dir()
    for name, is_folder in (("kept.html/a", False), ("kept.html", True), ("n" * 300, False)):
        with pytest.raises(ConfigError, match=r"cannot be written .* another place by --replay"):
            Output(is_folder).check("--replay", tmp_path / name)
