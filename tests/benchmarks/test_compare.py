# SPDX-License-Identifier: MIT
"""The comparison of contestants rejects wrong results and accepts right ones."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.compare import Implementation, OperatorCase, Work, compare
from benchmarks.results import Result

ROUNDS = 5


@pytest.fixture(autouse=True)
def warm_caches(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Evict nothing from a CPU's caches, which changes times alone."""
    if device == "cpu":
        monkeypatch.setattr("benchmarks.compare.flush", lambda device: None)


def sigmoid_case(device: str, dtype: torch.dtype = torch.float32) -> OperatorCase:
    def inputs(seed: int) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        return [
            torch.randn(129, 65, device=device, dtype=dtype, generator=generator) for _ in range(2)
        ]

    work = Work(2 * 129 * 65 * dtype.itemsize, 4 * 129 * 65)
    return OperatorCase(
        "sigmoid", "129x65", dtype, torch.device(device), inputs, torch.sigmoid, work, work
    )


def measured(
    device: str, contestant: Implementation, dtype: torch.dtype = torch.float32, **options: Any
) -> Result:
    contestants = {"eager": torch.sigmoid, "other": contestant}
    options = {"reference": "eager", "rounds": ROUNDS} | options
    reference, result = compare(sigmoid_case(device, dtype), contestants, **options)
    assert (reference.ok, reference.contestant) == (True, "eager")
    return result


def by_hand(x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (1 / (1 + torch.exp(-wide))).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["backward", "full"])
def test_a_right_contestant_is_believed(device, mode, dtype):
    result = measured(device, by_hand, dtype, mode=mode)
    assert (result.ok, result.reason) == (True, "")
    assert result.p20_ms <= result.p50_ms <= result.p80_ms
    assert result.speedup > 0
    if device == "cuda":
        assert result.columns["host_ms"] > 0
        assert result.columns["peak_memory_mb"] > 0


def test_integers_are_exact(device):
    def inputs(seed: int) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        return [
            *torch.randint(-9, 9, (3, 129, 65), device=device, generator=generator).to(torch.int8)
        ]

    contestants: dict[str, Implementation] = {
        "eager": torch.maximum,
        "one too much": lambda a, b: (
            torch.maximum(a, b) + (torch.arange(65, device=device) == 64).to(a)
        ),
        "unwritten": lambda a, b: torch.empty_like(a),
    }
    case = replace(sigmoid_case(device, torch.int8), inputs=inputs, oracle=torch.maximum)
    results = compare(case, contestants, reference="eager", rounds=ROUNDS)
    assert [result.contestant for result in results if result.ok] == ["eager"]


class Stale:
    """Each call returns what the one before should have."""

    previous: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        result = torch.sigmoid(x.detach())
        previous, self.previous = self.previous, result.clone()
        return result if previous is None else previous


def unwritten_in_one_row(x: Tensor) -> Tensor:
    result = torch.empty_like(x.detach())
    torch.sigmoid(x.detach()[:-1], out=result[:-1])
    return result


WRONG: dict[str, tuple[Implementation, str]] = {
    "stale": (Stale(), "eager's are"),
    "unwritten in one row": (unwritten_in_one_row, "eager's are"),
    "inaccurate": (lambda x: torch.sigmoid(x) + 1e-6, "eager's are"),
    "in bfloat16": (lambda x: torch.sigmoid(x.bfloat16()).float(), "eager's are"),
    "mutating": (lambda x: torch.sigmoid(x.detach().add_(1)), "Rejected: an input was changed"),
    "in place": (lambda x: x.detach().sigmoid_(), "Rejected: a result shares memory with an input"),
    "in float64": (
        lambda x: torch.sigmoid(x.double()),
        "Rejected: a result is torch.float64 (129, 65) on",
    ),
    "failing": (lambda x: {}["missing"], "KeyError: 'missing'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_contestant_is_rejected(device, name):
    contestant, reason = WRONG[name]
    result = measured(device, contestant)
    assert not result.ok
    assert reason in result.reason
    assert (result.p50_ms, result.speedup) == (None, None)


@pytest.mark.parametrize("mode", ["backward", "full"])
def test_a_wrong_gradient_is_rejected(device, mode):
    assert not measured(device, lambda x: torch.sigmoid(x.detach()) + 0 * x, mode=mode).ok


def test_nothing_is_believed_beside_a_stale_reference(device):
    contestants = {"stale": Stale(), "right": torch.sigmoid}
    stale, right = compare(sigmoid_case(device), contestants, reference="stale", rounds=ROUNDS)
    assert (stale.ok, stale.reason) == (
        False,
        "Rejected: the result is not what the oracle computes",
    )
    assert (right.ok, right.reason) == (False, "nothing to compare with: stale failed")


def test_a_library_must_only_be_near(device):
    assert measured(device, WRONG["in bfloat16"][0], libraries=["other"]).ok
    assert not measured(device, unwritten_in_one_row, libraries=["other"]).ok
