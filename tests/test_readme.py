# SPDX-License-Identifier: MIT
"""The README of the tests names each file that holds no tests, and no other."""

import re
from pathlib import Path

FOLDER = Path(__file__).parent
NO_HELPERS = r"(test_\w+|__init__)\.py"


def test_the_readme_says_what_each_file_without_tests_holds() -> None:
    shared = {
        path.relative_to(FOLDER).as_posix()
        for path in FOLDER.rglob("*")
        if path.suffix in (".py", ".sh", ".in") and not re.fullmatch(NO_HELPERS, path.name)
    }
    text = (FOLDER / "README.md").read_text()
    rows = "".join(line for line in text.splitlines(keepends=True) if line.startswith("|"))
    named = {name for name in re.findall(r"`([\w/]+\.(?:py|sh|conf\.in))`", rows)}
    assert named == shared
