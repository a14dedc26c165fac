# SPDX-License-Identifier: MIT
"""Put C++ in front of operators' Python registrations: what Python recorded is played again.

`python -m torchpar build` compiles player.cpp. Without it all calls are Python's.
"""

import ctypes
import sys
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor

from torchpar.library.derivatives import Call
from torchpar.library.dispatch_keys import OTHER_KEYS
from torchpar.library.private import TorchDispatchMode
from torchpar.library.tape import Number, TapeRecorder, Watch, fingerprint, recording

if TYPE_CHECKING:
    from torchpar.library.call_path import DispatchedOp

RECORDINGS = 3  # equal ones, after which a call of a function that is not trusted is played
_MOST_OPTIONS = 64  # of a function: a value that changes in each call must not fill the memory
_MOST_KEYS = 4096
_DIFFER = "two calls with the same layouts and numbers do not do the same"
_TYPES = {"Tensor", "Optional[Tensor]", "int", "float", "bool", "str"}
_TYPES |= {"Optional[int]", "Optional[float]", "Optional[bool]", "Optional[str]"}


class Core:
    """The compiled module, and the devices whose calls it plays.

    Attributes:
        module: None where it was not built.
        devices: dispatch keys, "CUDA"; "CPU" for tests.
        calls_python: whether launches go through Triton's launcher in Python, as an emulator's do.
    """

    module: Any = None
    devices: tuple[str, ...] = ("CUDA",)
    calls_python = False

    def __init__(self) -> None:
        self.players: WeakSet[Player | PlayedFunction] = WeakSet()

    def forget(self) -> None:
        """Discard all tapes, so that the next calls are recorded."""
        for player in self.players:
            player.forget()


core = Core()


def _set_up() -> None:
    """Tell C++ which calls are not plain."""
    core.module.set_other_keys(OTHER_KEYS & (2**64 - 1))


def _watch_launches() -> None:
    """Let Triton's hooks see launches, and forget tapes with the launches of Python."""
    if "triton" in sys.modules:
        from triton.knobs import runtime

        from torchpar.kernels import launch

        core.module.set_runtime(runtime)
        if core.forget not in launch.forgetters:
            launch.forgetters.append(core.forget)


def start() -> None:
    """Load what `torchpar.library.build` has built, where PyTorch is built for NVIDIA's GPUs."""
    if torch.version.cuda is None:
        return
    with suppress(OSError, AttributeError):  # without a driver no kernel is launched
        driver = ctypes.CDLL("libcuda.so.1")
        cuda = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libtorch_cuda.so"))
        launch, stream = driver.cuLaunchKernelEx, cuda.aoti_torch_get_current_cuda_stream
        from torchpar.library import build

        if (module := build.load()) is not None:
            module.set_launch(ctypes.cast(launch, ctypes.c_void_p).value)
            module.set_stream(ctypes.cast(stream, ctypes.c_void_p).value)
            core.module = module


