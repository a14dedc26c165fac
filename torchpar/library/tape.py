# SPDX-License-Identifier: MIT
"""Record what a function does with its tensors, as a tape that C++ plays again.

A tape holds for tensors of certain layouts: the tensors that are allocated, the views that are
taken, the Triton kernels that are launched, and the operators of PyTorch that are called. A
function that reads a tensor's values, or that uses a tensor which is not among its arguments,
cannot be played again; `TapeRecorder.refusal` says why.
"""

import ctypes
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torchpar.library.private import TorchDispatchMode
from torchpar.library.transforms import tensors_of

Step = tuple[Any, ...]
"""The arguments of a step of `player.cpp`, with its kind first."""

operators: dict[str, Any] = {}  # the operators of this library, by their names

_aten = torch.ops.aten
_ALLOCATIONS = {
    *(_aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default),
    *(_aten.new_empty.default, _aten.new_empty_strided.default),
}
_DEPEND_ON_VALUES = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
_MOST_PARAMETERS = 60
# Arguments that a tape would keep as they were: memory, and the state of random numbers.
_NOT_KEPT = torch.UntypedStorage, torch.TypedStorage, torch.Generator
# What gives the memory of a tensor to others, or its address, without an operator of PyTorch.
_HANDS_OUT = {
    *("data_ptr", "numpy", "tolist", "__array__", "__dlpack__", "__cuda_array_interface__"),
    *("untyped_storage", "storage", "to_dlpack", "__dlpack_c_exchange_api__"),
}


class Number(int):
    """An integer that differs from call to call, which the function passes to kernels as it is."""

    place: int  # among the numbers of a call


class Refusal(Exception):
    """Why a call cannot be played again."""


