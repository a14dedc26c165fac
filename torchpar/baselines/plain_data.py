# SPDX-License-Identifier: MIT
"""Plain data between two processes: numbers, texts, lists and arrays, as a header and bytes.

What one process packs, the other one unpacks without any code of the first: a header of JSON says
what stands where, and the numbers of arrays follow as bytes. So a process that executes somebody
else's code can send results to one that judges them.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from json import dumps, loads
from typing import Any

import numpy as np
import torch

from torchpar.errors import TorchparError

MOST_ITEMS = 2**20  # of an iterator, which may never end
DEEPEST = 8  # lists in lists
LONGEST = 4000  # characters of a text
ALIGNMENT = 64  # of an array's bytes
DTYPE = re.compile(r"[<>|=]?[biufcSUmM]\d+(\[\w+\])?")  # of numbers, texts and times
# A reader's code may replace these by others.
as_array, generic, ndarray, Tensor = np.asarray, np.generic, np.ndarray, torch.Tensor
PLAIN = (bool, int, float, str, type(None))


class Unreadable(TorchparError):
    """Data that another process has sent is not as it was packed."""


class Other:
    """An object that is no plain data. Its class has the name of the object's class."""


class Iterated:
    """The items of an iterator."""

    def __init__(self, items: Sequence[Any]):
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)


class Listed(Iterated):
    """The items of a sequence that is neither a list nor a tuple."""

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, at: Any) -> Any:
        return self._items[at]


class Packed:
    """A value that is made plain now, and packed later."""

    def __init__(self, value: object):
        self.parts: list[bytes] = []
        self.header = _header(value, self.parts, 0)


def pack(value: object) -> bytes:
    """The bytes of a value. Objects that are no plain data leave the names of their classes.

    Tensors and arrays on a GPU, and objects that NumPy takes for arrays, are arrays.
    """
    parts: list[bytes] = []
    header = dumps(_header(value, parts, 0)).encode()
    return b"".join([_padded(b"%d " % len(header) + header), *parts])


def _padded(data: bytes) -> bytes:
    return data + b" " * (-len(data) % ALIGNMENT)


def _header(value: Any, parts: list[bytes], depth: int) -> object:
    kind = type(value)  # what `isinstance` asks, a class may answer as it likes
    if kind is Packed:
        parts += value.parts
        return value.header
    if kind in PLAIN and not (kind is int and value.bit_length() > 1024):
        return value[:LONGEST] if kind is str else value
    if issubclass(kind, Tensor):
        return _array(value.detach().cpu().numpy(), kind, parts)
    if hasattr(value, "copy_to_host"):
        value = value.copy_to_host()
    if issubclass(type(value), ndarray | generic) or hasattr(value, "__array__"):
        return _array(as_array(value), kind, parts)
    tag, items = _items(value) if depth < DEEPEST else ("other", ())
    # A list and a tuple have no class of the student's.
    name = [] if tag in ("list", "tuple") else [_name(kind)]
    return [tag, *name, *(_header(one, parts, depth + 1) for one in items)]


def _items(value: Any) -> tuple[str, Iterable[Any]]:
    """What a value is, and the items in it."""
    kind = type(value)
    for sequence in (list, tuple):
        if issubclass(kind, sequence):
            return sequence.__name__, sequence.__iter__(value)
    if issubclass(kind, dict | set | frozenset | bytes | bytearray | str):
        return "other", ()
    is_iterator = hasattr(kind, "__next__")
    if not is_iterator and not (hasattr(kind, "__iter__") and hasattr(kind, "__len__")):
        return "other", ()
    items = list(islice(value, MOST_ITEMS + 1))
    if len(items) > MOST_ITEMS:
        raise ValueError(f"a {_name(kind)} has more than {MOST_ITEMS:,} items")
    return "iterated" if is_iterator else "listed", items


def _array(value: Any, kind: type, parts: list[bytes]) -> object:
    if value.dtype.hasobject or not DTYPE.fullmatch(value.dtype.str):
        return ["other", _name(kind)]
    data = value.tobytes()
    parts.append(_padded(data))
    return ["array", value.dtype.str, list(value.shape), len(data)]


def _name(kind: type) -> str:
    """The name of a class, which is an identifier."""
    name = kind.__name__
    return name if type(name) is str and name.isidentifier() and len(name) < 100 else "object"


def unpack(data: bytes) -> Any:
    """The value of packed bytes. Its arrays are read-only.

    Raises:
        Unreadable: they were not packed by `pack`.
    """
    try:
        start = data[:20].index(b" ") + 1
        end = start + int(data[: start - 1])
        view = memoryview(data)[end + -end % ALIGNMENT :]
        return _Unpacking(view).value(loads(data[start:end]))
    except (ValueError, TypeError, IndexError, OverflowError, RecursionError) as e:
        raise Unreadable(f"data that cannot be read ({type(e).__name__})") from None


class _Unpacking:
    def __init__(self, parts: memoryview):
        self.parts = parts

    def value(self, header: Any) -> Any:
        if not isinstance(header, list):
            if isinstance(header, dict):
                raise ValueError
            return header
        tag, *rest = header
        if tag == "array":
            return self.array(*rest)
        if tag == "other":
            (name,) = rest
            return type(name, (Other,), {})()
        if tag in ("iterated", "listed"):
            name, *rest = rest
            base = Iterated if tag == "iterated" else Listed
            return type(name, (base,), {})([self.value(one) for one in rest])
        if tag not in ("list", "tuple"):
            raise ValueError
        items = [self.value(one) for one in rest]
        return items if tag == "list" else tuple(items)

    def array(self, dtype: str, shape: list[int], size: int) -> np.ndarray[Any, Any]:
        if not DTYPE.fullmatch(dtype) or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError
        kind = np.dtype(dtype)
        if size != math.prod(shape) * kind.itemsize or size > len(self.parts):
            raise ValueError
        found = np.frombuffer(self.parts, kind, math.prod(shape)) if size else np.zeros(0, kind)
        self.parts = self.parts[size + -size % ALIGNMENT :]
        return found.reshape(shape)


def writable(value: Any) -> Any:
    """A copy of lists, tuples and arrays, whose arrays can be written."""
    if isinstance(value, list | tuple):
        return type(value)(map(writable, value))
    return value.copy() if isinstance(value, np.ndarray) else value