def why_not(op: "DispatchedOp") -> str:
    """Why calls of an operator cannot be played, or ""."""
    if op._player is not None:
        return op._player.stopped or op._player.refusal
    kinds = {str(one.type) for one in (*op._positional, *op._keywords)} - _TYPES
    devices = core.devices
    has_kernel = op._opoverload.has_kernel_for_dispatch_key
    reasons = {
        "it writes to an argument": op._mutated,
        "it returns what is no tensor": {*op._returns} != {"Tensor"},
        f"it has arguments of type {', '.join(sorted(kinds))}": bool(kinds),
        "it has a kernel of its own for this type of device": not op._kernels.keys().isdisjoint(
            map(str.lower, devices)
        ),
        op._not_played: op._not_played,
        "somebody else has registered a kernel of it": any(
            has_kernel(getattr(torch.DispatchKey, kind + key))
            for kind in ("", "Autograd")
            for key in devices
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def why_not_call(op: "DispatchedOp", args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why a call of an operator cannot be played, or "", without C++: the call is recorded.

    Raises:
        Exception: the operator's own error, as where there is no GPU for its kernels.
    """
    if reason := why_not(op):
        return reason
    tapes: list[object] = []
    # An autotuner's first call is not recorded.
    for _ in range(RECORDINGS + 1):
        _, tape, recorder = _recorded(op, args, kwargs, calls_python=True)
        if recorder.refusal:
            return recorder.refusal
        if not recorder.is_being_tuned:
            tapes.append(tape)
    return _DIFFER if len(set(map(fingerprint, tapes))) > 1 else ""


def _recorded(
    op: "DispatchedOp", args: tuple[Any, ...], kwargs: dict[str, Any], calls_python: bool
) -> tuple[Any, object, TapeRecorder]:
    """The result of a call by Python, the call's tape, which may be None, and the recorder."""
    is_trusted = op._trusted is not None
    tensors = [t for t in args if isinstance(t, Tensor)]
    recorder = TapeRecorder(tensors, calls_python, trusts=is_trusted)
    kernel = op._kernels[None] if is_trusted else partial(_watched, op._kernels[None], recorder)
    with recording(recorder):
        result: Any = op._compute(kernel, is_trusted, (*map(recorder.alias, args),), kwargs)
    return result, recorder.tape(result if isinstance(result, tuple) else (result,)), recorder


class PlayedFunction:
    """Calls of a function of tensors that is no operator, played by C++ from the second one on.

    The function must depend on the tensors' layouts and on ``options`` alone. Without C++ each call
    is the function's.
    """

    def __init__(self) -> None:
        self.refusal = ""  # why the last call was not recorded
        self.installed: Any = None
        self._numbers: dict[Hashable, int] = {}  # of options

    def forget(self) -> None:
        """Discard all tapes."""
        if self.installed is not None:
            self.installed.forget()

    def __call__(
        self,
        function: Callable[[list[Tensor], Sequence[int]], list[Tensor]],
        tensors: list[Tensor],
        options: Hashable,
        numbers: Sequence[int] = (),
        written: Sequence[int] = (),
    ) -> list[Tensor]:
        """``function(tensors, numbers)``.

        Args:
            options: what the function depends on beside the tensors.
            numbers: integers that only kernels read. They may differ in each call.
            written: the places of the tensors that the function may write to.
        """
        if core.module is None or tensors[0].device.type.upper() not in core.devices:
            return function(tensors, numbers)
        if self.installed is None or len(self._numbers) > _MOST_OPTIONS:
            _set_up()
            core.players.add(self)
            self.installed, self._numbers = core.module.Memo(), {}
        if options not in self._numbers:  # options that differ in each call are never recorded
            self._numbers[options] = len(self._numbers)
            return function(tensors, numbers)
        number = self._numbers[options]
        found = self.installed.play(number, tensors, numbers)
        if isinstance(found, list):
            return found
        if not found:
            return function(tensors, numbers)
        recorder = TapeRecorder(tensors, core.calls_python, written)
        marked = [Number(one) for one in numbers]
        for place, one in enumerate(marked):
            one.place = place
        with recording(recorder):
            results = function([*map(recorder.alias, tensors)], marked)
        # Under a mode the lists of `_foreach` functions change, and their versions do not.
        torch.autograd.graph.increment_version([tensors[place] for place in written])
        tape = recorder.tape(results)
        self.refusal = recorder.refusal
        _watch_launches()
        if not recorder.is_being_tuned:
            self.installed.remember(number, tensors, tape)
        return results


class Player:
    """C++ kernels at an operator's dispatch keys, until `remove`."""

    def __init__(self, op: "DispatchedOp"):
        self.op = op
        core.players.add(self)
        self.refusal = ""  # why the last call was not recorded
        self.stopped = ""  # why no further call is recorded
        self.recordings = 1 if op._trusted is not None else RECORDINGS
        self._derivatives: dict[object, Any] = {}
        self._equal: dict[object, tuple[str, int, object]] = {}  # by a call's key: `_is_settled`
        self._numbers: dict[Hashable, int] = {}  # keys of calls, by the layouts of their tensors
        dispatched: Any = op._opoverload
        self._has_python_dispatch = getattr(dispatched, "_pyobj_dispatcher", None) is not None
        if self._has_python_dispatch:
            dispatched._enable_pyobj_dispatch(False)
        _set_up()
        space, _, name = op._qualname.partition("::")
        base, _, overload = name.partition(".")
        self.installed = core.module.Installed(
            *(space, base, overload, core.devices, op._node_name, op._decompose is not None),
            *(op._autograd, partial(op._run, None), self.record, self.observe),
        )
        self.call = self.installed.caller()  # with positional tensors; else NotImplemented

    def remove(self) -> None:
        """Let Python compute and differentiate all calls again."""
        self.installed.remove()
        if self._has_python_dispatch:
            dispatched: Any = self.op._opoverload
            dispatched._enable_pyobj_dispatch(True)

    def forget(self) -> None:
        """Discard all tapes, and begin to count anew."""
        self.installed.forget()
        self._equal, self._numbers = {}, {}

    def record(self, *args: Any, **kwargs: Any) -> Any:
        """Compute a call by Python, and let C++ play it once enough recordings are equal."""
        op = self.op
        whole = (*args, *op._defaults[len(args) :])
        values = (*whole, *(op._keyword_only(kwargs)[one.name] for one in op._keywords))
        tensors = [t for t in whole if isinstance(t, Tensor)]
        result, tape, recorder = _recorded(op, args, kwargs, core.calls_python)
        key = self._note(recorder) and self.installed.key(values)
        if key and self._has_few_numbers(key, tensors) and self._is_settled(key, tape):
            self.installed.remember(values, tape)
        return result

    def _note(self, recorder: TapeRecorder) -> bool:
        """Keep why a call is not played. Return whether the recording counts."""
        self.refusal = recorder.refusal
        _watch_launches()
        return not recorder.is_being_tuned

    def _is_settled(self, key: object, found: object) -> bool:
        """Whether what was found for a call holds for the calls after it.

        This is so after enough equal recordings. Where two differ, the function depends on what no
        key has, such as a variable of the program.
        """
        if found is None or self.recordings == 1:
            return True
        text, count, kept = fingerprint(found), 1, found
        if key in self._equal:
            before, count, kept = self._equal.pop(key)
            count += 1
            if text != before:
                self.forget()
                self._stop(_DIFFER)
                return False
        if count < self.recordings:
            if len(self._equal) >= _MOST_KEYS:
                self._equal.clear()
            self._equal[key] = text, count, kept  # so that no address in the text is used again
        return count >= self.recordings

    def _has_few_numbers(self, key: object, tensors: Sequence[Tensor]) -> bool:
        """Whether the numbers among the arguments, such as a step's, do not change in each call."""
        layout = tuple([(t.shape, t.stride(), t.dtype, t.device) for t in tensors])
        if key not in self._equal:
            if len(self._numbers) >= _MOST_KEYS:
                self._numbers.clear()
            self._numbers[layout] = self._numbers.get(layout, 0) + 1
        if self._numbers.get(layout, 0) > _MOST_OPTIONS:
            self._stop("its arguments that are no tensors differ in too many calls")
        return not self.stopped

    def _stop(self, reason: str) -> None:
        """Let Python compute all calls that have no tape."""
        self.stopped = self.stopped or reason
        self.installed.stop_recording()
        self._equal, self._numbers = {}, {}

    def observe(self, keyset: torch.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        """Differentiate a call by Python, and let C++ do so from now on."""
        op = self.op
        if op._decompose is not None and op._decompose(*args, **kwargs):
            return op._autograd(keyset, *args, **kwargs)
        call = _ObservedCall(op, keyset, kwargs, False)
        call.player = self
        try:
            return call.result(op._apply(*call.flat(args), call))
        except Exception as e:
            op._refuse_none(e, args, kwargs)
            raise

    def settle(self, call: "_ObservedCall", ctx: Any, leaves: tuple[Any, ...], output: Any) -> None:
        """Let C++ differentiate calls as this one, which Python has, if nothing forbids it."""
        op = self.op
        values = (*leaves, *(op._keyword_only(call.kwargs)[one.name] for one in op._keywords))
        key = self.installed.key(values)
        if key is None or self.stopped:
            return None
        places = tuple(i for i, value in enumerate(leaves) if isinstance(value, Tensor))
        results = output if isinstance(output, tuple) else (output,)
        tensors = (*(leaves[i] for i in places), *results)
        known = {id(t): i for i, t in reversed([*enumerate(tensors)])}
        to_save = ctx.to_save or ()
        saved = tuple(-1 if t is None else known.get(id(t), -2) for t in to_save)
        attributes = {name: value for name, value in vars(ctx).items() if name not in _OWN}
        kept = saved, sorted(attributes.items(), key=lambda one: one[0]), places, call.given
        is_special = call.refusal or ctx.non_differentiable or ctx.dirty_tensors
        is_plain = not is_special and -2 not in saved and _is_plain(tuple(attributes.values()))
        if op._backward is None or not is_plain or len(self._derivatives) >= _MOST_KEYS:
            return self.installed.settle(values, None)  # type: ignore[no-any-return]
        if not self._is_settled((key, "derivative"), kept):
            return None
        identity = repr(kept)
        if identity not in self._derivatives:
            rule = _Backward(self, attributes, places, call.given)
            rule.derivative = self.installed.derivative(len(places), saved, rule, rule.record)
            self._derivatives[identity] = rule.derivative
        return self.installed.settle(values, self._derivatives[identity])  # type: ignore[no-any-return]


_OWN = ("_torchpar_call", "set_materialize_grads")  # what a `Call` keeps on its ctx
_PLAIN = {bool, int, float, str, type(None), torch.dtype, torch.device}


def _is_plain(value: object) -> bool:
    """Whether an attribute of a ctx is no object that may change."""
    if isinstance(value, tuple):
        return type(value) in (tuple, torch.Size) and all(map(_is_plain, value))
    return type(value) in _PLAIN


def _watched(kernel: Callable[..., Any], recorder: TapeRecorder, *args: Any, **kwargs: Any) -> Any:
    """The result of a function, which may give no tensor's memory to others."""
    with Watch(recorder.refuse):
        return kernel(*args, **kwargs)


class _ObservedCall(Call):
    """A call whose ``setup_context`` is watched, so that C++ need not call it again."""

    player: Player
    refusal = ""  # why C++ cannot do what `setup_context` does

    def set_up(self, ctx: Any, leaves: tuple[object, ...], output: Any) -> None:
        is_single = not isinstance(output, tuple)
        if is_single:

            def noted(value: bool) -> None:
                self.refuse("it calls set_materialize_grads")
                type(ctx).set_materialize_grads(ctx, value)

            ctx.set_materialize_grads = noted
        with _Computing(self.refuse), Watch(self.refuse):
            super().set_up(ctx, leaves, output)
        if is_single:
            del ctx.set_materialize_grads
        elif not self.materializes and len(output) > 1:
            self.refuse("it calls set_materialize_grads")
        self.player.settle(self, ctx, leaves, output)

    def refuse(self, reason: str) -> None:
        self.refusal = self.refusal or reason


class _Computing(TorchDispatchMode):
    """Refuse operators of PyTorch, which may read values.

    Args:
        refuse: called with the reason.
    """

    def __init__(self, refuse: Callable[[str], None]):
        super().__init__()
        self.refuse = refuse

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.refuse(f"it calls {func}")
        return func(*args, **(kwargs or {}))


class _Backward:
    """The gradients of a call's tensors, by Python's rule."""

    derivative: Any

    def __init__(
        self, player: Player, attributes: dict[str, Any], places: tuple[int, ...], given: int
    ):
        self.player, self.attributes, self.places, self.given = player, attributes, places, given

    def __call__(
        self,
        saved: Sequence[Tensor | None],
        needs: Sequence[bool],
        grads: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        op = self.player.op
        by_place = dict(zip(self.places, needs, strict=True))
        ctx = SimpleNamespace(
            **self.attributes,
            saved_tensors=tuple(saved),
            needs_input_grad=tuple(by_place.get(i, False) for i in range(self.given)),
        )
        gradients: Any = op._backward(ctx, *grads)  # type: ignore[misc]
        found = gradients if isinstance(gradients, tuple) else (gradients,)
        count = len(op._positional)
        if len(found) not in (self.given, count):
            expected = count if self.given == count else f"{self.given} or {count}"
            raise RuntimeError(
                f"{op._qualname}: backward returns an incorrect number of gradients: expected "
                f"{expected}, got {len(found)}, one for each positional argument"
            )
        found += (None,) * (count - len(found))
        wanted = zip((found[i] for i in self.places), needs, strict=True)
        return [g if is_needed else None for g, is_needed in wanted]

    def record(
        self,
        saved: Sequence[Tensor | None],
        needs: Sequence[bool],
        grads: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        """The same, and let C++ play it from now on."""
        player = self.player
        trusts = player.recordings == 1
        recorder = TapeRecorder([*grads, *saved], core.calls_python, trusts=trusts)
        rule = self if trusts else partial(_watched, self, recorder)
        with recording(recorder):
            found: list[Tensor | None] = rule(
                [*map(recorder.alias, saved)], needs, [*map(recorder.alias, grads)]
            )
        tape = recorder.tape(found, passes_on=True)  # a gradient may be the incoming one
        values = self.derivative, needs, grads, saved
        key = player._note(recorder) and player.installed.backward_key(*values)
        if key and not player.stopped and player._is_settled(key, tape):
            player.installed.remember_backward(*values, tape)
        return found
