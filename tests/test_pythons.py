# SPDX-License-Identifier: MIT
"""Versions of Python: all places name the same, and CI finds the newest that starts."""

import re
import shutil
import subprocess
import tomllib

import pytest
from commands import ROOT

from torchpar.testing.doctor import TESTED


def test_all_places_name_the_same_versions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"Python :: 3\.(\d+)", " ".join(project["classifiers"]))
    oldest, newest = (int(version.removeprefix("3.")) for version in TESTED["python"])
    assert [*map(int, named)] == [*range(oldest, newest + 1)]
    assert project["requires-python"] == f">=3.{oldest}"
    assert f"Python 3.{oldest} or newer" in (ROOT / "README.md").read_text()
    workflow = (ROOT / ".github" / "workflows" / "commands.yml").read_text()
    assert {*re.findall(r'python: "3\.(\d+)"', workflow)} == {*named}
    page = (ROOT / "docs" / "errors.md").read_text()
    assert [version for version in named if f"| 3.{version}." not in page] == []


@pytest.mark.parametrize(
    "here, newest",
    [
        ({}, ""),
        ({"a/python3.11": "3.11.9", "b/python3.11": "3.11.10"}, ""),  # no later minor version
        ({"a/python3.13": "3.13.9", "b/python3.13": "3.13.10", "a/python3.12": "3.12.11"},
         "b/python3.13"),
        ({"a/python3.14": "", "a/python3.12": "3.12.1"}, "a/python3.12"),  # a stand-in of pyenv
        ({"a/python3.99": "3.99.0"}, ""),  # none that pyproject.toml names
        ({"a/python3.12": "3.12.1", "pyenv/versions/3.14.2/bin/python3.14": "3.14.2"},
         "pyenv/versions/3.14.2/bin/python3.14"),
    ],
)  # fmt: skip
def test_ci_finds_the_newest_python_that_starts(tmp_path, here, newest):
    def script(name: str, line: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)
        return str(path)

    for name, version in here.items():
        script(name, f"echo {version} {tmp_path / name}" if version else "exit 127")
    # The machine's own Pythons lie beside the tools that the function takes.
    for tool in ("cut", "grep", "sort", "tail"):
        script(f"b/{tool}", f'exec {shutil.which(tool)} "$@"')
    variables = {
        "PATH": f"{tmp_path / 'a'}:{tmp_path / 'b'}",
        "PYENV_ROOT": f"{tmp_path / 'pyenv'}",
    }
    found = subprocess.run(
        [shutil.which("bash"), "-euo", "pipefail", "-c",
         f". .ci/pythons.sh; newer_python {script('used', 'echo 11')}"],
        cwd=ROOT, env=variables, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.removeprefix(f"{tmp_path}/").strip() == newest
    assert not found.stderr