class TapeRecorder(TorchDispatchMode):
    """Record the calls in its context, on one thread.

    Args:
        tensors: the tensors that the tape will be given, in its order. `alias` returns the tensors
            to call the function with.
        calls_python: whether launches go through Triton's launcher in Python, as an emulator's do.
        trusts: whether the function hides nothing from the tape, by the promise of its author.
        written: the places among ``tensors`` of those that the call may write to.

    Attributes:
        refusal: why the calls cannot be played again, or "".
        is_being_tuned: whether an autotuner has timed a kernel, whose later calls launch once.
    """

    sees_launches = True  # for `torchpar.ops._operator.is_intercepted`

    def __init__(
        self,
        tensors: Sequence[Tensor | None],
        calls_python: bool,
        written: Sequence[int] = (),
        *,
        trusts: bool = True,
    ):
        super().__init__()
        self.written = written
        self.trusts = trusts
        self.calls_python = calls_python
        self.refusal, self.is_being_tuned = "", False
        self.steps: list[Step] = []
        self._views: dict[int, tuple[int, int]] = {}  # the base's slot, and bytes from its address
        # A tensor that is given twice stays one tensor, since a function may compare its arguments.
        self._aliases: dict[int, Tensor] = {}
        self._slots: dict[int, int] = {}  # by the id of a tensor, which `_kept` keeps
        self._kept: list[Tensor] = []
        for t in tensors:
            if t is not None and id(t) in self._aliases:
                self._kept.append(self._aliases[id(t)])  # its slot is not used
            elif t is not None:
                self._aliases[id(t)] = t.detach()
                if not trusts and vars(t):
                    self._aliases[id(t)].__dict__.update(vars(t))
                    self.refuse("an argument has attributes, which the function may read")
                self._new_slot(self._aliases[id(t)])
        self.inputs = len(self._kept)

    def alias(self, value: Any) -> Any:
        """The tensor to call the function with in the place of one of ``tensors``."""
        return self._aliases.get(id(value), value) if isinstance(value, Tensor) else value

    def tape(self, results: Sequence[Tensor | None], *, passes_on: bool = False) -> object:
        """The tape for `player.cpp`, whose results are these; None if there is none.

        Args:
            passes_on: whether a result may be one of the tensors that the tape is given.
        """
        slots = [-1 if t is None else self._slots.get(id(t), -2) for t in results]
        if any(slot == -2 or 0 <= slot < self.inputs * (not passes_on) for slot in slots):
            self.refuse("a result is not made by the call")
        if not all(map(self._is_written, slots)):
            self.refuse("a result is written by nothing that a tape holds")
        on_gpus = {t.device for t in self._kept if not t.is_cpu}
        if len(on_gpus) > 1:
            self.refuse("its tensors are on several devices")
        if self.refusal or self.is_being_tuned:
            return None
        device = on_gpus.pop() if on_gpus else torch.device("cpu")
        return len(self._kept), self._needed_steps(slots), slots, device, [*self.written]

    def _is_written(self, slot: int) -> bool:
        """Whether a step writes to what was allocated; another library's kernel is no step."""
        base = self._address(slot)[0]
        made = next((step for step in self.steps if step[:2] == ("empty", base)), None)
        if made is None or not all(made[2]):
            return True
        return any(
            self._address(one)[0] == base
            for step in self.steps
            if step[0] in ("launch", "call")
            for one in _tensors_of_step(step)
        )

    def _needed_steps(self, results: Sequence[int]) -> list[Step]:
        """The steps without tensors that nothing reads. Each tensor is dropped after its last use.

        A tape would otherwise hold the memory of all its tensors to its end.
        """
        used, needed = {*range(self.inputs), *results}, list[Step]()
        for step in reversed(self.steps):
            if step[0] in ("empty", "view") and step[1] not in used:
                continue
            touched = _tensors_of_step(step)
            if dropped := sorted(touched - used):
                needed.append(("free", dropped))
            needed.append(step)
            used |= touched
        return needed[::-1]

    def refuse(self, reason: str) -> None:
        self.refusal = self.refusal or reason

    def _new_slot(self, t: Tensor) -> int:
        self._kept.append(t)
        self._slots[id(t)] = slot = len(self._kept) - 1
        return slot

    def _slot_of(self, t: Tensor, taker: object) -> int:
        try:
            return self._slots[id(t)]
        except KeyError:
            raise Refusal(f"{taker} takes a tensor that is no argument of the call") from None

    def __enter__(self) -> "TapeRecorder":
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        definition = operators.get(func.name())
        if definition is not None and set(definition._kernels) == {None}:
            with self:
                return definition._run(None, *args, **kwargs)
        result = func(*args, **kwargs)
        try:
            self._note_call(func, args, kwargs, result)
        except Exception as e:  # also of a tensor of another kind, such as a sparse one
            self.refuse(str(e) or type(e).__name__)
        return result

    def _note_call(self, func: Any, args: tuple[Any, ...], kwargs: Any, result: Any) -> None:
        """Note a call of an operator of PyTorch."""
        if not _DEPEND_ON_VALUES.isdisjoint(func.tags):
            raise Refusal(f"{func} reads values, or returns a size that depends on them")
        if func is _aten.as_strided.default and (args[3:] or kwargs):
            raise Refusal(f"{func} counts from the beginning of the memory")
        if func in _ALLOCATIONS:
            if kwargs.get("pin_memory"):
                raise Refusal(f"{func} allocates pinned memory")
            slot, place = self._new_slot(result), result.device
            self.steps.append(("empty", slot, *_layout(result), place))
        elif all(_is_view(func, args, one) for one in _listed(result)):
            for one in _listed(result):  # several, as of `unbind`
                base, offset = self._slot_of(args[0], func), _start(one) - _start(args[0])
                slot = self._new_slot(one)
                self._views[slot] = base, offset
                self.steps.append(("view", slot, *_layout(one), base, offset))
        else:
            self._note_computation(func, args, kwargs, result)

    def _note_computation(self, func: Any, args: tuple[Any, ...], kwargs: Any, result: Any) -> None:
        returned = _listed(result) if func._schema.returns else ()
        results = [t for one in returned for t in _listed(one)]
        if not all(isinstance(t, Tensor) for t in results):
            if not any(True for _ in tensors_of((*args, *kwargs.values()))):
                return  # a fact of this machine
            raise Refusal(f"{func} returns what is no tensor")
        is_on_gpu = any(not t.is_cpu for t in tensors_of((*args, *kwargs.values())))
        if is_on_gpu and any(t.is_cpu for t in results):
            raise Refusal(f"{func} copies to the host, where values can be read")
        values: list[object] = []
        tensors: list[tuple[int, int]] = []
        lists: list[tuple[int, list[int]]] = []
        for place, argument in enumerate(func._schema.arguments):
            value = args[place] if place < len(args) else argument.default_value
            value = kwargs.get(argument.name, value)
            given = _listed(value)
            if any(isinstance(t, Tensor) for t in given):
                if not all(isinstance(t, Tensor) for t in given):
                    raise Refusal(f"{func} takes a list in which not all are tensors")
                slots = [self._slot_of(t, func) for t in given]
                is_written = argument.alias_info is not None and argument.alias_info.is_write
                if is_written and any(map(self._is_kept_unwritten, slots)):
                    raise Refusal(f"{func} writes to an argument of the call")
                # In their place, until the tape is played.
                if isinstance(value, Tensor):
                    tensors.append((place, slots[0]))
                    value = torch.empty(0, device="cpu")
                else:
                    lists.append((place, slots))
                    value = []
            elif isinstance(value, _NOT_KEPT):
                raise Refusal(f"{func} takes an argument of type {type(value).__name__}")
            values.append(value)
        slots = [-1 if id(t) in self._slots else self._new_slot(t) for t in results]
        name, overload = func._schema.name, func._schema.overload_name
        self.steps.append(("call", name, overload, values, tensors, lists, slots))

    def note_launch(
        self, kernel: Any, compiled: Any, grid: tuple[int, ...], args: Any, kwargs: Any
    ) -> None:
        """Note a launch of a Triton kernel, which was compiled."""
        try:
            _check_launch(compiled.metadata)
            self._note_launch(kernel, compiled, (*grid, 1, 1)[:3], args, kwargs)
        except Exception as e:
            self.refuse(str(e) or type(e).__name__)

    def _note_launch(
        self, kernel: Any, compiled: Any, grid: tuple[int, ...], args: Any, kwargs: Any
    ) -> None:
        given = {p.name: p.default for p in kernel.params if p.has_default}
        given |= dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        # A tensor's slot and bytes from it; −1 and bits; or −2 and less, for a `Number`.
        parameters: list[tuple[int, int]] = []
        for name, kind in compiled.src.signature.items():
            value = given.get(name)
            if isinstance(value, Tensor):
                slot = self._slot_of(value, kernel.__name__)
                parameters.append((slot, 0) if self.calls_python else self._address(slot))
            elif isinstance(value, Number):
                parameters.append((-2 - value.place, 0))
            elif kind in _BITS and isinstance(value, bool | int | float):
                parameters.append((-1, _bits(kind, value)))
            elif kind != "constexpr":
                raise Refusal(f"{kernel.__name__} takes {name} of type {kind}")
        if len(parameters) > _MOST_PARAMETERS:
            raise Refusal(f"{kernel.__name__} has {len(parameters)} parameters")
        parameters += [self._scratch(compiled.metadata, grid), (-1, 0)]  # of TMA, and of a profiler
        function, launch = compiled.function, None
        slots: list[int] = []
        if self.calls_python:
            function, (launch, slots) = 0, self._launcher(kernel, compiled, grid, given)
        block, shared = 32 * compiled.metadata.num_warps, compiled.metadata.shared
        kept = compiled, kernel.pre_run_hooks
        self.steps.append(
            ("launch", function, grid, block, shared, parameters, launch, slots, *kept)
        )

    def _address(self, slot: int) -> tuple[int, int]:
        """The slot of the memory that a tensor views, and the bytes from its address."""
        total = 0
        while slot in self._views:
            slot, offset = self._views[slot]
            total += offset
        return slot, total

    def _is_kept_unwritten(self, slot: int) -> bool:
        """Whether a tensor is an argument, or a view of one, that the call may not write to."""
        base, _ = self._address(slot)
        return base < self.inputs and base not in self.written

    def _scratch(self, metadata: Any, grid: tuple[int, ...]) -> tuple[int, int]:
        """The memory in which a kernel makes TMA descriptors, as a parameter."""
        if not metadata.global_scratch_size:
            return -1, 0
        slot = self._new_slot(torch.empty(0, device="cpu"))
        size = metadata.global_scratch_size * math.prod(grid)
        self.steps.append(("empty", slot, [size], [1], torch.int8, self._kept[0].device))
        return slot, 0

    def _launcher(
        self, kernel: Any, compiled: Any, grid: tuple[int, ...], given: dict[str, Any]
    ) -> tuple[Callable[..., None], list[int]]:
        """A launch by Triton's launcher in Python, and the slots of the tensors that it takes."""
        from triton.runtime import driver

        arguments = [given.get(name) for name in kernel.arg_names]
        places = [i for i, value in enumerate(arguments) if isinstance(value, Tensor)]

        def launch(numbers: Sequence[int], *tensors: Tensor) -> None:
            values = [numbers[one.place] if isinstance(one, Number) else one for one in arguments]
            for place, t in zip(places, tensors, strict=True):
                values[place] = t
            active = driver.active
            stream = active.get_current_stream(active.get_current_device())
            handles = compiled.function, compiled.packed_metadata, None, None, None
            compiled.run(*grid, stream, *handles, *values)

        return launch, [self._slots[id(arguments[place])] for place in places]


