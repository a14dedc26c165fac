# SPDX-License-Identifier: MIT
"""The annotations of the emulator: few of them are `Any`, through which no type checker sees."""

import re

from processes import ROOT

MOST = 30
ANY = re.compile(r"(?:: |-> )Any\b")


def test_few_annotations_are_any():
    files = sorted((ROOT / "src" / "nogpu").rglob("*.py"))
    found = {
        str(file.relative_to(ROOT)): len(ANY.findall(file.read_text("utf-8"))) for file in files
    }
    assert len(files) > 50
    assert sum(found.values()) <= MOST, {name: count for name, count in found.items() if count}


def test_annotations_of_any_are_found():
    assert len(ANY.findall("def f(x: Any = None, *y: Any) -> Any: ...\nz: Any = 0")) == 4
    assert ANY.findall("from typing import Any\ndef f(x: AnyStr) -> list[int]: ...") == []
