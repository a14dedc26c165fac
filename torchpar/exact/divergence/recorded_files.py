# SPDX-License-Identifier: MIT
"""Files of a recorded run: JSON lines, of which a killed run leaves all but the last 8 steps.

A folder has a file ``rank0.jsonl`` for each rank. Each line is an object. The first line holds
"format", "rank", "ranks" (their number), "operators" (whether they are recorded), "torch",
"processor" (the instructions that ATen uses) and "threads". A line with "tensor" describes a tensor
before it is first used: its number, "kind", "name", "shape", "dtype", and "by", which made it. A
line with "step" holds the tensors of a step in their order, as numbers, and "checksums", a string
of 16 hexadecimal digits for each, as `checksums` defines them. Steps are counted from 0. A step
that an error of the program has ended is "broken"; it is the last. One that a CUDA graph has
"replayed" shows fewer tensors.
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
# Of tensors, in the order in which a step mostly computes them.
KINDS = (
    *("weight", "input", "activation", "loss", "activation's gradient", "gradient", "setting"),
    *("state", "operator"),
)
OF_OPTIMIZER = {"gradient", "setting", "state"}  # kinds that a step has which an optimizer ends
DIGITS = 16  # of a checksum
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
        self,
        step: int,
        tensors: list[int],
        checksums: NDArray[np.uint64],
        is_broken: bool,
        is_replayed: bool,
    ) -> None:
        if tensors != self._tensors:  # most steps have those of the step before
            self._tensors, self._tensors_text = tensors, str(tensors).replace(" ", "")
        digits = checksums.astype(">u8").tobytes().hex()
        flags = ',"broken":true' * is_broken + ',"replayed":true' * is_replayed
        text = f'{{"step":{step},"tensors":{self._tensors_text},"checksums":"{digits}"{flags}}}\n'
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
    is_replayed: bool = False  # by a CUDA graph, whose activations and gradients nobody sees

    @property
    def is_complete(self) -> bool:
        """Whether it has more than the weights with which a recording ends, and no error."""
        return not self.is_broken and any(one.kind != "weight" for one in self.tensors)

    @property
    def is_taken(self) -> bool:
        """Whether an optimizer has ended it. Calls after the last step, as of an evaluation, are
        none."""
        return not self.is_broken and any(one.kind in OF_OPTIMIZER for one in self.tensors)


@dataclass
class RecordedRank:
    """The steps of a run on one of its ranks."""

    path: Path
    rank: int
    ranks: int
    has_operators: bool
    steps: dict[int, RecordedStep]
    machine: dict[str, object]  # by `OF_MACHINE`; older files lack some

    @property
    def length(self) -> int:
        """The number of steps that an optimizer has ended."""
        return sum(one.is_taken for one in self.steps.values())


def read_ranks(path: Path) -> list[RecordedRank]:
    """The ranks of a run, of a folder that `torchpar.exact.record` wrote, or one rank's file.

    Raises:
        ConfigError: a file is missing, damaged, of another rank, or not of this format.
    """
    if not path.is_dir():
        return [_read_rank(path)]
    first = _read_rank(path / "rank0.jsonl")
    ranks = [first, *(_read_rank(path / f"rank{rank}.jsonl") for rank in range(1, first.ranks))]
    for expected, one in enumerate(ranks):
        if (one.rank, one.ranks) != (expected, first.ranks):
            raise ConfigError(
                f"{one.path} is of rank {one.rank} of {one.ranks}, expected rank {expected} of "
                f"{first.ranks}; copy the whole folder again, or record it again"
            )
        if one.has_operators != first.has_operators:
            raise ConfigError(
                f"of {first.path} and {one.path} one was recorded with operators=True, expected "
                "all ranks or none; record it again"
            )
    return ranks


def _read_rank(path: Path) -> RecordedRank:
    number = 1
    try:
        lines = _lines(path)
        head: Any = next(lines, {})
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise ConfigError(
                f"{path} is no recording: its first line does not have {FORMAT!r}; name the folder "
                "that was given to torchpar.exact.record, or the file of one rank"
            )
        rank, ranks, has_operators = (head[key] for key in ("rank", "ranks", "operators"))
        _expect(_is_count(ranks) and ranks > 0, f"the number of ranks is {ranks!r}")
        _expect(_is_count(rank) and rank < ranks, f"it is of rank {rank!r} of {ranks}")
        _expect(type(has_operators) is bool, f"operators is {has_operators!r}")
        tensors: dict[int, Described] = {}
        steps: dict[int, RecordedStep] = {}
        for line in lines:
            number += 1
            _expect(isinstance(line, dict), "the line is no JSON object")
            if "tensor" in line:
                key, described = _tensor(line)
                _expect(key not in tensors, f"tensor {key} is described twice")
                tensors[key] = described
                continue
            step = line["step"]
            place = f"step {step!r} stands in the place of step {len(steps)}"
            _expect(type(step) is int and step == len(steps), place)
            _expect(not (step and steps[step - 1].is_broken), "a step follows the error")
            steps[step] = _step(line, tensors)
        machine = {key: head[key] for key in OF_MACHINE if key in head}
        return RecordedRank(path, rank, ranks, has_operators, steps, machine)
    except ConfigError:
        raise
    except OSError as e:
        raise ConfigError(
            f"{path} cannot be read ({e.strerror or e}); name the folder that was given to "
            "torchpar.exact.record, or the file of one rank"
        ) from e
    except KeyError as e:
        raise ConfigError(
            f"{path} is damaged: line {number} has no {e}; copy or record it again"
        ) from e
    except _Damaged as e:
        raise ConfigError(
            f"{path} is damaged: line {e.line or number}: {e}; copy or record it again"
        ) from e


class _Damaged(Exception):
    """A line of a recording is not as it was written."""

    def __init__(self, text: str, line: int = 0):
        self.line = line
        super().__init__(text)


def _expect(is_right: bool, text: str) -> None:
    if not is_right:
        raise _Damaged(text)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _tensor(line: dict[str, Any]) -> tuple[int, Described]:
    """The number and the description of a tensor."""
    number, shape, kind = line["tensor"], line["shape"], line["kind"]
    texts = [line[key] for key in ("name", "dtype", "by")]
    _expect(_is_count(number), f"the tensor's number is {number!r}")
    _expect(kind in KINDS, f"the tensor's kind is {kind!r}, expected one of {', '.join(KINDS)}")
    _expect(isinstance(shape, list) and all(map(_is_count, shape)), f"the shape is {shape!r}")
    _expect(all(type(one) is str for one in texts), "the tensor's name or dtype is no text")
    name, dtype, by = texts
    return number, Described(kind, name, tuple(shape), dtype, by)


def _step(line: dict[str, Any], tensors: Mapping[int, Described]) -> RecordedStep:
    numbers, digits = line["tensors"], line["checksums"]
    flags = [line.get(key, False) for key in ("broken", "replayed")]
    _expect(
        isinstance(numbers, list) and all(map(_is_count, numbers)), "its tensors are no numbers"
    )
    unknown = [one for one in numbers if one not in tensors]
    _expect(not unknown, f"tensor {unknown[:1]} was not described before")
    _expect(
        type(digits) is str and len(digits) == DIGITS * len(numbers),
        f"the checksums have {len(digits) if type(digits) is str else 0} digits, expected {DIGITS} "
        f"for each of {len(numbers)} tensors",
    )
    _expect(set(digits) <= set("0123456789abcdef"), "the checksums are no hexadecimal digits")
    _expect(all(type(one) is bool for one in flags), "broken or replayed is neither true nor false")
    checksums = np.frombuffer(bytes.fromhex(digits), ">u8").tolist()
    return RecordedStep([tensors[one] for one in numbers], checksums, *flags)


def _lines(path: Path) -> Iterator[Any]:
    """The lines of a file. A killed run may have left a part of the last line, which is left out.

    Raises:
        _Damaged: another line is no JSON.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                value = json.loads(line.decode())
            except (ValueError, RecursionError):
                if not line.endswith(b"\n"):
                    return
                raise _Damaged("it is no JSON", number) from None
            yield value