def _tensors_of_step(step: Step) -> set[int]:
    """The slots of all tensors that a step makes, reads or writes."""
    kind, *rest = step
    if kind == "empty":
        found = {rest[0]}
    elif kind == "view":
        found = {rest[0], rest[4]}
    elif kind == "launch":
        found = {slot for slot, _ in rest[4]} | {*rest[6]}
    else:
        found = {slot for _, slot in rest[3]}.union(rest[5], *(slots for _, slots in rest[4]))
    return {slot for slot in found if slot >= 0}  # the others are numbers, or results of no use


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else (value,)


def _is_view(func: Any, args: tuple[Any, ...], result: object) -> bool:
    if func._schema.is_mutable or not isinstance(result, Tensor):
        return False
    if not args or not isinstance(args[0], Tensor):
        return False
    if (result.is_conj(), result.is_neg()) != (args[0].is_conj(), args[0].is_neg()):
        return False  # a view with other values, which its operator makes again
    return bool(result.untyped_storage()._cdata == args[0].untyped_storage()._cdata)


def _start(t: Tensor) -> int:
    """The bytes of a tensor's memory before its first element, also if it has none."""
    return int(t.storage_offset()) * t.element_size()


def _layout(t: Tensor) -> tuple[list[int], list[int], torch.dtype]:
    return [*t.shape], [*t.stride()], t.dtype


