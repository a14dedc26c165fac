# SPDX-License-Identifier: MIT
"""`record`: write checksums of what each step of a training computes.

PyTorch's hooks for all modules and all optimizers tell of a step. Nothing of the program changes:
no tensor is kept, and no value is read before the step ends.
"""

import gc
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.modules import module as all_modules
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchpar.decorating import context_manager
from torchpar.exact.divergence.checksums import (
    WHOLE,
    DeviceRows,
    HostRows,
    Reading,
    share,
)
from torchpar.exact.divergence.recorded_files import Described, RunFile
from torchpar.library.sharding import local

STATES = 8  # of an optimizer's parameters, one of so many has its state recorded in a step
IN_SHARES = {"activation", "activation's gradient"}  # kinds of which a step adds a share
# Steps, and rows of sums, after which ended steps are written: it costs less for several at once.
_STEPS_AT_ONCE, _ROWS_AT_ONCE = 8, 128
_COMPILED = r"Using `torch.compile\(module\)` when there are global hooks"


@context_manager("torchpar.exact.record")
def record(path: str | os.PathLike[str], *, operators: bool = False) -> Iterator[None]:
    """Record checksums of each step of a training, in exact arithmetic or not.

        with torchpar.exact.record("run1"):
            train()

    ``python -m torchpar compare run1 run2`` names the first tensor in which two runs differ.

    A step begins with the first call of a module, or of `backward`, after an optimizer's step. It
    has checksums of:

    - the weights and buffers of each module, when the step begins;
    - the tensors that are given to modules by position, but for modules in other modules;
    - the results of each module, and their gradients;
    - the tensors on which `backward` is called, such as the loss;
    - the gradients of parameters, as an optimizer gets them, and its settings, such as the rate;
    - the optimizer's state after its step: all of it in its first step, and in each later step
      that of an eighth of the parameters.

    A module that `torch.compile` has compiled shows its results, and not those of modules in it;
    one that ``module.compile()`` has compiled shows its weights. A step that is compiled as a
    whole, with its backward pass, shows nothing. A step of `torchpar.training.graphed` that is
    replayed shows its inputs, results, weights, settings and state. Tensors without memory of their
    own, and sparse tensors, are not recorded.

    Of a result or its gradient above 64 KiB, a step has the checksum of 64 KiB that are spread over
    it, and the next step of others. On a GPU checksums stay there until the step ends, and the host
    reads them a step later.

    Args:
        path: a folder, in which each rank writes a file; files of an earlier run are replaced.
        operators: also record the results of each of PyTorch's operators that is called, except
            for views, and record large tensors as a whole. A step then takes several times as long.
            In a mode that `torchpar.exact.mode` begins within the block, these are the operators of
            which its rules consist. So begin both in the same order in each run.

    Raises:
        ConfigError: a file cannot be written, or another block is recording to the path.
    """
    recorder = _Recorder(Path(path), is_whole=operators)
    with ExitStack() as stack:
        stack.callback(recorder.file.close)
        recorder.watch(stack)
        if operators:
            stack.enter_context(_Operators(recorder))
        try:
            yield
        except BaseException:
            with suppress(Exception):  # such as an error of the GPU, which each call repeats
                recorder.end(by_error=True)
            raise
        recorder.end()


