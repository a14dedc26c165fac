# SPDX-License-Identifier: MIT
"""An example whose output goes to a full disk, or to a closed pipe."""

import errno

import pytest

pytest.importorskip("tyro", reason="tyro reads the flags")

from support import ending


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