def _check_launch(metadata: Any) -> None:
    """Refuse the launches that need more of the driver than a grid and a stream."""
    for name in ("launch_pdl", "launch_cooperative_grid"):
        if getattr(metadata, name, False):
            raise Refusal(f"a kernel is launched with {name}")
    if metadata.num_ctas != 1:
        raise Refusal("a kernel is launched in clusters")
    if getattr(metadata, "profile_scratch_size", 0):
        raise Refusal("a kernel is instrumented")


_BITS = {
    **dict.fromkeys(("i1", "u1", "i8", "u8", "i16", "u16", "i32", "u32", "i64", "u64"), "int"),
    "fp32": "f",
    "fp64": "d",
}


def _bits(kind: str, value: float) -> int:
    """The bits of a number as a parameter of a kernel, as int64."""
    if _BITS[kind] == "int":
        bits = int(value) & 2**64 - 1
    else:
        # ctypes takes a number beyond float32 as infinity, as Triton does.
        number = ctypes.c_float(value) if _BITS[kind] == "f" else ctypes.c_double(value)
        bits = int.from_bytes(bytes(number), "little")
    return bits - 2**64 if bits >= 2**63 else bits


def fingerprint(tape: object) -> str:
    """A text that two tapes share if they hold the same steps.

    It has the addresses of compiled kernels, which the tape keeps.
    """
    if isinstance(tape, list | tuple):
        return f"({' '.join(map(fingerprint, tape))})"
    if isinstance(tape, Tensor):  # in the place of an argument
        return "Tensor"
    if callable(tape):  # a launch by Python, whose kernel and parameters stand beside it
        return "function"
    is_plain = type(tape).__module__ in ("builtins", "torch")
    return repr(tape) if is_plain else f"{type(tape).__name__} {id(tape)}"