def machine() -> dict[str, object]:
    """On what a run's bits depend outside of the exact mode, by `recorded_files.OF_MACHINE`."""
    return {
        "torch": torch.__version__,
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


class _Recorder:
    def __init__(self, folder: Path, is_whole: bool):
        self._is_whole = is_whole
        is_initialized = dist.is_available() and dist.is_initialized()
        # A launcher sets these before the ranks are connected.
        rank = dist.get_rank() if is_initialized else int(os.environ.get("RANK", "0"))
        ranks = dist.get_world_size() if is_initialized else int(os.environ.get("WORLD_SIZE", "1"))
        head = {"ranks": ranks, "operators": is_whole, **machine()}
        self.file = RunFile(folder, rank, head)
        self._process = os.getpid()
        self._numbers: dict[tuple[object, ...], int] = {}  # of tensors in the file
        self._names = _Names()
        self._running: list[str] = []  # modules whose forward pass is under way
        self._last_result: Callable[[], Tensor | None] = lambda: None
        self._last_version, self._last_place = 0, 0
        self._host, self._devices = HostRows(), dict[torch.device, DeviceRows]()
        self._ended: list[_Step] = []  # steps that are not written yet
        self._step = _Step(0)
        self._has_begun = False
        self._stepped: set[int] = set()  # optimizers of this step
        self._with_settings: set[int] = set()  # groups of parameters whose settings the step has
        self._with_gradients: set[int] = set()  # parameters whose gradients it has
        self._with_states: set[int] = set()
        self._steps_of: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._settings: WeakKeyDictionary[Optimizer, _Settings] = WeakKeyDictionary()
        self.is_busy = False  # with operators of its own

    # What is watched

    def watch(self, stack: ExitStack) -> None:
        """Register the hooks, until ``stack`` is closed."""
        for hook in (
            all_modules.register_module_forward_pre_hook(self._enter),
            all_modules.register_module_forward_hook(self._leave, always_call=True),
            register_optimizer_step_pre_hook(self._before_update),
            register_optimizer_step_post_hook(self._after_update),
        ):
            stack.callback(hook.remove)
        stack.enter_context(_replaced_engine(self._backward))
        # To import torchpar.training takes a second, which other users of torchpar.exact save.
        from torchpar.training.graphed import around_replays

        around_replays.append(self._replay)
        stack.callback(around_replays.remove, self._replay)
        # It says that hooks see the results of a compiled module, as is meant.
        warnings.filterwarnings("ignore", _COMPILED, UserWarning)
        stack.callback(_forget_filter, warnings.filters[0])

    def _is_off(self) -> bool:
        """Whether a compiler traces the hook, or a graph captures it, or this is a worker."""
        return (
            torch.compiler.is_compiling()
            or os.getpid() != self._process
            or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
        )

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self._is_off():
            return
        self.begin()
        name = self._names.of_module(module)
        if name is None:
            name = self._register(module)
        if not self._running:
            for i, t in enumerate(_tensors(args)):
                self.note("input", f"{i} of {name}", t)
        self._running.append(name)

    def _leave(self, module: nn.Module, _: Any, result: Any) -> None:
        if self._is_off() or not self._running:
            return
        name = self._running.pop()
        # PyTorch calls this hook with None after an error.
        tensors = [result] if isinstance(result, Tensor) else _tensors(result)
        for i, t in enumerate(tensors):
            of_several = name if result is t else f"{name}[{i}]"
            version = 0 if t.is_inference() else t._version
            # A module often returns the result of the last module in it.
            is_known = t is self._last_result() and version == self._last_version
            self._last_result, self._last_version = ref(t), version
            before = self._last_place if is_known else None
            self._last_place = len(self._step.tensors)
            self.note("activation", of_several, t, module, same_as=before)
            if t.requires_grad and not is_known:
                t.register_hook(partial(self._note_gradient, of_several))

    def _note_gradient(self, name: str, gradient: Tensor) -> None:
        if not self._is_off():
            self.note("activation's gradient", name, gradient)

    @contextmanager
    def _backward(self, outputs: Sequence[Tensor]) -> Iterator[None]:
        if self._is_off():
            yield
            return
        self.begin()
        for i, t in enumerate(outputs):
            self.note("loss", str(i), t, None)
        self._running.append("the backward pass")
        try:
            yield
        finally:
            del self._running[-1:]  # an error may have ended the step

    def _before_update(self, optimizer: Optimizer, *_: object) -> None:
        if self._is_off():
            return
        if not self._has_begun or id(optimizer) in self._stepped:
            self.begin()
        self._running.append(f"{type(optimizer).__name__}.step")
        if self._with_settings.issuperset(map(id, optimizer.param_groups)):
            return  # an optimizer of a chain, whose groups are the chain's, too
        self._with_settings.update(map(id, optimizer.param_groups))
        parameters = list(_parameters(optimizer))
        if any(self._names.of_parameter(p) is None for p in parameters):
            for root in _roots_of(parameters):
                self._register(root)
            for i, p in enumerate(parameters):
                if self._names.of_parameter(p) is None:
                    name = f"{i} of {type(optimizer).__name__}"
                    self.note("weight", self._names.add_parameter(p, name), p)
        for p in parameters:
            if p.grad is not None and id(p) not in self._with_gradients:
                self._with_gradients.add(id(p))  # a chain has them, and its optimizers
                self.note("gradient", self._names.of_parameter(p) or "", p.grad)
        self._note_settings(optimizer)

    def _note_settings(self, optimizer: Optimizer) -> None:
        groups = optimizer.param_groups
        kinds = [(*group, *map(type, group.values())) for group in groups]
        known = self._settings.get(optimizer)
        if known is None or known.kinds != kinds:  # nearly always those of the step before
            known = self._settings[optimizer] = _Settings(optimizer, kinds, self._setting)
        self._step.add_numbers(known.numbers, [groups[i][key] for i, key in known.places])
        for i, key in known.others:
            name, value = known.name(i, key), groups[i][key]
            for one in value if isinstance(value, tuple) else (value,):
                if isinstance(one, Tensor):
                    self.note("setting", f"tensor {name}", one)
                elif isinstance(one, int | float) and not isinstance(one, bool):
                    self._step.add_numbers([self._setting(name)], [one])

    def _after_update(self, optimizer: Optimizer, *_: object) -> None:
        if self._is_off():
            return
        del self._running[-1:]
        count = self._steps_of.get(optimizer, 0)
        for i, p in enumerate(_parameters(optimizer)):
            if id(p) in self._with_states or (count and (count - i) % STATES):
                continue
            self._with_states.add(id(p))
            for key, value in optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor):
                    self.note("state", f"{key} of {self._names.of_parameter(p)}", value)
        self._steps_of[optimizer] = count + 1
        self._stepped.add(id(optimizer))

    @contextmanager
    def _replay(
        self, optimizers: Sequence[Optimizer], inputs: object, outputs: object
    ) -> Iterator[None]:
        """Note a step that is replayed in the block, and then has these inputs and outputs."""
        self.begin()
        self._step.is_replayed = True
        yield
        for kind, tensors in {"input": inputs, "loss": outputs}.items():
            for i, t in enumerate(_tensors(tensors)):
                self.note(kind, f"{i} of the graph", t)
        for one in optimizers:
            self._note_settings(one)
            self._after_update(one)

    # Steps

    def begin(self) -> None:
        """Begin a step, if there is none yet, or if an optimizer has ended it."""
        if self._stepped:
            self._end_step()
        if not self._has_begun:
            self._has_begun = True
            for name, t in self._names.weights():
                self.note("weight", name, t)

    def _end_step(self) -> None:
        step, self._step = self._step, _Step(self._step.number + 1)
        self._stepped.clear()
        self._with_settings.clear()
        self._with_gradients.clear()
        self._with_states.clear()
        self._running.clear()
        self._last_result = lambda: None  # its place is in the step that ends
        self._has_begun = False
        step.end(self._devices)
        self._ended.append(step)
        if self._devices or len(self._ended) == _STEPS_AT_ONCE or len(self._host) >= _ROWS_AT_ONCE:
            self._write_steps(len(self._ended) - bool(step.readings))

    def _write_steps(self, count: int) -> None:
        """Write the first of the steps that have ended, and take the sums of all."""
        sums = self._host.take()
        first = 0
        for step in self._ended:
            if step.of_host is None:
                step.of_host = sums[first : first + len(step.on_host)]
                first += len(step.on_host)
        for step in self._ended[:count]:
            self.file.add_step(
                step.number, step.tensors, step.checksums(), step.is_broken, step.is_replayed
            )
        del self._ended[:count]
        self.file.write()

    def end(self, by_error: bool = False) -> None:
        """Write the last step, and the weights that it has left."""
        if self._stepped:
            self.begin()
        else:
            self._step.is_broken = by_error
        if self._step.tensors:
            self._end_step()
        self._write_steps(len(self._ended))

    def _register(self, module: nn.Module) -> str:
        """Note the weights of a module that is called for the first time; return its name."""
        for name, t in self._names.add(module):
            self.note("weight", name, t)
        return self._names.of_module(module) or type(module).__name__

    # Tensors

    def note(
        self,
        kind: str,
        name: str,
        t: Tensor,
        by: nn.Module | str | None = "",
        same_as: int | None = None,
    ) -> None:
        """Add a tensor's checksum to the step.

        Args:
            by: what made it; of a module, or None, the operator that autograd knows is added.
            same_as: the place of a tensor that it equals.
        """
        t = local(t)
        with torch._C.DisableTorchFunction():  # modes would be asked for each attribute
            try:
                start, size = t.data_ptr(), t.nbytes
            except RuntimeError:  # sparse and fake tensors, and those of torch.func
                return
            if t.is_meta:
                return
            key = kind, name, t.shape, t.dtype, by if isinstance(by, str) else ""
            is_plain = t.is_contiguous() and not t.is_conj()
            device = None if t.is_cpu else t.device
        part = WHOLE
        if kind in IN_SHARES and not self._is_whole:
            part = share(size, self._step.number)
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self._numbers)
            by = by if isinstance(by, str) else _made_by(by, t)
            dtype = str(t.dtype).removeprefix("torch.")
            self.file.add_tensor(number, Described(kind, name, tuple(t.shape), dtype, by))
        if same_as is not None:
            self._step.add_again(number, same_as)
            return
        self.is_busy = True
        try:
            if not is_plain:
                t = t.detach().resolve_conj().contiguous()
                with torch._C.DisableTorchFunction():
                    start = t.data_ptr()
            if device is None:
                self._host.add(start, size, part)
            else:
                if device not in self._devices:
                    self._devices[device] = DeviceRows(device)
                self._devices[device].add(t.detach(), part)
        finally:
            self.is_busy = False
        self._step.add(number, device)

    def note_operator(self, operator: str, results: object, line: str) -> None:
        if self._is_off():
            return
        where = self._running[-1] if self._running else "the program"
        for t in _tensors(results):
            self.note("operator", f"{operator} in {where}", t, line)

    def _setting(self, name: str) -> int:
        """The number in the file of a setting that is a number."""
        key = "setting", name
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self._numbers)
            self.file.add_tensor(number, Described("setting", name, (), "float64", ""))
        return number


