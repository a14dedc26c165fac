# SPDX-License-Identifier: MIT
"""Verdicts on right, wrong and cheating kernels, and on programs that do not end by themselves.

The first comment of a file of judged names its reference, and the row and the reason that it must
get. Other candidates are right ones that `changed_candidates` changes.
"""

import json
import re
import subprocess
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import changed_candidates
import pytest
import torch
from changed_candidates import Changed
from processes import ForkedPopen

import nogpu
from nogpu.judge import confined
from nogpu.judge.confined import Limits
from nogpu.judge.judging import Judge, main
from nogpu.judge.problem import Problem, Right
from nogpu.judge.verdict import Verdict, wrong

FOLDER = Path(__file__).with_name("judged")
LIMITS = Limits(seconds=120, files=64 * 2**20, memory=4 * 2**30)
QUICK = ("softmax_without_maximum", "decoy")


class Candidate(NamedTuple):
    """A candidate: its file's text, its reference, and the row and the reason that it must get."""

    code: str
    reference: str
    reason: str


def of_folder(kind: str) -> dict[str, Candidate]:
    found = {}
    for path in sorted((FOLDER / kind).glob("*.py")):
        text = path.read_text("utf-8")
        reference, _, reason = text.splitlines()[1].removeprefix("# ").partition(": ")
        found[path.stem] = Candidate(text, reference, reason)
    return found


RIGHT = of_folder("right")


def changed(ones: dict[str, Changed]) -> dict[str, Candidate]:
    return {
        name: Candidate(one.code(), RIGHT[one.of].reference, one.reason)
        for name, one in ones.items()
    }