class _Recorders(threading.local):
    active: TapeRecorder | None = None  # that of this thread
    is_launching = False


class _Replaced:
    """Methods of Triton that are replaced, for all threads, while any thread records."""

    def __init__(self) -> None:
        self.lock, self.count = threading.Lock(), 0
        self.methods: list[tuple[Any, str, Any, Any]] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self.lock:
            if not self.count:
                self._replace()
            self.count += 1
        try:
            yield  # without the lock: the function may wait for another thread, which records
        finally:
            with self.lock:
                self.count -= 1
                if not self.count:
                    self._restore()

    def _replace(self) -> None:
        from triton.runtime.autotuner import Autotuner
        from triton.runtime.jit import JITFunction

        run, bench = JITFunction.run, Autotuner._bench

        def noted(*args: Any, **kwargs: Any) -> Any:
            return _noted(run, *args, **kwargs)

        def tuned(*args: Any, **kwargs: Any) -> Any:
            if _recorders.active is not None:
                _recorders.active.is_being_tuned = True
            return bench(*args, **kwargs)

        self.methods = [(JITFunction, "run", run, noted), (Autotuner, "_bench", bench, tuned)]
        for owner, name, _, ours in self.methods:
            setattr(owner, name, ours)

    def _restore(self) -> None:
        for owner, name, before, ours in self.methods:
            # Who has replaced it since then calls ours, which passes on.
            if getattr(owner, name) is ours:
                setattr(owner, name, before)


_recorders, _replaced = _Recorders(), _Replaced()


def _noted(run: Callable[..., Any], kernel: Any, *args: Any, grid: Any, **kwargs: Any) -> Any:
    """A launch by ``run``, which this thread's recorder notes."""
    recorder = _recorders.active
    if recorder is None or kwargs.get("warmup") or _recorders.is_launching:
        return run(kernel, *args, grid=grid, **kwargs)
    found = [grid]

    def asked(meta: Any) -> Any:
        found[0] = grid(meta)
        return found[0]

    _recorders.is_launching = True
    try:
        compiled = run(kernel, *args, grid=asked if callable(grid) else grid, **kwargs)
        if compiled is None:
            recorder.refuse("Triton's interpreter launches nothing")
        else:
            recorder.note_launch(kernel, compiled, tuple(found[0]), args, kwargs)
    finally:
        _recorders.is_launching = False
    return compiled


class Watch(TorchFunctionMode):
    """Refuse functions of tensors that give the tensors' memory to others.

    Args:
        refuse: called with the reason.
    """

    def __init__(self, refuse: Callable[[str], None]):
        super().__init__()
        self.refuse = refuse

    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":  # of a property
            owner = getattr(func, "__self__", None)
            name = getattr(getattr(owner, "fget", owner), "__name__", "")
        if name in _HANDS_OUT and not _recorders.is_launching:
            self.refuse(f"it gives a tensor's memory, or address, to others by {name}")
        return func(*args, **(kwargs or {}))


@contextmanager
def recording(recorder: TapeRecorder) -> Iterator[TapeRecorder]:
    """Let ``recorder`` note the calls and launches of this thread in the block."""
    from torchpar.kernels import launch

    outer, was_active = _recorders.active, launch.records.active
    if outer is not None:
        outer.refuse("an operator is called where no tape sees it")
    with _replaced():
        _recorders.active, launch.records.active = recorder, True
        try:
            with recorder:
                yield recorder
        finally:
            _recorders.active, launch.records.active = outer, was_active
