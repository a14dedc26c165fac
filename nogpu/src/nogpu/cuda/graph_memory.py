# SPDX-License-Identifier: MIT
"""Memory of a CUDA graph: that of its pool, and that of tensors which it reads or writes outside.

A replay uses the same addresses as the capture. Memory of the pool lives as long as the graph, and
as long as a tensor in it. Memory outside may be freed; the graph does not keep it, as on a GPU.
"""

import ctypes
import itertools
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

ROUNDED = 512  # bytes, to a multiple of which an allocation on a GPU is rounded
NO_NUMBER = b"\xc7\xa3\xd5\xff"  # a NaN of float32, of bfloat16 and, twice, of float64

REPLAYED = "nogpu_replayed"  # of a storage: the last replay that used it
WRITTEN = "nogpu_written"  # of a storage: the last work that wrote it
UNCAPTURED = "nogpu_uncaptured"  # of a storage: the last work beside a capture that wrote it

Line = tuple[str, int] | None  # a file and a line of it


def bytes_at(address: int, nbytes: int, owner: object = None) -> Tensor:
    """Return the bytes at an address as a tensor, which keeps ``owner`` alive."""
    raw: Any = (ctypes.c_uint8 * nbytes).from_address(address)
    raw.owner = owner
    return torch.frombuffer(raw, dtype=torch.uint8)


def poison(content: Tensor, dtype: torch.dtype) -> None:
    """Fill bytes with what is no number; those of integers, which may be indices, with zeros."""
    if not (dtype.is_floating_point or dtype.is_complex):
        content.zero_()
        return
    pattern = torch.frombuffer(bytearray(NO_NUMBER * 2), dtype=torch.uint8)
    content.copy_(pattern.repeat(-(-content.numel() // 8))[: content.numel()])


class Memory:
    """The memory of one storage.

    Attributes:
        content: all its bytes, at the same address.
        graph: the graph in whose pool it is; None if it is outside of the pools.
        before: what it held before the capture wrote to it; None if that did not.
        captured: what a capture has computed here; on a GPU a capture computes nothing.
        made: the line of the program that allocated it in the capture.
        read: the first line of the capture that uses it.
        is_kept: whether the graph keeps it alive.
        uncaptured: the number of the work beside the capture that wrote it, if there is one.
        overwritten: the line of the replay of another graph that has used the memory since.
        name: of the first tensor in it.
        is_gradient: whether that is the gradient of a parameter.
    """

    def __init__(
        self, t: Tensor, line: Line, *, keep: bool = True, graph: "GraphState | None" = None
    ):
        storage = t.untyped_storage()
        self.address, self.nbytes, self.dtype = storage.data_ptr(), storage.nbytes(), t.dtype
        self.content = bytes_at(self.address, self.nbytes, storage if keep else None)
        self.graph, self.is_kept = graph, keep
        self.made = self.read = line
        self.of = StorageWeakRef(storage)
        self.before: Tensor | None = None
        self.captured: Tensor | None = None
        self.uncaptured: tuple[int, int] | None = None
        self.overwritten: Line = None
        self.name, self.is_gradient = shown(t), False

    def given_out(self) -> torch.UntypedStorage:
        """Return another storage with this memory, whose end can be seen."""
        storage = bytes_at(self.address, self.nbytes, self.content).untyped_storage()
        self.of = StorageWeakRef(storage)
        setattr(storage, OF_GRAPH, self)
        return storage

    def storage(self) -> torch.UntypedStorage | None:
        """Return the storage of the tensors that have the memory; None if there are none."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self.of.cdata)
        return storage if self.is_memory_of(storage) else None

    def is_memory_of(self, storage: torch.UntypedStorage | None) -> bool:
        if storage is None:
            return False
        return bool((storage.data_ptr(), storage.nbytes()) == (self.address, self.nbytes))

    def keep_before(self) -> None:
        """Remember the content, unless that has been done."""
        if self.before is None:
            self.before = self.content.clone()

    def restore(self) -> None:
        """Let the memory be as before the capture."""
        if self.before is not None and (self.is_kept or self.storage() is not None):
            self.content.copy_(self.before)
        self.before = None

    def hide(self) -> None:
        """Keep what the capture has computed for other captures, and let nobody else see it."""
        self.captured = self.content.clone()
        poison(self.content, self.dtype)

    def show(self) -> None:
        """Show what the capture has computed, on which the operators of another one depend."""
        if self.captured is not None:
            self.content.copy_(self.captured)

    def copied(self) -> "Memory":
        """Keep what a tensor of the host holds now, and return the memory."""
        self.content, self.is_kept = self.content.clone(), True
        return self

    def replace(self) -> None:
        """Take other memory, because this has been freed; what it holds is no number."""
        self.content, self.is_kept = torch.empty(self.nbytes, dtype=torch.uint8), True
        poison(self.content, self.dtype)


class GraphState:
    """State of a graph, for the memory in its pool, and for the graphs that use its results.

    Attributes:
        memories: what the graph reads or writes.
        generators: registered ones, from which each replay draws new numbers.
        replays: their number.
        is_captured: whether a capture of it has succeeded.
        is_reset: whether what was captured has been forgotten.
    """

    def __init__(self) -> None:
        self.memories: list[Memory] = []
        self.generators: list[torch.Generator] = []
        self.replays = 0
        self.is_captured = self.is_reset = False

    @property
    def waits(self) -> bool:
        """Whether the graph was captured, and no replay has computed its results."""
        return self.is_captured and self.replays == 0


OF_GRAPH = "nogpu_memory"


def memory_of(t: Tensor) -> Memory | None:
    """Return the memory of a tensor that is in the pool of a graph."""
    found: Memory | None = getattr(t.untyped_storage(), OF_GRAPH, None)
    return found


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
        return not any(one.storage() is not None for one in self.held)


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

    def overwrite(self, graph: GraphState, line: Line) -> None:
        """Note what a replay of a graph overwrites of others that lies in the same blocks."""
        for block in self.blocks:
            if any(one.graph is graph for one in block.held):
                for one in block.held:
                    one.overwritten = None if one.graph is graph else line


def shown(t: Tensor) -> str:
    return f"a tensor of {str(t.dtype).removeprefix('torch.')} {list(t.shape)}"
