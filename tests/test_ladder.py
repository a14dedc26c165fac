# SPDX-License-Identifier: MIT
"""The ladder: its checks, and what its results are compared with. That it runs is in `test_benchmarks`."""

import time

import numpy as np
import pytest

pytest.importorskip("rich", reason="rich prints the tables")
pytest.importorskip("numba", reason="Numba compiles the loops")

from benchmarks import ladder
from benchmarks.ladder import Contestant, make_case, measure, timed_turn
from benchmarks.timing import Rejected
from torchpar.baselines import numpy_mlp

SHAPES = {"maximum": (3, 5), "matmul_t": (5, 7), "linear_sigmoid": (3, 7, 5)}


@pytest.mark.parametrize("operator", SHAPES)
def test_a_wrong_result_is_rejected(operator):
    case = make_case(operator, SHAPES[operator])
    function = getattr(numpy_mlp, operator)
    result = function(*case.arguments)
    case.check(result)
    case.check(result[:2], slice(2))
    off = np.zeros_like(result)
    off[-1, -1] = 1 if operator == "maximum" else 1e-4
    wrong = [result + off, result - off, result * np.where(off, np.nan, 1), result[::-1], result[:2]]
    for i in range(len(case.arguments)):
        changed = [t.copy() for t in case.arguments]
        changed[i].flat[-1] += 300
        wrong.append(function(*changed))
    for one in wrong:
        with pytest.raises(Rejected, match=r"more than rounding|has shape"):
            case.check(one)


def test_results_are_compared_with_the_first_and_the_previous(monkeypatch):
    def reject(index: int) -> list[float]:
        raise Rejected("a number is off")

    case = make_case("maximum", (1000, 1000))  # 12 MB
    seconds = {"pure Python": 8.0, "njit": 2.0, "NumPy": 0.5}
    ways = [Contestant(name, lambda index, s=s: [s], compiles=name == "njit") for name, s in seconds.items()]
    first, second, wrong, last = measure(case, [*ways[:2], Contestant("wrong", reject), ways[2]], 3)
    ratios = [(one.found["over_pure_python"], one.found["over_previous"]) for one in (first, second, last)]
    assert ratios == [(1.0, None), (4.0, 4.0), (16.0, None)]
    assert second.found["gb_per_s"] == pytest.approx(0.006)
    assert second.found["first_s"] >= 0
    assert first.found["first_s"] is None
    assert (wrong.ok, wrong.p50_ms, "over_pure_python" in wrong.found) == (False, None, False)
    assert ladder.as_markdown([first, wrong]).splitlines() == [
        "| maximum of 1000×1000 int32 | time | × pure Python | × previous |",
        "|---|---|---|---|",
        "| pure Python | 8 s | 1 |  |",
        "| wrong |  |  |  |",
    ]


def test_a_part_is_extrapolated_and_what_is_warm_is_called_many_times():
    cold, warm = (make_case(operator, SHAPES[operator]) for operator in ("matmul_t", "linear_sigmoid"))
    turn = timed_turn(cold, lambda: time.sleep(0.01) or cold.expected[:2], rows=2)
    assert 0.025 <= turn(0)[0] < 1
    calls: list[int] = []
    turn = timed_turn(warm, lambda: calls.append(1) or warm.expected)
    turn(0)
    before = len(calls)
    turn(1)
    assert len(calls) > before + 1
