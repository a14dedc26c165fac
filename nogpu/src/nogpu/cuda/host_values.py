# SPDX-License-Identifier: MIT
"""Values of the host in a capture of a CUDA graph: the graph has them as they were then.

A kernel takes a number of the host by its value, and PyTorch reads lengths and sizes of the host
while it launches. A replay launches the same kernels, and reads nothing of the host but what is
copied from its pinned memory. Nor does it repeat what the capture has changed on the host.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from nogpu.cuda import places
from nogpu.cuda.graph_memory import Line, shown
from nogpu.cuda.operations import tensors_in
from nogpu.cuda.types import Arguments, Operator
from nogpu.record.source import calls_under_way, program_line
from nogpu.triton.torch_operators import is_plain

# Operators whose result is no tensor: Python has it.
TAKEN_BY_PYTHON = {"_local_scalar_dense", "item", "is_nonzero", "equal"}
# Functions in Python that take a tensor's values without an operator.
TAKING_FUNCTIONS = {"tolist", "numpy", "__array__", "tensor_split"}
PRINTING = "torch._tensor_str"
LIFT = torch.ops.aten.lift_fresh  # the operator on a tensor that torch.tensor has made
# Operators on the device with a result on the host, and its position.
RESULTS_ON_HOST = {torch.ops.aten._pack_padded_sequence: 1}


def results_on_host(func: Operator, result: object) -> list[Tensor]:
    """Return the results of an operator on the device that are on the host."""
    position = RESULTS_ON_HOST.get(func.overloadpacket)
    if position is None or not isinstance(result, (tuple, list)):
        return []
    return tensors_in(result[position : position + 1])


class HostValue:
    """The values of a tensor of the host, where they were taken in a capture.

    Attributes:
        line: of the program, that took them.
        name: of the tensor, in messages.
    """

    def __init__(self, t: Tensor):
        self.line, self.name = program_line(), shown(t)
        self.of = StorageWeakRef(t.untyped_storage())
        self._dtype, self._place = t.dtype, (t.storage_offset(), t.size(), t.stride())
        self._taken = _bytes_of(t)

    def has_changed(self) -> bool:
        """Whether the tensor has other values now; not where it has been freed."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self.of.cdata)
        if storage is None or not storage.nbytes():
            return False
        now = torch.empty(0, dtype=self._dtype).set_(storage, *self._place)
        return _bytes_of(now) != self._taken


def _bytes_of(t: Tensor) -> bytes:
    """Return a tensor's values as bytes, which are equal where a number is NaN, too."""
    values = t.detach().resolve_conj().resolve_neg().contiguous()
    return values.view(-1).view(torch.uint8).numpy().tobytes() if values.numel() else b""


@dataclass
class HostChange:
    """A tensor of the host that the capture has changed; ``line`` is the first that did."""

    of: StorageWeakRef
    before: bytes
    name: str
    line: Line

    def is_done(self) -> bool:
        """Whether it has other values than before the capture."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self.of.cdata)
        return storage is not None and _bytes_of_storage(storage) != self.before


def _bytes_of_storage(storage: torch.UntypedStorage) -> bytes:
    return _bytes_of(torch.empty(0, dtype=torch.uint8).set_(storage))


class HostValues:
    """What one capture takes from tensors of the host, and what it changes there.

    Attributes:
        taken: in the order of the program.
    """

    def __init__(self) -> None:
        self.taken: list[HostValue] = []
        # By storages in C++: of tensors that the capture makes, and what these come from.
        self._sources: dict[int, tuple[StorageWeakRef, bool, list[HostValue]]] = {}
        self._changes: dict[int, HostChange] = {}

    def take(self, tensors: Iterable[Tensor]) -> None:
        """Note that the graph has the values of tensors of the host."""
        if any(frame.f_globals.get("__name__") == PRINTING for frame in calls_under_way()):
            return
        for t in tensors:
            self.taken += self._values_of(t)

    def _values_of(self, t: Tensor) -> list[HostValue]:
        """Return the values that a tensor of the host has, or comes from."""
        if places.mark_of(t) is not False or not is_plain(t) or not t.untyped_storage().nbytes():
            return []
        storage = t.untyped_storage()
        _, is_made, sources = self._sources.get(storage._cdata, (None, False, []))
        return list(sources) if is_made else [*sources, HostValue(t)]

    def has_made(self, t: Tensor) -> bool:
        """Whether the capture has made a tensor of the host, as far as is known."""
        return self._sources.get(t.untyped_storage()._cdata, (None, False))[1]

    def derive(self, result: Tensor, operands: Iterable[Tensor]) -> None:
        """Note what a tensor of the host that the capture makes comes from."""
        self._note_sources(result, True, [value for t in operands for value in self._values_of(t)])

    def _note_sources(self, t: Tensor, is_made: bool, values: list[HostValue]) -> None:
        storage = t.untyped_storage()
        _, was_made, before = self._sources.get(storage._cdata, (None, False, []))
        found = StorageWeakRef(storage), is_made or was_made, [*before, *values]
        self._sources[storage._cdata] = found

    def execute(
        self,
        call: Callable[[], object],
        func: Operator,
        operands: list[Tensor],
        written: list[Tensor],
    ) -> object:
        """Execute an operator on tensors of the host, and note what its results come from."""
        if func.namespace == "aten" and func.overloadpacket.__name__ in TAKEN_BY_PYTHON:
            self.take(operands)
        for t in written:
            self._note_change(t)
        given = {t.untyped_storage()._cdata for t in operands}
        changed = {t.untyped_storage()._cdata for t in written}
        read = [t for t in operands if t.untyped_storage()._cdata not in changed]
        values = [value for t in read for value in self._values_of(t)]
        result = call()
        for t in written:
            self._note_sources(t, False, values)
        for t in filter(is_plain, tensors_in((result,))):
            if func.overloadpacket is LIFT or t.untyped_storage()._cdata not in given:
                self._note_sources(t, True, values)
        return result

    def _note_change(self, t: Tensor) -> None:
        """Note a tensor of the host that was there before the capture, as far as is known."""
        storage = t.untyped_storage()
        if places.mark_of(t) is not False or self.has_made(t) or storage._cdata in self._changes:
            return
        before = _bytes_of_storage(storage)
        change = HostChange(StorageWeakRef(storage), before, shown(t), program_line())
        self._changes[storage._cdata] = change

    def changes(self) -> Iterator[HostChange]:
        """Yield what the capture has left changed."""
        for one in self._changes.values():
            if one.is_done():
                yield one


def taken_by_function(func: object, args: Arguments) -> list[Tensor]:
    """Return the tensors whose values a function in Python takes without an operator."""
    return tensors_in(args) if getattr(func, "__name__", "") in TAKING_FUNCTIONS else []
