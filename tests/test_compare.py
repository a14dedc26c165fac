# SPDX-License-Identifier: MIT
"""The comparison of contestants rejects wrong results and accepts right ones, and the rows that it writes."""

import csv
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.compare import Case, Contestant, Work, compare
from benchmarks.results import Result, Table, environment, print_results
from benchmarks.timing import Ceiling

ROUNDS = 5
COLUMNS = (
    "operator mode shape dtype contestant p20_ms p50_ms p80_ms mean_ms samples speedup host_ms gb_per_s "
    "gflop_per_s roofline max_error peak_memory_mb configuration ok reason torch triton numpy python device "
    "instruction_sets commit dirty clocks date"
)


def sigmoid_case(device: str, dtype: torch.dtype = torch.float32) -> Case:
    def inputs(seed: int) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        return [torch.randn(129, 65, device=device, dtype=dtype, generator=generator) for _ in range(2)]

    work = Work(2 * 129 * 65 * dtype.itemsize, 4 * 129 * 65)
    return Case("sigmoid", "129x65", dtype, torch.device(device), inputs, torch.sigmoid, work, work)


def measured(
    device: str, contestant: Contestant, dtype: torch.dtype = torch.float32, **options: Any
) -> Result:
    contestants = {"eager": torch.sigmoid, "other": contestant}
    rows = compare(sigmoid_case(device, dtype), contestants, reference="eager", rounds=ROUNDS, **options)
    reference, row = rows
    assert reference.ok
    assert reference.contestant == "eager"
    return row


def by_hand(x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (1 / (1 + torch.exp(-wide))).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["forward", "backward", "full"])
def test_a_right_provider_is_believed(device, mode, dtype):
    row = measured(device, by_hand, dtype, mode=mode)
    assert row.ok, row.reason
    assert row.reason == ""
    assert row.p20_ms <= row.p50_ms <= row.p80_ms
    assert row.speedup > 0
    if device == "cuda":
        assert row.host_ms > 0
        assert row.peak_memory_mb > 0


def integers(device: str, dtype: torch.dtype) -> Case:
    def inputs(seed: int) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        shape = (129, 65)
        return [
            torch.randint(-9, 9, shape, device=device, dtype=dtype, generator=generator) for _ in range(3)
        ]

    work = Work(1, 1)
    return Case("maximum", "129x65", dtype, torch.device(device), inputs, torch.maximum, work, work)


def one_too_much(a: Tensor, b: Tensor) -> Tensor:
    result = torch.maximum(a, b)
    result[-1, -1] += 1
    return result


@pytest.mark.parametrize("on_cpu", [False, True], ids=["on its device", "on a CPU"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64], ids=str)
def test_integers_are_exact(device, dtype, on_cpu):
    found = set()

    def right(a: Tensor, b: Tensor) -> Tensor:
        found.add(a.device.type)
        return torch.maximum(a, b)

    contestants: dict[str, Contestant] = {
        "eager": torch.maximum,
        "right": right,
        "wrong": one_too_much,
        "unwritten": lambda a, b: torch.empty_like(a),
        "in float64": lambda a, b: torch.maximum(a, b).double(),
        "elsewhere": lambda a, b: torch.maximum(a, b).to("meta"),
    }
    there = set(contestants) - {"eager"} if on_cpu else set()
    rows = compare(integers(device, dtype), contestants, reference="eager", rounds=ROUNDS, on_cpu=there)
    assert [row.contestant for row in rows if row.ok] == ["eager", "right"]
    assert found == {"cpu" if on_cpu else device}


class Stale:
    """Each call returns what the one before should have."""

    def __init__(self) -> None:
        self.previous: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        result = torch.sigmoid(x.detach())
        previous, self.previous = self.previous, result.clone()
        return result if previous is None else previous


class Kept:
    """One buffer for all results, written by the first call alone."""

    def __init__(self) -> None:
        self.result: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.result is None:
            self.result = torch.sigmoid(x.detach())
        return self.result


class StaleGradient(torch.autograd.Function):
    kept: Tensor | None = None

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        if StaleGradient.kept is None:
            StaleGradient.kept = g.clone()
        return StaleGradient.kept.clone()


def unwritten(x: Tensor) -> Tensor:
    return torch.empty_like(x.detach())


def unwritten_in_one_row(x: Tensor) -> Tensor:
    result = torch.empty_like(x.detach())
    torch.sigmoid(x.detach()[:-1], out=result[:-1])
    return result


def inaccurate(x: Tensor) -> Tensor:
    return torch.sigmoid(x) + 1e-6


def in_bfloat16(x: Tensor) -> Tensor:
    return torch.sigmoid(x.bfloat16()).float()


def mutating(x: Tensor) -> Tensor:
    result = torch.sigmoid(x)
    x.detach().add_(1)
    return result


def in_place(x: Tensor) -> Tensor:
    return x.detach().sigmoid_()


def in_float64(x: Tensor) -> Tensor:
    return torch.sigmoid(x.double())


def failing(x: Tensor) -> Tensor:
    raise ValueError("no such kernel")


