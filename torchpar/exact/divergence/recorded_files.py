# SPDX-License-Identifier: MIT
"""Files of a recorded run: JSON lines, of which a killed run leaves all but the last 8 steps.

A folder has a file ``rank0.jsonl`` for each rank. Each line is an object. The first line holds
"format", "rank", "ranks" (their number), "operators" (whether they are recorded), "torch",
"processor" (the instructions that ATen uses) and "threads". A line with "tensor" describes a tensor
before it is first used: its number, "kind", "name", "shape", "dtype", and "by", which made it. A
line with "step" holds the tensors of a step in their order, as numbers, and "checksums", a string
of 16 hexadecimal digits for each, as `checksums` defines them. A step that an error of the program
has ended is "broken".
"""

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchpar.errors import ConfigError, writing

FORMAT = "torchpar.exact.record 1"
OF_MACHINE = ("torch", "processor", "threads")  # of the first line
_FORMATS = {"float64": "d", "float32": "f", "float16": "e", "int64": "q", "int32": "i", "bool": "?"}


class Described(NamedTuple):
    """A tensor of a run, as `kind` and `name` find it in another run."""

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    by: str

    def __str__(self) -> str:
        by = f" (by {self.by})" if self.by else ""
        return f"{self.kind} {self.name}{by}"

    @property
    def size(self) -> str:
        return f"{self.dtype} {list(self.shape)}"

    def value(self, checksum: int) -> str:
        """The value of a tensor of one number, which its checksum holds; else ""."""
        code = _FORMATS.get(self.dtype)
        if self.shape or code is None:
            return ""
        (value,) = struct.unpack_from(f"<{code}", checksum.to_bytes(8, "little"))
        return str(np.float32(value)) if code == "f" else str(value)


class RunFile:
    """The file of a run on one rank, which is written step by step."""

    _open: ClassVar[set[Path]] = set()

    def __init__(self, folder: Path, rank: int, head: Mapping[str, object]):
        self._path = folder.resolve() / f"rank{rank}.jsonl"
        if self._path in self._open:
            raise ConfigError(f"{folder} is being recorded already; give each record its own path")
        self._lines: list[str] = []
        self._tensors, self._tensors_text = list[int](), "[]"  # of the last step
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("wb")
        self._open.add(self._path)
        self._add({"format": FORMAT, "rank": rank, **head})
        self.write()

    def _writing(self) -> Any:
        return writing(self._path, "the path of torchpar.exact.record")

    def _add(self, line: Mapping[str, object]) -> None:
        self._lines.append(json.dumps(line, separators=(",", ":")) + "\n")

    def write(self) -> None:
        """Write what was added."""
        with self._writing():
            self._file.write("".join(self._lines).encode())
            self._file.flush()  # a process that is forked has nothing left to write
        self._lines.clear()

    def add_tensor(self, number: int, tensor: Described) -> None:
        self._add({"tensor": number, **tensor._asdict()})

    def add_step(
        self, step: int, tensors: list[int], checksums: NDArray[np.uint64], is_broken: bool
    ) -> None:
        if tensors != self._tensors:  # most steps have those of the step before
            self._tensors, self._tensors_text = tensors, str(tensors).replace(" ", "")
        digits = checksums.astype(">u8").tobytes().hex()
        end = ',"broken":true}\n' if is_broken else "}\n"
        text = f'{{"step":{step},"tensors":{self._tensors_text},"checksums":"{digits}"{end}'
        self._lines.append(text)

    def close(self) -> None:
        self._file.close()
        self._open.discard(self._path)


@dataclass
class RecordedStep:
    """What one step computed: tensors in their order, and their checksums."""

    tensors: list[Described]
    checksums: list[int]
    is_broken: bool = False  # by an error of the program

    @property
    def is_complete(self) -> bool:
        """Whether it is a whole step, and not only the weights with which the recording ends."""
        return not self.is_broken and any(one.kind != "weight" for one in self.tensors)


@dataclass
class RecordedRank:
    """The steps of a run on one of its ranks."""

    path: Path
    rank: int
    ranks: int
    has_operators: bool
    steps: dict[int, RecordedStep]
    machine: dict[str, object]  # by `OF_MACHINE`; older files lack some


def read_ranks(path: Path) -> list[RecordedRank]:
    """The ranks of a run, of a folder that `torchpar.exact.record` wrote, or one rank's file.

    Raises:
        ConfigError: a file is missing, or not of this format.
    """
    if not path.is_dir():
        return [_read_rank(path)]
    first = _read_rank(path / "rank0.jsonl")
    return [first, *(_read_rank(path / f"rank{rank}.jsonl") for rank in range(1, first.ranks))]


def _read_rank(path: Path) -> RecordedRank:
    try:
        lines = _lines(path)
        head = next(lines, {})
        if head.get("format") != FORMAT:
            raise ConfigError(f"{path} is no recording: its first line does not have {FORMAT!r}")
        tensors: dict[int, Described] = {}
        steps = {}
        for line in lines:
            if "tensor" in line:
                number, shape = line.pop("tensor"), tuple(line.pop("shape"))
                tensors[number] = Described(shape=shape, **line)
            else:
                steps[line["step"]] = RecordedStep(
                    [tensors[number] for number in line["tensors"]],
                    np.frombuffer(bytes.fromhex(line["checksums"]), ">u8").tolist(),
                    line.get("broken", False),
                )
        rank, ranks = int(head["rank"]), int(head["ranks"])
        machine = {key: head[key] for key in OF_MACHINE if key in head}
        return RecordedRank(path, rank, ranks, head["operators"], steps, machine)
    except ConfigError:
        raise
    except OSError as e:
        raise ConfigError(
            f"{path} cannot be read ({e.strerror or e}); name the folder that was given to "
            "torchpar.exact.record, or the file of one rank"
        ) from e
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise ConfigError(f"{path} is damaged ({type(e).__name__}: {e}); record it again") from e


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file, up to one that a killed run has not completed."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                return
