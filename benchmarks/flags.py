# SPDX-License-Identifier: MIT
"""The flags of all benchmarks, and their ends:
``python -m benchmarks run NAME [--quick] [--output DIR]``."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryFile

import torch

from torchpar.console import printing
from torchpar.errors import ConfigError, TorchparError
from torchpar.optional import is_installed
from torchpar.parallel.launch.processes import Terminated, terminable

from . import title


class Command:
    """The flags that all benchmarks share; a benchmark adds its own to ``parser``.

    Args:
        name: of the benchmark, whose docstring's first line is the description.
        needs: the packages that it imports beside rich.
    """

    def __init__(self, name: str, needs: Sequence[str] = ()):
        self.name, self.needs = name, ("rich", *needs)
        description = f"{title(name)}."
        self.parser = argparse.ArgumentParser(called(f"run {name}"), description=description)
        self.parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
        self.parser.add_argument(
            "--output", type=Path, metavar="DIR", help="for the CSV and other files"
        )

    def choose(self, flag: str, names: Iterable[str], meaning: str = "by default all") -> None:
        """Add a flag that takes some of ``names``."""
        choices = list(names)
        self.parser.add_argument(flag, nargs="+", choices=choices, default=choices, help=meaning)

    def parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """The flags; ``output``, if given, is a folder that can be written. Warns if the machine is
        busy.

        Raises:
            ConfigError: a package is not installed, there is no GPU for ``--device cuda``, or the
                folder cannot be made or written.
        """
        options = self.parser.parse_args(arguments)
        require(*self.needs)
        if getattr(options, "device", "cpu") == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device is cuda, but PyTorch finds no GPU; take cpu")
        if options.output:
            try:
                options.output.mkdir(parents=True, exist_ok=True)
                with TemporaryFile(dir=options.output):  # now, and not after the measurement
                    pass
            except OSError as e:
                raise ConfigError(
                    f"--output {options.output} is no folder that can be written ({e}); name "
                    "another"
                ) from e
        if (load := os.getloadavg()[0]) > 0.5:
            print(f"The load average is {load:.1f}: other programs may disturb the timings.")
        return options

    def csv(self, options: argparse.Namespace, name: str = "") -> Path | None:
        """The CSV in ``--output``, if that is given; by default it is called as the module.

        Raises:
            ConfigError: it is a folder.
        """
        path = options.output / f"{name or self.name}.csv" if options.output else None
        if path and path.is_dir():
            raise ConfigError(f"{path} is a folder, expected a file; name another --output")
        return path


def called(command: str) -> str:
    """The command as it was typed, which may be one of torchpar's."""
    return os.environ.get("TORCHPAR_COMMAND", f"python -m benchmarks {command}")


def require(*packages: str) -> None:
    """Raise a ConfigError if a package is not installed."""
    if missing := [name for name in packages if not is_installed(name)]:
        raise ConfigError(
            f"this benchmark needs {' and '.join(missing)}; pip install {' '.join(missing)}"
        )


def run(main: Callable[[], int | None], command: str = "") -> None:
    """Call ``main`` and end with its status. A `TorchparError`, Ctrl-C, SIGTERM and SIGHUP are one
    line, statuses 2, 130, 143 and 129.

    Args:
        command: as it is typed behind ``python -m benchmarks``; by default that of the script that
            runs.
    """
    command = command or f"run {Path(sys.argv[0]).stem}"
    kept = "a CSV in --output holds complete cases only"
    try:
        with terminable(), printing(called(command)):
            status = main()
        sys.exit(status)
    except TorchparError as e:
        print(f"{called(command)}: error: {e}", file=sys.stderr)
        sys.exit(2)
    except Terminated as e:
        print(f"{called(command)}: {e}; {kept}", file=sys.stderr)
        sys.exit(e.status)
    except KeyboardInterrupt:
        print(f"{called(command)}: interrupted; {kept}", file=sys.stderr)
        sys.exit(130)
