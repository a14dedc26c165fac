# SPDX-License-Identifier: MIT
"""The page of executed kernels: its tables are those of the counters, and it is legible."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pages import Page, check_in, chromium

pytest.importorskip("matplotlib", reason="matplotlib draws")

from small_kernels import matmul_kernel, softmax_kernel
from walk import by_rows

from nogpu import Report, emulate
from nogpu.report import page
from nogpu.report.drawing import INK


def transpose() -> None:
    x = torch.randn(64, 64)
    by_rows[(64,)](x, out := torch.empty(64, 64), 64, BLOCK=64)
    assert torch.equal(out, x.T)


def softmax() -> None:
    x = torch.randn(4, 1000)
    for _ in range(3):
        softmax_kernel[(4,)](x, torch.empty(4, 1000), 1000, BLOCK=1024)


def product() -> None:
    a, b, c = (torch.randn(256, 256, dtype=torch.float16) for _ in range(3))
    matmul_kernel[(2, 2)](a, b, c, 256, BM=128, BN=128, BK=64)


CALLS = {"transpose": transpose, "softmax": softmax, "product": product}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("softmax", "product")]


@pytest.fixture(scope="module", params=["transpose", *SLOW])
def call(request) -> Callable[[], None]:
    return CALLS[request.param]


@pytest.fixture(scope="module")
def report(call) -> Report:
    with emulate(traces=True) as gpu:
        call()
    return gpu.report()


@pytest.fixture(scope="module")
def found(report, tmp_path_factory) -> Page:
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(report.as_html("kernels <of a script>"), "utf-8")
    return Page(path)


def test_a_page_shows_each_kernel_once(report, found):
    launch = report.launches[0]
    grid = " × ".join(map(str, launch.grid))
    assert found.headings == [
        "kernels <of a script>",
        "Kernels",
        f"{launch.kernel}[{grid}]",
        "Accesses to memory",
        "Lines of the source",
        "The first program",
        "The least time",
        "Launches",
    ]
    assert "kernels &lt;of a script&gt;" in found.text
    assert all(a.startswith(("#", "data:")) for a in found.addresses)
    assert INK not in found.text
    groups, *lines, times, launches = found.tables
    assert [row[0] for row in groups[1:]] == [str(len(report.launches))]
    assert len(launches) == 1 + len(report.launches)
    assert [row[0] for row in times] == ["GPU", "H100", "H200", "A100", "B200"]
    numbers = [int(row[1].replace(",", "")) for one in lines for row in one[1:] if row[1].strip()]
    assert all(one[0][-1] == "code" for one in lines)  # a phone shows the numbers first
    named = [line for line in launch.counters.lines if line.source is not None]
    assert sum(numbers) == sum(line.instruction_count for line in named)


def test_pictures_are_of_accesses_by_threads(report, found):
    """And of the first program and the roofline."""
    launch = report.launches[0]
    shown = page.worst(launch)[: page.PICTURES]
    by_threads = [one for one in shown if page.first_requests(launch, launch.trace, one)]
    computes = launch.counters.total.flops or launch.counters.total.tensor_flops
    assert by_threads
    assert found.pictures == len(by_threads) + 1 + bool(computes)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.mark.parametrize("scheme", ["dark", pytest.param("light", marks=pytest.mark.slow)])
def test_the_page_is_legible_on_a_phone(found, browser, tmp_path, scheme):
    check_in(browser, found.text, tmp_path, scheme)


def test_a_record_changes_no_number(call, report):
    """The first program is executed by Python then."""
    with emulate() as gpu:
        call()
    for one, other in zip(report.launches, gpu.launches, strict=True):
        assert one.counts.table.tolist() == other.counts.table.tolist()
        assert other.trace is None
    assert report.launches[0].trace is not None
    assert all(one.trace is None for one in report.launches[1:])
