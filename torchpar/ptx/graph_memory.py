# SPDX-License-Identifier: MIT
"""Memory of a CUDA graph: that of its pool, and that of tensors which it reads or writes outside.

A replay uses the same addresses as the capture. Memory of the pool lives as long as the graph, and
as long as a tensor in it. Memory outside may be freed; the graph does not keep it, as on a GPU.
"""

import ctypes
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

ROUNDED = 512  # bytes, to a multiple of which an allocation on a GPU is rounded
NO_NUMBER = b"\xc7\xa3\xd5\xff"  # a NaN of float32, of bfloat16 and, twice, of float64

Line = tuple[str, int] | None  # a file and a line of it


def bytes_at(address: int, nbytes: int, owner: Any = None) -> Tensor:
    """Return the bytes at an address as a tensor, which keeps ``owner`` alive."""
    raw: Any = (ctypes.c_uint8 * nbytes).from_address(address)
    raw.owner = owner
    return torch.frombuffer(raw, dtype=torch.uint8)


def poison(content: Tensor) -> None:
    """Fill bytes with what is no number."""
    pattern = torch.frombuffer(bytearray(NO_NUMBER * 2), dtype=torch.uint8)
    content.copy_(pattern.repeat(-(-content.numel() // 8))[: content.numel()])


class Memory:
    """The memory of one storage.

    Attributes:
        content: all its bytes, at the same address.
        is_in_pool: whether the capture has allocated it.
        graph: that has allocated it.
        before: what it held before the capture wrote to it; None if that did not.
        captured: what the operators of a capture have computed here; the GPU computes nothing then.
        made: the line of the program that allocated it in the capture.
        read: the first line of the capture that reads it.
        overwritten: the line of a replay of another graph that has used the same memory since.
    """

    def __init__(self, storage: Any, graph: Any, line: Line, *, keep: bool, is_in_pool: bool):
        self.address, self.nbytes = storage.data_ptr(), storage.nbytes()
        self.content = bytes_at(self.address, self.nbytes, storage if keep else None)
        self.is_in_pool, self.graph, self.made = is_in_pool, graph, line
        self.is_kept = keep
        self.of = StorageWeakRef(storage)
        self.before: Tensor | None = None
        self.captured: Tensor | None = None
        self.read: Line = None
        self.overwritten: Line = None
        self.name = ""

    def given_out(self) -> Any:
        """Return another storage with this memory, whose end can be seen."""
        storage = bytes_at(self.address, self.nbytes, self.content).untyped_storage()
        self.of = StorageWeakRef(storage)
        return storage

    @property
    def is_alive(self) -> bool:
        """Whether a tensor has the memory, besides the graph."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self.of.cdata)
        return storage is not None and int(storage.data_ptr()) == self.address

    def keep_before(self) -> None:
        """Remember the content, unless that has been done."""
        if not self.is_in_pool and self.before is None:
            self.before = self.content.clone()

    def replace(self) -> None:
        """Take other memory, because this has been freed; what it holds is no number."""
        self.content = torch.empty(self.nbytes, dtype=torch.uint8)
        poison(self.content)
        self.is_kept = True


class Slot:
    """A tensor of a recorded operation: where it lies in its memory."""

    def __init__(self, t: Tensor, memory: Memory):
        self.memory = memory
        self.dtype, self.is_conj, self.is_neg = t.dtype, t.is_conj(), t.is_neg()
        self.place = t.storage_offset(), tuple(t.size()), tuple(t.stride())
        self._made: tuple[Tensor, Tensor] | None = None

    def tensor(self) -> Tensor:
        content = self.memory.content
        if self._made is None or self._made[0] is not content:
            made = torch.empty(0, dtype=self.dtype).set_(content.untyped_storage(), *self.place)
            made = made.conj() if self.is_conj else made
            self._made = content, torch._neg_view(made) if self.is_neg else made
        return self._made[1]


class Block:
    """A piece of a pool, in which one memory lies after the other."""

    def __init__(self, nbytes: int):
        self.nbytes = nbytes
        self.held: list[Memory] = []

    @property
    def is_free(self) -> bool:
        return not any(one.is_alive for one in self.held)


class Pool:
    """A pool of memory, of one or several graphs: what is freed there is given out again."""

    numbers = itertools.count(1)

    def __init__(self) -> None:
        self.handle = (0, next(self.numbers))
        self.blocks: list[Block] = []

    def place(self, memory: Memory) -> None:
        """Let memory lie in the smallest free block that has room, or in a new one."""
        nbytes = -(-memory.nbytes // ROUNDED) * ROUNDED
        free = [one for one in self.blocks if one.nbytes >= nbytes and one.is_free]
        if free:
            block = min(free, key=lambda one: one.nbytes)
        else:
            block = Block(nbytes)
            self.blocks.append(block)
        block.held.append(memory)

    def overwrite(self, graph: Any, line: Line) -> None:
        """Note what a replay of a graph overwrites of others that lies in the same blocks."""
        for block in self.blocks:
            if any(one.graph is graph for one in block.held):
                for one in block.held:
                    one.overwritten = None if one.graph is graph else line

    def forget(self, graph: Any) -> None:
        for block in self.blocks:
            block.held = [one for one in block.held if one.graph is not graph]


def addresses(tensors: Iterable[Tensor]) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors}