class _Settings:
    """Places of the numbers in an optimizer's settings, found once and not in each step.

    Attributes:
        kinds: of each group, its keys and the types of its values.
        numbers: in the file, of settings that are one number each.
        places: the group and the key of each of these.
        others: groups and keys of tensors, and of tuples of numbers.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        kinds: list[tuple[object, ...]],
        number_of: Callable[[str], int],
    ):
        self.kinds, self._class = kinds, type(optimizer).__name__
        self.places: list[tuple[int, str]] = []
        self.others: list[tuple[int, str]] = []
        for i, group in enumerate(optimizer.param_groups):
            for key, value in group.items():
                if type(value) in (int, float):
                    self.places.append((i, key))
                elif isinstance(value, int | float | tuple | Tensor) and not isinstance(
                    value, bool
                ):
                    self.others.append((i, key))
        self.numbers = [number_of(self.name(i, key)) for i, key in self.places]

    def name(self, group: int, key: str) -> str:
        return f"{key} of group {group} of {self._class}"


class _Step:
    """The tensors of a step, and where their checksums are."""

    def __init__(self, number: int):
        self.number = number
        self.is_broken = False  # by an error of the program
        self.is_replayed = False  # by a CUDA graph
        self.tensors: list[int] = []
        self.on_host: list[int] = []  # places of tensors on the CPU
        self.on_devices: dict[torch.device, list[int]] = {}
        self.values: list[float] = []  # numbers that are no tensors
        self.places_of_values: list[int] = []
        self.again: list[tuple[int, int]] = []  # a place, and that of the same tensor before it
        self.of_host: NDArray[np.uint64] | None = None  # checksums, once they are taken
        self.readings: list[tuple[list[int], Reading]] = []

    def add(self, tensor: int, device: torch.device | None) -> None:
        """Add a tensor; its device is None on the host."""
        places = self.on_host if device is None else self.on_devices.setdefault(device, [])
        places.append(len(self.tensors))
        self.tensors.append(tensor)

    def add_again(self, tensor: int, before: int) -> None:
        self.again.append((len(self.tensors), before))
        self.tensors.append(tensor)

    def add_numbers(self, tensors: Sequence[int], values: Sequence[float]) -> None:
        self.places_of_values += range(len(self.tensors), len(self.tensors) + len(tensors))
        self.values += values
        self.tensors += tensors

    def end(self, devices: Mapping[torch.device, DeviceRows]) -> None:
        """Begin to copy the sums that are on devices."""
        self.readings = [
            (places, devices[device].end_step()) for device, places in self.on_devices.items()
        ]

    def checksums(self) -> NDArray[np.uint64]:
        """Wait for the devices' rows; return a number for each tensor."""
        result = np.zeros(len(self.tensors), np.uint64)
        if self.on_host and self.of_host is not None:
            result[self.on_host] = self.of_host
        for places, reading in self.readings:
            result[places] = reading.checksums()
        if self.values:
            result[self.places_of_values] = np.array(self.values, np.float64).view(np.uint64)
        for place, before in self.again:
            result[place] = result[before]
        return result