def cases(candidates: dict[str, Candidate]) -> list[object]:
    return [
        pytest.param(name, one, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, one in candidates.items()
    ]


@cache
def judge(reference: str, limits: Limits = LIMITS) -> Judge:
    with nogpu.emulate() as gpu, nogpu.cuda_is_cpu(gpu):
        problem = Problem(FOLDER / "references" / f"{reference}.py", {})
    return Judge(problem, "H100", limits)


@pytest.fixture
def start(request, fork_server, monkeypatch) -> None:
    """Fork the processes of candidates that have no part in their start. Those of QUICK, the
    hostile ones and the commands' are started as a user's."""
    if request.node.callspec.params["name"] not in QUICK:
        ForkedPopen.start_server()
        popen = SimpleNamespace(**{**vars(subprocess), "Popen": ForkedPopen})
        monkeypatch.setattr(confined, "subprocess", popen)


def has_reason(verdict: Verdict, reason: str) -> bool:
    lines = [f"{row.name}: {row.detail}" for row in verdict.rows if row.outcome != "works"]
    return any(re.match(reason, line) for line in lines)


def verdict_of(name: str, candidate: Candidate, folder: Path) -> Verdict:
    (path := folder / f"{name}.py").write_text(candidate.code, "utf-8")
    return judge(candidate.reference).judge(path)


@pytest.mark.parametrize("name, candidate", cases(RIGHT | changed(changed_candidates.RIGHT)))
def test_a_right_kernel_passes(name, candidate, tmp_path, start):
    verdict = verdict_of(name, candidate, tmp_path)
    assert verdict.ok, str(verdict)
    assert {row.outcome for row in verdict.rows} <= {"works"}, str(verdict)


def test_the_approximations_of_exp_and_of_division_are_no_error():
    """A softmax of 40 alike numbers: PyTorch is off by one rounding, and the kernel by five."""
    exact = torch.full((40,), 1 / 40, dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    native = Right([(exact * (1 + eps)).float()], [])
    for roundings, says in (5, ""), (9, "an error of .* by twice that of the reference"):
        outputs = [(exact * (1 + roundings * eps)).float()]
        found = wrong(outputs, native, Right([exact], []), None, [])
        assert re.match(says, found) if says else not found, found


@pytest.mark.parametrize("name, candidate", cases(changed(changed_candidates.WRONG)))
def test_a_subtly_wrong_kernel_does_not_pass(name, candidate, tmp_path, start):
    verdict = verdict_of(name, candidate, tmp_path)
    assert verdict.word == "wrong", str(verdict)
    assert has_reason(verdict, candidate.reason), str(verdict)


@pytest.mark.parametrize(
    "name, candidate", cases(of_folder("cheats") | changed(changed_candidates.CHEATS))
)
def test_a_cheat_does_not_pass(name, candidate, tmp_path, start):
    verdict = verdict_of(name, candidate, tmp_path)
    assert not verdict.ok, str(verdict)
    assert has_reason(verdict, candidate.reason), str(verdict)


def test_what_a_reference_lacks_is_one_line(tmp_path, capsys):
    """The status is 2; nothing of a candidate has run."""
    candidate = FOLDER / "right" / "softmax_one_block.py"
    for text, said in (
        ("x = 1", "has neither Model and get_inputs, nor ref_kernel and generate_input"),
        ("import nothing_here", "ends with ModuleNotFoundError: No module named 'nothing_here'"),
        (
            "def ref_kernel(data): ...\ndef generate_input(m, n, seed): ...",
            "generate_input takes m, n; give them by --sizes m=128 n=128",
        ),
        (
            "import torch\nclass Model(torch.nn.Module):\n    def forward(self, x):\n"
            "        raise ValueError('mine')\ndef get_inputs(): return [torch.ones(2)]",
            "reference.py ends with ValueError: mine",
        ),
    ):
        (reference := tmp_path / "reference.py").write_text(text, "utf-8")
        assert main([str(reference), str(candidate)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("python -m nogpu judge: error: ")
        assert said in line


@pytest.mark.slow
def test_the_example_of_the_page(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "judge.md").read_text("utf-8")
    for code in re.findall(r"^```py\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        (tmp_path / code.split()[1]).write_text(code, "utf-8")
    files = [str(tmp_path / name) for name in ("softmax.py", "mine.py", "theirs.py")]
    assert main([*files, "--json", str(tmp_path / "verdicts.json")]) == 1
    printed, pattern = capsys.readouterr().out, re.compile(r"\d+ of 1320")
    shown = [
        line
        for block in re.findall(r"^```\n(\w+\.py: .*?)^```", page, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]
    assert len(shown) > 15
    lines = pattern.sub("N of 1320", printed).splitlines()
    # Registers are ptxas's, and times a model's, which later versions may mend.
    stable = [line for line in shown if not line.startswith(("softmax ", "estimate"))]
    assert [one for one in stable if pattern.sub("N of 1320", one) not in lines] == []
    mine, theirs = json.loads((tmp_path / "verdicts.json").read_text("utf-8"))
    assert (mine["verdict"], theirs["verdict"]) == ("wrong", "cheats")
    assert mine["reason"].startswith("special values: large: NaN at")


@pytest.mark.slow
def test_a_product_of_4096_is_sampled(tmp_path, capsys):
    code = (FOLDER / "references" / "linear.py").read_text("utf-8")
    large = code.replace("torch.randn(24, 48)", "torch.randn(4096, 4096)")
    (reference := tmp_path / "linear.py").write_text(large.replace("48, 40", "4096, 4096"), "utf-8")
    assert main([str(reference), str(FOLDER / "right" / "linear_tiled.py")]) == 0
    printed = capsys.readouterr().out
    assert "(4096, 4096); at most 64 programs of a launch were executed" in printed
    assert f"{2 * 4096**3 + 4096**2:,} operations: at least" in printed  # and sigmoids
    assert re.search(r"^given size +works +16,384 numbers$", printed, re.MULTILINE)


@pytest.mark.slow
def test_what_is_wrong_at_the_given_size_alone_is_found(tmp_path):
    code = (FOLDER / "references" / "maximum.py").read_text("utf-8").replace("24, 40", "1024, 1024")
    (reference := tmp_path / "maximum.py").write_text(code, "utf-8")
    wraps = Changed("maximum_flat", "", {"tl.load(a + i,": "tl.load(a + (i & 0x7FFF),"})
    (candidate := tmp_path / "wraps.py").write_text(wraps.code(), "utf-8")
    with nogpu.emulate() as gpu, nogpu.cuda_is_cpu(gpu):
        problem = Problem(reference, {})
    verdict = Judge(problem, "H100", LIMITS).judge(candidate)
    assert [row.name for row in verdict.rows if row.outcome == "wrong"] == ["given size"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", sorted((FOLDER / "hostile").glob("*.py")), ids=lambda one: one.stem
)
def test_a_program_without_an_end_is_stopped_and_named(path):
    reason = path.read_text("utf-8").splitlines()[1].removeprefix("# ")
    seconds = 20 if path.stem == "loops" else 60
    verdict = judge("softmax", LIMITS._replace(seconds=seconds)).judge(path)
    assert verdict.word == "stopped", str(verdict)
    assert has_reason(verdict, f"runs: {reason}"), str(verdict)