@pytest.mark.parametrize(
    "contestant, reason",
    [
        (Stale(), "eager's are"),
        (Kept(), "eager's are"),
        (unwritten, "eager's are"),
        (unwritten_in_one_row, "eager's are"),
        (inaccurate, "eager's are"),
        (in_bfloat16, "eager's are"),
        (mutating, "Rejected: an input was changed"),
        (in_place, "Rejected: a result shares memory with an input"),
        (in_float64, "Rejected: a result is torch.float64 (129, 65) on"),
        (failing, "ValueError: no such kernel"),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_a_wrong_provider_is_rejected(device, contestant, reason):
    row = measured(device, contestant)
    assert not row.ok
    assert reason in row.reason
    assert row.p50_ms is None
    assert row.speedup is None


@pytest.mark.parametrize("mode", ["backward", "full"])
def test_a_stale_gradient_is_rejected(device, mode):
    assert not measured(device, StaleGradient.apply, mode=mode).ok


@pytest.fixture
def unfinished() -> Iterator[Contestant]:
    """A contestant whose result is still being written when it returns."""
    threads: list[threading.Thread] = []

    def contestant(x: Tensor) -> Tensor:
        result, value = torch.empty_like(x.detach()), torch.sigmoid(x.detach())

        def write() -> None:
            time.sleep(0.01)
            result.copy_(value)

        threads.append(threading.Thread(target=write))
        threads[-1].start()
        return result

    yield contestant
    for thread in threads:
        thread.join()


def test_an_unfinished_result_is_rejected(unfinished):
    assert not measured("cpu", unfinished).ok


@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams belong to a GPU")
def test_a_result_of_another_stream_is_rejected():
    stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    def not_awaited(x: Tensor) -> Tensor:
        with torch.cuda.stream(stream):
            return torch.sigmoid(x.detach())

    def awaited(x: Tensor) -> Tensor:
        stream.wait_stream(torch.cuda.current_stream())
        result = not_awaited(x)
        torch.cuda.current_stream().wait_stream(stream)
        return result

    assert measured("cuda", awaited).ok
    assert not measured("cuda", not_awaited).ok


def test_nothing_is_believed_beside_a_stale_reference(device):
    contestants = {"stale": Stale(), "right": torch.sigmoid}
    rows = compare(sigmoid_case(device), contestants, reference="stale", rounds=ROUNDS)
    assert [row.ok for row in rows] == [False, False]
    assert rows[0].reason == "Rejected: the result is not what the oracle computes"
    assert rows[1].reason == "nothing to compare with: stale failed"


def test_a_library_must_only_be_near(device):
    assert measured(device, in_bfloat16, libraries=["other"]).ok
    assert not measured(device, unwritten, libraries=["other"]).ok
    assert not measured(device, Stale(), libraries=["other"]).ok


def test_providers_take_turns(device):
    order: list[str] = []

    def recorded(name: str) -> Contestant:
        return lambda x: (order.append(name), torch.sigmoid(x))[1]

    names = ["first", "second", "third"]
    compare(sigmoid_case(device), {n: recorded(n) for n in names}, reference="first", rounds=ROUNDS, calls=2)
    assert order == [name for name in names for _ in range(2)] * (1 + ROUNDS)


def test_rates_follow_from_time_and_work():
    ceiling = Ceiling(bandwidth=1e9, matmul={torch.float32: 1e12})
    row = measured("cpu", torch.sigmoid, ceiling=ceiling, mode="full")
    assert row.found["gb_per_s"] == pytest.approx(2 * 2 * 129 * 65 * 4 / (row.p50_ms * 1e-3) / 1e9)
    assert row.found["gflop_per_s"] == pytest.approx(2 * 4 * 129 * 65 / (row.p50_ms * 1e-3) / 1e9)
    assert row.found["roofline"] == pytest.approx(row.found["gb_per_s"] / 1)


def test_rows_are_written_as_they_come(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHPAR_COMMIT", "0123abc-dirty")
    environment.cache_clear()
    path = tmp_path / "rows.csv"
    table = Table(path, torch.device("cpu"))
    table.add([measured("cpu", torch.sigmoid)])
    assert table.status == 0
    assert len(path.read_text().splitlines()) == 2
    table.add([measured("cpu", failing)])
    assert table.status == 1
    environment.cache_clear()
    with path.open(newline="") as file:
        right, wrong = csv.DictReader(file)
    assert list(right) == COLUMNS.split()
    not_on_a_cpu = {"host_ms", "peak_memory_mb"}
    assert {column for column, value in right.items() if value == ""} == not_on_a_cpu | {"roofline", "reason"}
    assert (right["operator"], right["mode"], right["shape"], right["dtype"]) == (
        *("sigmoid", "forward", "129x65", "float32"),
    )
    assert (right["commit"], right["dirty"], right["torch"]) == ("0123abc", "True", torch.__version__)
    assert (right["ok"], wrong["ok"], wrong["p50_ms"]) == ("True", "False", "")


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Table(None, torch.device("cpu")).add([measured("cpu", torch.sigmoid)])
    assert list(tmp_path.iterdir()) == []


def test_the_table_leaves_out_what_is_empty_and_says_why_rows_failed(capsys):
    pytest.importorskip("rich")
    print_results("sigmoid", [measured("cpu", torch.sigmoid), measured("cpu", failing)])
    printed = capsys.readouterr().out
    assert printed.startswith("sigmoid\n")
    assert "speed-up" in printed
    assert "host" not in printed
    assert "129x65" not in printed.partition("not ok:")[0]  # the same in all rows
    assert "not ok: other sigmoid forward 129x65 float32 ValueError: no such kernel" in printed