class _Names:
    """Names of modules, their weights, and an optimizer's parameters.

    The first module with weights that is called has the names of its own `named_parameters`. Before
    the names of another stands its class, and a number if there are several.
    """

    def __init__(self) -> None:
        self._modules: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        self._weights: WeakKeyDictionary[nn.Module, list[tuple[str, dict[str, Any], str]]]
        self._weights = WeakKeyDictionary()  # of each root: name, and where the module has it
        self._parameters: dict[int, str] = {}
        self._loose: dict[int, tuple[ref[Tensor], str]] = {}  # parameters of no module
        self._classes: dict[str, int] = {}

    def of_module(self, module: nn.Module) -> str | None:
        return self._modules.get(module)

    def of_parameter(self, p: Tensor) -> str | None:
        return self._parameters.get(id(p))

    def add_parameter(self, p: Tensor, name: str) -> str:
        self._loose[id(p)] = ref(p), name
        self._parameters[id(p)] = name
        return name

    def add(self, root: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Name a module and all modules in it; yield the weights that were not known."""
        kind = type(_unwrapped(root)).__name__
        if next(chain(root.parameters(), root.buffers()), None) is None:
            return  # a program may make such modules again and again
        count = self._classes[kind] = self._classes.get(kind, 0) + 1
        label = f"{kind} {count}" if count > 1 else kind
        prefix = f"{label}." if self._weights else ""
        places = self._weights[root] = []
        for path, module in root.named_modules():
            if module in self._modules:
                continue
            path = _plain(path)
            self._modules[module] = f"{prefix}{path}" if path else label
            start = f"{prefix}{path}." if path else prefix
            for own in (module._parameters, module._buffers):
                places += [(f"{start}{key}", own, key) for key in own]
        yield from self._weights_at(places)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The present weights and buffers of all modules that have been called."""
        self._parameters.clear()
        for places in list(self._weights.values()):
            yield from self._weights_at(places)
        for p, name in list(self._loose.values()):
            if (t := p()) is not None and id(t) not in self._parameters:
                yield self.add_parameter(t, name), t

    def _weights_at(
        self, places: Iterable[tuple[str, dict[str, Any], str]]
    ) -> Iterator[tuple[str, Tensor]]:
        for name, own, key in places:
            t = own.get(key)
            if t is not None and id(t) not in self._parameters:
                self._parameters[id(t)] = name
                yield name, t


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module that DistributedDataParallel and torch.compile wrap."""
    while True:
        inner = module._modules.get("_orig_mod")
        if isinstance(module, DistributedDataParallel):
            inner = module.module
        if inner is None:
            return module
        module = inner


def _plain(path: str) -> str:
    """A module's path without the names that a wrapper adds."""
    return f"{path}.".replace("_orig_mod.", "").removeprefix("module.").removesuffix(".")


def _forget_filter(ours: object) -> None:
    if ours in (filters := warnings.filters):
        assert isinstance(filters, list)
        filters.remove(ours)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if type(value) is tuple and all([isinstance(one, Tensor) for one in value]):
        return list(value)
    return [one for one in tree_leaves(value) if isinstance(one, Tensor)]


def _made_by(module: nn.Module | None, t: Tensor) -> str:
    """The class of a module, and the operator that autograd knows to have made its result."""
    node = t.grad_fn
    operator = node.name().partition("Backward")[0] if node is not None else ""
    return ", ".join(filter(None, (type(module).__name__ if module else "", operator)))


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _roots_of(parameters: Iterable[Tensor]) -> list[nn.Module]:
    """The modules with one of these parameters that are in no other module.

    They were not called in the recording: ``module.compile()`` calls no hooks, nor does a step that
    computes gradients by hand.
    """
    # The type is asked first: an attribute of another object may compute.
    modules = [one for one in gc.get_objects() if issubclass(type(one), nn.Module)]
    inner = {id(child) for one in modules for child in one._modules.values()}
    wanted = set(map(id, parameters))
    return [
        one
        for one in modules
        if id(one) not in inner and not wanted.isdisjoint(map(id, one.parameters()))
    ]


@contextmanager
def _replaced_engine(
    around: Callable[[Sequence[Tensor]], AbstractContextManager[None]],
) -> Iterator[None]:
    """Enter a context around each backward pass, for which PyTorch has no hook."""
    name = "_engine_run_backward"  # as torchpar.exact.within does
    engine = getattr(torch.autograd, name)

    def run(outputs: Sequence[Tensor], *args: object, **kwargs: object) -> object:
        with around(outputs):
            return engine(outputs, *args, **kwargs)

    setattr(torch.autograd, name, run)
    try:
        yield
    finally:
        if getattr(torch.autograd, name) is run:  # another library may have replaced it meanwhile
            setattr(torch.autograd, name, engine)


class _Operators(TorchDispatchMode):
    """Note the results of each operator that is called in the block."""

    sees_launches = True  # operators of torchpar launch their kernels
    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __init__(self, recorder: _Recorder):
        from torchpar.training.step_effects import program_line  # late, as in `watch`

        super().__init__()
        self._recorder, self._line = recorder, program_line

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if not self._recorder.is_busy and _has_own_results(func):
            self._recorder.note_operator(str(func), result, self._line())
        return result


@cache
def _has_own_results(func: Any) -> bool:
    """Whether an operator's results are defined when it returns, and are no views."""
    if not isinstance(func, OpOverload):  # of higher order
        return False
    is_collective = func.namespace in ("c10d", "_c10d_functional")  # which goes on meanwhile
    return not (func.is_view or is_collective or "empty" in func._schema.name)
