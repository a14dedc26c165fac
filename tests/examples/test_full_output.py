# SPDX-License-Identifier: MIT
"""An example whose output goes to a full disk, or to a closed pipe, or whose caches cannot be
written."""

import errno
import os
import signal
from pathlib import Path
from unittest.mock import patch

import pytest

pytest.importorskip("tyro", reason="tyro reads the flags")

from support import ending

from torchpar.errors import ConfigError
from torchpar.training.outcome import Stopped

REMEDY = "; let TORCHINDUCTOR_CACHE_DIR name a folder that can be written"


@pytest.mark.parametrize(
    "number, prints, line",
    [
        (errno.ENOSPC, False, "the output cannot be written: [Errno 28] no room"),
        (errno.ENOSPC, True, "[Errno 28] no room"),  # another file's
        (errno.EPIPE, False, "the output cannot be written: [Errno 32] no room"),
        (errno.EPIPE, True, "[Errno 32] no room"),  # a connection's
        (errno.EIO, False, "[Errno 5] no room"),
    ],
)
def test_the_line_says_that_it_is_the_output(monkeypatch, number, prints, line):
    monkeypatch.setattr(ending, "can_print", lambda: prints)
    assert ending._reason(OSError(number, "no room")) == line


@pytest.mark.parametrize(
    "name, failed, is_told",
    [
        ("/dev/null/i", "/dev/null/i", True),
        ("/dev/null/i", "/dev/null/i/dynamo", True),
        ("/proc/i/j", "/proc/i", True),  # of its parents the first that cannot be made
        ("/dev/null/i", "/dev/null", False),  # it is there
        ("/dev/null/i", "/dev/null/index.csv", False),
        ("", "/dev/null/i", False),
    ],
)
def test_the_line_names_the_variable_of_a_cache(monkeypatch, name, failed, is_told):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", name)
    error = NotADirectoryError(errno.ENOTDIR, "Not a directory", failed)
    assert ending._reason(error) == f"{error}{REMEDY * is_told}"


def test_the_line_names_the_variable_of_a_cache_in_a_folder_that_cannot_be_searched(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/root/cache/i")
    error = PermissionError(errno.EACCES, "Permission denied", "/root/cache")
    with patch.object(os, "stat", side_effect=error):
        assert ending._reason(error) == f"{error}{REMEDY}"


def test_the_line_names_the_variable_of_a_home_without_a_cache(monkeypatch):
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", "/dev/null/home")
    error = NotADirectoryError(errno.ENOTDIR, "Not a directory", "/dev/null/home/.triton")
    assert ending._reason(error).endswith(REMEDY.replace("TORCHINDUCTOR", "TRITON"))


@pytest.mark.parametrize(
    "error, status, said",
    [
        (Stopped(signal.SIGTERM), 143, ("stopped by SIGTERM; the state is saved", "")),
        (Stopped(signal.SIGHUP), 129, ("stopped by SIGHUP; the state is saved", "")),
        (ConfigError("a flag is wrong"), 2, ("", "error: a flag is wrong")),
    ],
)
def test_the_status_stays_where_torchrun_cannot_be_told(
    tmp_path, monkeypatch, capsys, error, status, said
):
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))

    def write_a_part(path: Path, text: str) -> None:
        with path.open("w") as opened:
            opened.write(text[:9])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_a_part)
    with pytest.raises(SystemExit) as left, ending.ending():
        raise error
    assert left.value.code == status
    for written, expected in zip(capsys.readouterr(), said, strict=True):
        assert expected in written
        assert bool(written) == bool(expected)
    assert not file.exists()  # a part of it would be an error of torchrun's
