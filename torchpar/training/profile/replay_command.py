# SPDX-License-Identifier: MIT
"""Write a page that plays recorded steps: ``python -m torchpar replay a.json --page a.html``.

Two recordings are shown over one time axis, with the same step aligned. The exit status is 2 if a
file is no recording, or if the page cannot be written.
"""

import argparse
import gzip
import json
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchpar.errors import ConfigError, writing
from torchpar.training.profile import replay_page

COMMAND = "python -m torchpar replay"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        COMMAND,
        description="Write a page that plays a recorded step, or two recordings over one time "
        "axis. A page needs no other file and no network.",
    )
    parser.add_argument("a", type=Path, help="a recording, which --replay writes beside its page")
    parser.add_argument("b", type=Path, nargs="?", help="another one, for comparison")
    parser.add_argument("--page", type=Path, required=True, help="the page that is written")
    options = parser.parse_args(arguments)
    paths = [path for path in (options.a, options.b) if path is not None]
    try:
        write_page(options.page, [read_recording(path) for path in paths])
    except ConfigError as e:
        print(f"{COMMAND}: error: {e}", file=sys.stderr)
        return 2
    print(f"{options.page} plays {' beside '.join(map(str, paths))}")
    return 0


def read_recording(path: Path) -> Mapping[str, Any]:
    """The recording in a file of JSON, which may be compressed by gzip.

    Raises:
        ConfigError: there is no such file, or it is no recording.
    """
    try:
        content = path.read_bytes()
        text = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        recording: Mapping[str, Any] = json.loads(text)
        replay_page.check(recording)
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror or e}; name a recording") from e
    except json.JSONDecodeError as e:
        beside = path.with_suffix(".json")
        hint = f"; name {beside}" if beside != path and beside.is_file() else ""
        raise ConfigError(f"{path} is no JSON, expected a recording: {e}{hint}") from e
    except (ValueError, EOFError, zlib.error) as e:
        raise ConfigError(f"{path}: {e}") from e
    return recording


def write_page(path: Path, recordings: Sequence[Mapping[str, Any]]) -> None:
    """Write the page of one or two recordings.

    Raises:
        ConfigError: the units of two recordings differ, or the page cannot be written.
    """
    with writing(path, "--page"):
        try:
            replay_page.write(path, recordings)
        except ValueError as e:
            raise ConfigError(str(e)) from e
