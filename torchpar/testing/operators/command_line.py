# SPDX-License-Identifier: MIT
"""Print an operator's table: ``python -m torchpar check OPERATOR --samples SAMPLES``."""

import argparse
import importlib
import json
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import reduce
from typing import Any, NoReturn

from torchpar.console import breaking_silence
from torchpar.errors import ConfigError, TorchparError, first_line
from torchpar.parallel.launch.guard import WATCHED, is_readers
from torchpar.testing.operators.check_operator import check_operator
from torchpar.testing.operators.table import OperatorTable

# Seconds of a row with one sample. Those that compile take the longest: half a minute at most on
# two cores of ours.
LIMIT = 300.0


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def find(name: str) -> Any:
    """The object that is named ``MODULE:ATTRIBUTE``; the attribute may have dots.

    Raises:
        ConfigError: there is no such object, or the module raises an error.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute) or attribute.startswith(":"):
        raise ConfigError(f"{name!r}, expected MODULE:ATTRIBUTE, such as mylib.ops:op")
    try:
        with WATCHED.calling(name, f"the import of {module}"):
            found = importlib.import_module(module)
    except BaseException as e:
        if not is_readers(e):
            raise
        raise ConfigError(f"{name}: {_reason(e)}; {_remedy(module, e)}") from e
    try:
        return reduce(getattr, attribute.split("."), found)
    except BaseException as e:
        if not is_readers(e):
            raise
        close = get_close_matches(attribute, vars(found))
        such = f", such as {close[0]}" if close else ""
        remedy = f"name an object that {module} defines{such}"
        raise ConfigError(f"{name}: {_reason(e)}; {remedy}") from e


def _remedy(module: str, error: BaseException) -> str:
    """Say what to do where a module cannot be imported."""
    if not isinstance(error, ModuleNotFoundError):
        return f"mend {module}, which has to be imported without an error"
    if not f"{module}.".startswith(f"{error.name}."):
        return f"install what {module} imports"
    if module.endswith(".py"):
        return f"name the module {module.removesuffix('.py')}, without .py"
    return f"run the command in the folder that has {error.name}, or let PYTHONPATH name the folder"


def _reason(error: BaseException) -> str:
    return (
        f"it calls sys.exit({error.code!r})" if isinstance(error, SystemExit) else first_line(error)
    )


def _seconds(text: str) -> float:
    """A positive number of seconds, which may be inf."""
    with suppress(ValueError):
        if (seconds := float(text)) > 0:
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r}, expected a positive number of seconds")


def main(arguments: Sequence[str]) -> int:
    """Print the table. The exit status is 1 if the table is not ok, and 2 for wrong arguments.

    A table is ok if no row is wrong or crashes, some row compared a result, and, where rows of
    gradients are asked for, some row compared a gradient. Otherwise the last line says what is
    missing.

    After ten seconds lines on stderr say how many rows are done, and which one is tried.
    """
    parser = Parser(
        "python -m torchpar check",
        description="Try an operator with every part of PyTorch. "
        "The exit status is 1 if a row is wrong or crashes, or if no row compared a result or, of "
        "those asked for, a gradient; it is 2 for wrong arguments.",
    )
    parser.add_argument("operator", help="MODULE:ATTRIBUTE, such as mylib.ops:op")
    parser.add_argument(
        "--samples",
        required=True,
        help="MODULE:ATTRIBUTE, tuples of arguments, or a function that returns them",
    )
    parser.add_argument(
        "--reference",
        help="MODULE:ATTRIBUTE, the same by PyTorch's own operators; default: the formula that an "
        "operator of torchpar.library registers",
    )
    parser.add_argument(
        "--rules",
        nargs="+",
        metavar="RULE",
        help='rows of the table; default: all; "without gradients": all but those of derivatives',
    )
    parser.add_argument(
        "--emulate",
        metavar="ARCH",
        help="sm_80, sm_90 or sm_100: execute the Triton kernels as compiled for this GPU",
    )
    parser.add_argument(
        "--limit",
        type=_seconds,
        default=LIMIT,
        metavar="SECONDS",
        help="for a row with one sample, after which the command names both and ends, on Linux; "
        f"default: {LIMIT:.0f}",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the table as JSON, whose details are not cut"
    )
    flags = parser.parse_args(arguments)
    try:
        WATCHED.limit = flags.limit
        with breaking_silence(WATCHED.how_far):
            table = _check_named(flags)
    except TorchparError as e:
        parser.error(str(e))
    print(json.dumps(table.as_dict(), indent=1) if flags.json else table)
    return 0 if table.ok else 1


def _check_named(flags: argparse.Namespace) -> OperatorTable:
    op, samples = find(flags.operator), find(flags.samples)
    reference = None if flags.reference is None else find(flags.reference)
    if callable(samples):
        try:
            with WATCHED.calling(flags.samples, "its call"):
                samples = samples()
        except BaseException as e:
            if not is_readers(e):
                raise
            raise ConfigError(f"{flags.samples}: {_reason(e)}") from e
    return check_operator(
        op, samples, reference=reference, rules=flags.rules, emulate=flags.emulate
    )
