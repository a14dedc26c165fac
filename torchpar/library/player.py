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

from torchpar.library.dispatch_keys import OTHER_KEYS
from torchpar.library.private import implementations
from torchpar.library.tape import Number, TapeRecorder, recording

if TYPE_CHECKING:
    from torchpar.library.call_path import DispatchedOp

_MOST_OPTIONS = 64  # of a function: a value that changes in each call must not fill the memory
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
            player.installed.forget()


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
    kinds = {str(one.type) for one in (*op._positional, *op._keywords)} - _TYPES
    reasons = {
        "it writes to an argument": op._mutated,
        "it returns what is no tensor": {*op._returns} != {"Tensor"},
        f"it has arguments of type {', '.join(sorted(kinds))}": bool(kinds),
        "it has a kernel of its own for a type of device": {*op._kernels} != {None},
        "it is not trusted": op._trusted is None,
        "somebody else has registered a kernel of it": not op._other_kernels.isdisjoint(
            implementations
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


class PlayedFunction:
    """Calls of a function of tensors that is no operator, played by C++ from the second one on.

    The function must depend on the tensors' layouts and on ``options`` alone. Without C++ each call
    is the function's.
    """

    def __init__(self) -> None:
        self.refusal = ""  # why the last call was not recorded
        self.installed: Any = None
        self._numbers: dict[Hashable, int] = {}  # of options

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
        self._derivatives: dict[object, Any] = {}
        dispatched: Any = op._opoverload
        self._has_python_dispatch = getattr(dispatched, "_pyobj_dispatcher", None) is not None
        if self._has_python_dispatch:
            dispatched._enable_pyobj_dispatch(False)
        _set_up()
        space, _, name = op._qualname.partition("::")
        base, _, overload = name.partition(".")
        self.installed = core.module.Installed(
            *(space, base, overload, core.devices, op._decompose is not None),
            *(op._autograd, partial(op._run, None), self.record),
        )
        self.call = self.installed.caller()  # with positional tensors; else NotImplemented

    def remove(self) -> None:
        """Let Python compute and differentiate all calls again."""
        self.installed.remove()
        if self._has_python_dispatch:
            dispatched: Any = self.op._opoverload
            dispatched._enable_pyobj_dispatch(True)

    def record(self, *args: Any, **kwargs: Any) -> Any:
        """Compute a call by Python, and let C++ play it from now on."""
        op = self.op
        whole = (*args, *op._defaults[len(args) :])
        keywords = op._keyword_only(kwargs)
        recorder = TapeRecorder([t for t in whole if isinstance(t, Tensor)], core.calls_python)
        with recording(recorder):
            result: Any = op._run(None, *map(recorder.alias, args), **kwargs)
        results = result if isinstance(result, tuple) else (result,)
        tape = recorder.tape(results)
        self.refusal = recorder.refusal
        _watch_launches()
        if not recorder.is_being_tuned:
            values = (*whole, *(keywords[one.name] for one in op._keywords))
            derivative = self._derivative(args, whole, keywords, results) if tape else None
            self.installed.remember(values, tape, derivative)
        return result

    def _derivative(
        self,
        args: tuple[Any, ...],
        whole: tuple[Any, ...],
        keywords: dict[str, Any],
        results: tuple[Tensor, ...],
    ) -> Any:
        """The derivative for C++; None where Python differentiates the call."""
        op = self.op
        if op._backward is None or (op._decompose is not None and op._decompose(*args, **keywords)):
            return None
        ctx = _Context()
        if op._setup_context is not None:
            given = {"keyword_only_inputs": keywords} if op._keywords else {}
            output = results if len(op._returns) > 1 else results[0]
            op._setup_context(ctx=ctx, inputs=whole, output=output, **given)
        places = tuple(i for i, value in enumerate(whole) if isinstance(value, Tensor))
        tensors = (*(whole[i] for i in places), *results)
        known = {id(t): i for i, t in reversed([*enumerate(tensors)])}
        saved = tuple(-1 if t is None else known.get(id(t), -2) for t in ctx.saved)
        attributes = {name: value for name, value in vars(ctx).items() if name not in _OWN}
        key = saved, repr(sorted(attributes.items())), places, len(args)
        if ctx.is_special or -2 in saved or not _PLAIN.issuperset(map(type, attributes.values())):
            return None
        if key not in self._derivatives:
            rule = _Backward(self, attributes, places, len(args))
            rule.derivative = self.installed.derivative(saved, rule, rule.record)
            self._derivatives[key] = rule.derivative
        return self._derivatives[key]


_OWN = ("saved", "is_special", "needs_input_grad")
_PLAIN = {bool, int, float, str, type(None)}  # attributes of a ctx that a layout determines


class _Context:
    """The ``ctx`` of a call, of which only its saved tensors and plain attributes are kept."""

    def __init__(self) -> None:
        self.saved: tuple[Tensor | None, ...] = ()
        self.is_special = False
        self.needs_input_grad: tuple[bool, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved = tensors

    def _refuse(self, *_: object) -> None:
        self.is_special = True

    mark_non_differentiable = set_materialize_grads = save_for_forward = _refuse


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
        recorder = TapeRecorder([*grads, *saved], core.calls_python)
        with recording(recorder):
            found = self([*map(recorder.alias, saved)], needs, [*map(recorder.alias, grads)])
        tape = recorder.tape(found, passes_on=True)  # a gradient may be the incoming one
        self.player.refusal = recorder.refusal
        _watch_launches()
        if not recorder.is_being_tuned:
            self.player.installed.remember_backward(self.derivative, needs, grads, saved, tape)
        return found
