# SPDX-License-Identifier: MIT
"""The command ``python -m torchpar check OPERATOR --samples SAMPLES``, which prints an operator's table."""

import argparse
import importlib
from collections.abc import Sequence
from functools import reduce
from typing import Any

from torchpar.errors import ConfigError, TorchparError
from torchpar.testing.operators import check_operator


def _find(name: str) -> Any:
    """The object that is named ``MODULE:ATTRIBUTE``; the attribute may have dots."""
    module, _, attribute = name.partition(":")
    try:
        return reduce(getattr, attribute.split("."), importlib.import_module(module))
    except Exception as e:  # of the module, too
        raise ConfigError(f"{name}: {type(e).__name__}: {e}; expected MODULE:ATTRIBUTE") from e


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; the exit status is 1 if a row is wrong or crashes."""
    parser = argparse.ArgumentParser(
        "python -m torchpar check",
        description="Try an operator with every part of PyTorch. "
        "The exit status is 1 if a row is wrong or crashes.",
    )
    parser.add_argument("operator", help="MODULE:ATTRIBUTE, such as mylib.ops:gram")
    parser.add_argument("--samples", required=True, help="MODULE:FUNCTION, which returns tuples of arguments")
    parser.add_argument("--reference", help="MODULE:FUNCTION, the same by PyTorch's own operators")
    parser.add_argument("--rules", nargs="+", metavar="RULE", help="all, or some; default: all but slow ones")
    flags = parser.parse_args(arguments)
    try:
        table = check_operator(
            _find(flags.operator),
            _find(flags.samples),
            reference=flags.reference and _find(flags.reference),
            rules="all" if flags.rules == ["all"] else flags.rules,
        )
    except TorchparError as e:
        parser.error(str(e))
    print(table)
    return 0 if table.ok else 1
