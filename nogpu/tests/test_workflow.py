# SPDX-License-Identifier: MIT
"""The workflow of docs/nogpu-ci.md: its steps, by bash, in a repository with the page's kernels."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT, import_path

yaml = pytest.importorskip("yaml", reason="PyYAML reads the workflow")

pytestmark = pytest.mark.slow  # processes that import PyTorch

PAGE = (ROOT.parent / "docs" / "nogpu-ci.md").read_text("utf-8")
OF_GITHUB = ("actions/checkout@v4", "actions/setup-python@v5", "actions/cache/restore@v4")
OF_GITHUB += ("actions/cache/save@v4",)
MEND = ("tl.load(x + i)", "tl.load(x + i, mask=i < n)")


def block(language: str, first_line: str) -> str:
    """The block of the page's code that begins with a comment, its file's name."""
    (found,) = re.findall(rf"```{language}\n# {re.escape(first_line)}\n(.*?)```", PAGE, re.DOTALL)
    return found


def steps(workflow: dict, folder: Path):
    """The lines of bash of a workflow's steps, and of the steps of the action that it uses."""
    (job,) = workflow["jobs"].values()
    for step in job["steps"]:
        used = step.get("uses", "")
        if re.fullmatch(r"OWNER/REPOSITORY/nogpu@main", used):
            action = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))
            given = step.get("with", {})
            assert set(given) <= set(action["inputs"])
            inputs = {name: one["default"] for name, one in action["inputs"].items()} | given
            known = {f"inputs.{name}": value for name, value in inputs.items()}
            known["github.action_path"] = str(ROOT)
            for one in action["runs"]["steps"]:
                if "run" in one:
                    assert one["shell"] == "bash"
                    yield re.sub(r"\$\{\{ (\S+) \}\}", lambda m, by=known: by[m[1]], one["run"])
                else:
                    assert one["uses"] in OF_GITHUB
        elif "run" in step:
            yield step["run"]
        else:
            assert used in OF_GITHUB


@pytest.fixture
def repository(tmp_path):
    """A repository with the page's files, and a function that runs lines of bash there."""
    folder, commands = tmp_path / "repository", tmp_path / "commands"
    for one in (folder, folder / ".git", commands):
        one.mkdir()
    for name in ("kernels.py", "test_kernels.py"):
        (folder / name).write_text(f"# {name}\n{block('py', name)}", "utf-8")
    # All is installed: pip notes what it was asked for.
    (commands / "pip").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "pip.log"}\n')
    (commands / "pytest").write_text(f'#!/bin/sh\nexec {sys.executable} -m pytest "$@"\n')
    for one in commands.iterdir():
        one.chmod(0o755)
    path = os.pathsep.join([str(commands), os.environ["PATH"]])
    variables = {"PATH": path, "PYTHONPATH": import_path(ROOT / "src"), "COLUMNS": "96"}

    def run(line: str) -> tuple[int, str]:
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", line]
        done = subprocess.run(
            command, cwd=folder, env=os.environ | variables, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr

    return folder, run


def without_seconds(text: str) -> str:
    text = re.sub(r"\b\d+\.\d+\b", "0", text)
    return re.sub(r"^=+ | =+$", "", text, flags=re.MULTILINE)


def test_the_workflow_is_red_at_the_line_and_green_when_that_is_mended(repository, tmp_path):
    folder, run = repository
    workflow = yaml.safe_load(block("yaml", ".github/workflows/kernels.yml"))
    *before, tests = steps(workflow, folder)
    assert [run(line)[0] for line in before] == [0] * len(before)
    asked = (tmp_path / "pip.log").read_text().splitlines()
    assert asked[0] == "install torch --index-url CPU_INDEX"
    assert asked[1].endswith(f" {ROOT}")
    assert (ROOT / "pyproject.toml").exists()

    status, said = run(tests)
    assert status == 1
    kernels = (folder / "kernels.py").read_text("utf-8")
    line = 1 + kernels.splitlines().index("    value = tl.load(x + i)")
    annotation = f"::error file=kernels.py,line={line},title=out of bounds in square_kernel::"
    assert [one for one in said.splitlines() if one.startswith(annotation)]
    assert len(re.findall("^::", said, re.MULTILINE)) == 1
    (result,) = json.loads((folder / "nogpu.sarif").read_text("utf-8"))["runs"][0]["results"]
    assert result["locations"][0]["physicalLocation"]["region"]["startLine"] == line
    # The page shows the summary, whose tests have other seconds here.
    (shown,) = re.findall(r"```\n(=+ kernels, .*?)```", PAGE, re.DOTALL)
    (printed,) = re.findall(r"^=+ kernels, .*?(?=^::)", said, re.DOTALL | re.MULTILINE)
    assert summary(printed) == summary(shown)

    (folder / "kernels.py").write_text(kernels.replace(*MEND), "utf-8")
    status, said = run(tests)
    assert (status, "no faults" in said) == (0, True), said
    assert re.search(r"^::", said, re.MULTILINE) is None


def summary(text: str) -> tuple[list[str], list[str]]:
    """The lines of a summary without seconds, and the rows of its last table, in one order."""
    head, _, table = without_seconds(text).partition("\nthe tests whose")
    return head.splitlines(), sorted(" ".join(row.split()) for row in table.splitlines())


def test_the_commands_of_other_machines_and_the_hook_of_pre_commit_do_the_same(repository):
    folder, run = repository
    (lines,) = re.findall(r"## Elsewhere\n.*?```sh\n(.*?)```", PAGE, re.DOTALL)
    status, said = run(lines)
    assert (status, "2 more" in said) == (1, False), said
    assert "error: out of bounds in square_kernel" in (folder / "report.xml").read_text("utf-8")
    (hook,) = yaml.safe_load((ROOT.parent / ".pre-commit-hooks.yaml").read_text("utf-8"))
    used = yaml.safe_load(block("yaml", ".pre-commit-config.yaml"))["repos"][0]["hooks"]
    assert [one["id"] for one in used] == [hook["id"]]
    status, said = run(f"{hook['entry']} {' '.join(map(repr, used[0]['args']))}")
    assert (status, "out of bounds in square_kernel" in said) == (1, True), said


def test_a_step_that_does_not_exist_is_found(tmp_path):
    workflow = {"jobs": {"a": {"steps": [{"uses": "actions/no-such@v1"}]}}}
    with pytest.raises(AssertionError):
        list(steps(workflow, tmp_path))
