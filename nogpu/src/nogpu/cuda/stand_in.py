# SPDX-License-Identifier: MIT
"""Scripts that say "cuda", on a CPU: the device means the CPU, and `torch.cuda` answers for a GPU.

with cuda_is_cpu(gpu):
    x = torch.randn(1000, device="cuda")  # a tensor on the CPU, whose device is "cuda:0"
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import Thread
from types import ModuleType, SimpleNamespace
from typing import Any, ParamSpec, TypeGuard, TypeVar
from unittest.mock import patch
from uuid import UUID

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import graph
from torch.distributed import init_process_group
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad
from torch.optim import optimizer, swa_utils
from torch.overrides import TorchFunctionMode
from torch.utils import _device as default_device
from torch.utils import _foreach_utils, dlpack
from torch.utils._pytree import tree_leaves
from torch.utils.dlpack import from_dlpack
from torch.utils.hooks import unserializable_hook

from nogpu.cuda import places
from nogpu.cuda.libraries import CublasLt, CudaKernel
from nogpu.cuda.operations import tensors_in
from nogpu.cuda.types import Arguments, Attributes, Device, Function, Keywords
from nogpu.cuda.watcher import RAW_STREAM, Watcher
from nogpu.data_sheets import DATA_SHEETS, GPUS, MEMORY, REGISTERS, WARPS
from nogpu.decorating import context_manager
from nogpu.numba.numba_stand_in import emulate_numba
from nogpu.triton.driver import Driver
from nogpu.triton.emulator import SHARED_BYTES, Emulator
from nogpu.triton.host_memory import has_host_memory

P = ParamSpec("P")
T = TypeVar("T")

MIB = 2**20


def _on_cpu(value: T) -> T | str | torch.device:
    """Return the CPU for a CUDA device, by whatever name; other values unchanged."""
    if isinstance(value, str) and value.partition(":")[0] == "cuda":
        places.check_index(torch.device(value).index)
        return "cpu"
    if isinstance(value, str) and value.startswith("torch.cuda."):  # such as torch.cuda.FloatTensor
        return value.replace("torch.cuda.", "torch.")
    if isinstance(value, torch.device) and value.type == "cuda":
        places.check_index(value.index)
        return torch.device("cpu")
    return value


def _check_device(device: object = None) -> None:
    if isinstance(device, int):
        places.check_index(device if device >= 0 else None)  # a negative one is ignored
    else:
        _on_cpu(device)


def _on_device(value: T) -> T | str | torch.device:
    """Return the emulated device for a CUDA device, by whatever name; other values unchanged."""
    on_cpu = _on_cpu(value)
    return places.DEVICE if on_cpu is not value and _is_cpu(on_cpu) else on_cpu


def _pinned(t: Tensor, *args: object, **kwargs: object) -> Tensor:
    """Return a tensor of the host, or its copy, in memory that a GPU may access."""
    if places.is_on_device(t) or places.is_pinned(t):
        return t
    copy = t.clone()
    places.put(copy, False)
    places.pin(copy)
    return copy


def _interface(t: Tensor) -> dict[str, object]:
    """Return the interface by which Numba and CuPy take a tensor of the device."""
    if not places.is_on_device(t):
        raise AttributeError("a tensor of the host has no __cuda_array_interface__; call cuda()")
    dtype = t.detach().numpy().dtype
    strides = None if t.is_contiguous() else tuple(n * dtype.itemsize for n in t.stride())
    data = t.data_ptr() if t.numel() else 0, False
    return {
        "shape": tuple(t.shape),
        "strides": strides,
        "typestr": dtype.str,
        "data": data,
        "version": 2,
    }


# What functions say of which only a GPU has something to do.
INSTEAD: dict[Function, Function] = {
    Tensor.pin_memory: _pinned,
    Tensor.__cuda_array_interface__.__get__: _interface,
}
# By types that take any arguments, as the mode is given them.
MAKE_DEVICE: Function = torch.device
TO: Callable[..., Tensor] = Tensor.to
COPIES = (TO, Tensor.cpu, Tensor.cuda, Tensor.type_as)
CONVERSIONS = (torch.as_tensor, torch.asarray)
TYPE: Function = Tensor.type
NEW_TENSOR: Function = Tensor.new_tensor
# Copies to a tensor, and the position of their source among the arguments.
WRITES: dict[Function, int] = {Tensor.copy_: 1, Tensor.__setitem__: 2}


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes < 1 or tensor.dtype != torch.int64:  # which PyTorch infers, or refuses
        return torch.nn.functional.one_hot(tensor, num_classes)
    zeros = tensor.new_zeros(*tensor.shape, num_classes)
    return zeros.scatter_(-1, tensor.unsqueeze(-1), 1)


# A function whose second result PyTorch computes on the host.
PADDING = "_pad_packed_sequence"
# Functions that PyTorch composes of operators which read values on a CPU, and of others on a GPU.
ON_CUDA: dict[Function, Function] = {torch.nn.functional.one_hot: _one_hot}


class _OnCpu(TorchFunctionMode):
    """Functions of PyTorch whose device is CUDA take the CPU."""

    def __init__(self, watcher: Watcher):
        super().__init__()
        self.watcher = watcher
        self._lifted: list[bool] = []

    def __enter__(self) -> "_OnCpu":
        # Or torch.tensor would copy to the device a program names in C++, where no mode sees it.
        self._lifted.append(torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._lifted.pop())

    def __torch_function__(
        self,
        func: Function,
        types: Iterable[type],
        args: Arguments = (),
        kwargs: Keywords | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func in INSTEAD:
            return INSTEAD[func](*args, **kwargs)
        if func is MAKE_DEVICE:
            return _made_device(*args, **kwargs)
        given = {name: _on_device(value) for name, value in kwargs.items()}
        is_pinned = given.pop("pin_memory", False)  # of a factory
        index = given.get("device")
        if type(index) is int:
            places.check_index(index)
            given["device"] = places.DEVICE
        args = tuple(map(_on_device, args))
        _check_generator(args, given)
        self.watcher.function(func, args, given)
        if func in COPIES or (func in CONVERSIONS and _moves(args, given)):
            return self._copy(func, args, given)
        if func in WRITES:
            args = self._with_source(args, WRITES[func])
        if func is TYPE and not args[1:] and not kwargs and places.is_on_device(args[0]):
            return str(TYPE(args[0])).replace("torch.", "torch.cuda.")
        if self.watcher.is_capturing and func in ON_CUDA:
            func = ON_CUDA[func]
        before = places.enter_function(tensors_in((*args, *kwargs.values())))
        try:
            result: Any = func(*args, **given)
        finally:
            places.leave_function(before)
        if is_pinned:
            places.pin(result)
        if getattr(func, "__name__", "") == PADDING:
            padded, lengths = result
            return padded, self.watcher.on_host(lengths, tensors_in(args))
        self._note_places(func, args, given, result)
        return result

    def _note_places(
        self, func: Function, args: Arguments, kwargs: Keywords, result: object
    ) -> None:
        """Note where the results of a function are, if its operators do not say so."""
        named = [one for one in (*args, kwargs.get("device")) if _is_cpu(one)]
        if named:
            mark = True if torch.device(named[-1]) == places.DEVICE else _mark_of_name(named[-1])
            for t in tree_leaves(result):
                places.put(t, mark)
        elif func in FACTORIES and not tensors_in((*args, *kwargs.values())):
            places.put_results(tensors_in((result,)), self._default())
        elif func is TYPE and args[1:]:  # torch.cuda.FloatTensor is torch.FloatTensor here
            places.put(result, None)
        elif func is NEW_TENSOR:
            places.put(result, places.mark_of(args[0]))

    def _default(self) -> places.Mark:
        """Return where factories make tensors that name no device."""
        device = default_device.CURRENT_DEVICE
        if device is None and not self.watcher.has_default_type:
            return False
        return True if device is not None and device.type == "cuda" else None

    def _with_source(self, args: Arguments, position: int) -> Arguments:
        """Return the arguments of a copy whose source has followed to where it is copied to.

        So its gradient comes back. Autograd's own copy takes host and device for one.
        """
        to, source = args[0], args[position] if len(args) > position else None
        if not isinstance(source, Tensor) or not source.requires_grad or self.watcher.is_capturing:
            return args
        if places.is_on_device(to) is places.is_on_device(source) or not torch.is_grad_enabled():
            return args
        device = places.DEVICE if places.is_on_device(to) else places.HOST
        moved = self._copy(TO, (source,), {"device": device})
        return (*args[:position], moved, *args[position + 1 :])

    def _copy(self, func: Function, args: Arguments, kwargs: Keywords) -> Tensor:
        """Copy a tensor to the host or the device, if it is not there."""
        t, *others = args
        named = [one for one in (*others[:1], kwargs.get("device")) if _is_cpu(one)]
        is_host = func is Tensor.cpu or any(_mark_of_name(one) is False for one in named)
        func = TO if func in CONVERSIONS or func is Tensor.type_as else func
        if func is Tensor.cpu:
            others = [places.HOST]
        elif func is Tensor.cuda:
            _check_device(others.pop(0) if others else kwargs.pop("device", None))
            others = [places.DEVICE, *others]
        elif others and type(others[0]) is int:
            places.check_index(others[0])
            others[0] = places.DEVICE
        if func is not TO:  # whose arguments have another order
            names = ("device", "non_blocking", "memory_format")
            kwargs = {**dict(zip(names, others, strict=False)), **kwargs}
            kwargs = {name: value for name, value in kwargs.items() if value is not None}
            others = []
        before = places.DEVICE if places.is_on_device(t) else places.HOST
        after = _destination(others, kwargs)
        if after is None or not isinstance(t, Tensor) or not has_host_memory(t):
            return TO(t, *others, **kwargs)
        self.watcher.copy_between(
            t,
            before,
            after,
            _is_asynchronous(others, kwargs),
            _type_after(t, others, kwargs),
            kwargs.get("memory_format"),
        )
        # To the device that a tensor has it is itself, and to another one a copy.
        device = places.HOST if before == after else places.DEVICE
        others = [device if _is_cpu(one) else one for one in others]
        if "device" in kwargs:
            kwargs["device"] = device
        if others and isinstance(others[0], Tensor):
            others[0:1] = [device, others[0].dtype]
        result = TO(t, *others, **kwargs)
        if before != after or (func is TO and after == places.HOST):
            on_host = False if is_host else None
            places.put(result, True if after == places.DEVICE else on_host)
        if before != after:
            self._let_gradient_follow(result, before)
        return result

    def _let_gradient_follow(self, result: Tensor, device: torch.device) -> None:
        """Copy the gradient of a copy to where its source is, as autograd does on a GPU."""
        if result.requires_grad and not is_functorch_wrapped_tensor(result):
            back = {"device": device, "non_blocking": True}
            follow = unserializable_hook(lambda grad: self._copy(TO, (grad,), back))
            result.register_hook(follow)


# Functions whose results are on the host if no device is named.
FACTORIES = {
    *(torch.arange, torch.as_tensor, torch.asarray, torch.empty, torch.empty_strided, torch.eye),
    *(torch.full, torch.linspace, torch.logspace, torch.normal, torch.ones, torch.rand),
    *(torch.randint, torch.randn, torch.randperm, torch.scalar_tensor, torch.tensor, torch.zeros),
    *(torch.tril_indices, torch.triu_indices, torch.hann_window, torch.hamming_window),
}


def _moves(args: Arguments, kwargs: Keywords) -> bool:
    """Whether a conversion of a tensor, which may be that tensor itself, names a device."""
    is_given = kwargs.get("device") is not None and kwargs.keys() <= {"device", "dtype"}
    return is_given and len(args) == 1 and isinstance(args[0], Tensor)


def _is_cpu(value: object) -> TypeGuard[torch.device | str]:
    if isinstance(value, torch.device):
        return value.type == "cpu"
    return isinstance(value, str) and value == "cpu"


def _mark_of_name(device: object) -> places.Mark:
    """Return where a tensor on a device of the CPU is: on the host, unless nothing is known."""
    return None if device is places.UNKNOWN else False


def _made_device(*args: Any, **kwargs: Any) -> torch.device:
    """Make a device as a program asks for it; a number alone is that of a GPU."""
    if len(args) == 1 and type(args[0]) is int and not kwargs:
        return torch.device("cuda", args[0])
    return torch.device(*args, **kwargs)


def _destination(args: list[object], kwargs: Keywords) -> torch.device | None:
    """Return where `torch.Tensor.to` with these arguments puts a tensor; None if it stays."""
    for one in (*args[:1], kwargs.get("device"), kwargs.get("other")):
        if isinstance(one, Tensor):
            return places.DEVICE if places.is_on_device(one) else places.HOST
        if _is_cpu(one):
            return torch.device(one)
    return None


def _type_after(t: Tensor, args: list[object], kwargs: Keywords) -> torch.dtype:
    """Return the type that `torch.Tensor.to` with these arguments gives a tensor."""
    for one in (*args, kwargs.get("dtype"), kwargs.get("other")):
        if isinstance(one, Tensor):
            return one.dtype
        if isinstance(one, torch.dtype):
            return one
    return t.dtype


def _is_asynchronous(args: list[object], kwargs: Keywords) -> bool:
    flags = [one for one in args if type(one) is bool]  # non_blocking is before copy
    return bool(kwargs.get("non_blocking", flags[0] if flags else False))


class _Generator(torch.Generator):
    """A generator of the CPU, also where one of the device is asked for."""

    def __new__(cls, device: Device = "cpu") -> "_Generator":
        return super().__new__(cls, device=_on_cpu(device))  # type: ignore[call-arg]  # its stub has no arguments

    def __init__(self, device: Device = "cpu"):
        self.is_on_device = _on_device(device) == places.DEVICE

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return places.CUDA if self.is_on_device else places.HOST


def _check_generator(args: Arguments, kwargs: Keywords) -> None:
    """Refuse to draw random numbers of the device from a generator of the host, as PyTorch does."""
    generator = kwargs.get("generator")
    if not isinstance(generator, _Generator) or generator.is_on_device:
        return
    if kwargs.get("device") == places.DEVICE or any(map(places.is_on_device, args[:1])):
        raise RuntimeError(
            "Expected a 'cuda' device type for generator but found 'cpu'; make it by "
            "torch.Generator(device='cuda')"
        )


def _always(value: T) -> Callable[..., T]:
    return lambda *args, **kwargs: value


class _Device:
    """A block whose current device is the only one."""

    def __init__(self, device: Device | Tensor):
        _check_device(device)

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def _answers(emulator: Emulator) -> Attributes:
    """Return what `torch.cuda` says about the GPU."""
    major, minor = divmod(emulator.capability, 10)
    gpu = GPUS[emulator.capability]
    properties = SimpleNamespace(
        name=f"NVIDIA {gpu}",
        major=major,
        minor=minor,
        multi_processor_count=emulator.multiprocessors,
        total_memory=MEMORY[emulator.capability],
        shared_memory_per_block=49_152,
        shared_memory_per_block_optin=SHARED_BYTES[emulator.capability],
        shared_memory_per_multiprocessor=DATA_SHEETS[gpu].shared,
        regs_per_multiprocessor=REGISTERS,
        max_threads_per_multi_processor=32 * WARPS,
        max_threads_per_block=1024,
        warp_size=32,
        L2_cache_size=DATA_SHEETS[gpu].l2 * MIB,
        gcnArchName="",
        is_integrated=0,
        is_multi_gpu_board=0,
        clock_rate=round(DATA_SHEETS[gpu].ghz * 10**6),  # kHz
        uuid=UUID(int=0),  # nvidia-smi knows no GPU of this number
    )
    memory = MEMORY[emulator.capability]
    return {
        "is_available": _always(True),
        "is_initialized": _always(True),
        "init": _always(None),
        "_lazy_init": _always(None),
        "device_count": _always(1),
        "current_device": _always(0),
        "set_device": _check_device,
        "device": _Device,
        "device_of": _Device,
        "get_device_capability": _always((major, minor)),
        "get_device_name": _always(properties.name),
        "get_device_properties": _always(properties),
        "get_arch_list": _always([emulator.arch]),
        "is_bf16_supported": _always(True),
        "_compile_kernel": CudaKernel,
        # Memory
        "empty_cache": _always(None),
        "ipc_collect": _always(None),
        "mem_get_info": _always((memory, memory)),
        "memory_allocated": _always(0),
        "max_memory_allocated": _always(0),
        "memory_reserved": _always(0),
        "max_memory_reserved": _always(0),
        "memory_stats": lambda *args: Counter(),  # 0 by any name
        "memory_summary": _always("the memory is the CPU's"),
        "reset_peak_memory_stats": _always(None),
        "reset_accumulated_memory_stats": _always(None),
        "reset_max_memory_allocated": _always(None),
        "reset_max_memory_cached": _always(None),
        # Random numbers, which are the CPU's
        "seed": lambda: torch.default_generator.seed() and None,
        "seed_all": lambda: torch.default_generator.seed() and None,
        "initial_seed": torch.initial_seed,
        "get_rng_state": lambda device=0: torch.get_rng_state(),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state": lambda state, device=0: torch.set_rng_state(state),
        "set_rng_state_all": lambda states: torch.set_rng_state(states[0]),
        **{name: getattr(torch, name) for name in TENSORS},
    }


TENSORS = (
    *("BoolTensor", "ByteTensor", "CharTensor", "ShortTensor", "IntTensor", "LongTensor"),
    *("HalfTensor", "BFloat16Tensor", "FloatTensor", "DoubleTensor"),
)
# What `torch.accelerator` says as `torch.cuda` does.
OF_ACCELERATOR = (
    *("is_available", "device_count", "synchronize", "current_stream", "set_stream"),
    *("empty_cache", "memory_stats", "memory_allocated", "max_memory_allocated"),
    *("memory_reserved", "max_memory_reserved", "reset_peak_memory_stats"),
    "reset_accumulated_memory_stats",
)


def _of_accelerator(cuda: Attributes) -> Attributes:
    """Return what `torch.accelerator` says about the GPU."""
    return {
        **{name: cuda[name] for name in OF_ACCELERATOR},
        "current_accelerator": _always(torch.device("cuda")),
        "current_device_index": _always(0),
        "current_device_idx": _always(0),
        "set_device_index": _always(None),
        "set_device_idx": _always(None),
        "get_memory_info": cuda["mem_get_info"],
    }


def _autocasts() -> Attributes:
    """Return functions that ask and set the CPU's autocast for that of CUDA, also by default."""

    def of_cpu(function: Callable[..., T]) -> Callable[..., T]:
        return lambda device_type="cuda", *args: function(_on_cpu(device_type), *args)

    names = ("is_autocast_enabled", "get_autocast_dtype", "set_autocast_dtype")
    return {name: of_cpu(getattr(torch, name)) for name in names}


def _autocast_on_cpu(make: Callable[..., None]) -> Callable[..., None]:
    """Let an autocast of CUDA be that of the CPU, with the type that CUDA's has by default."""

    def init(
        self: torch.autocast,
        device_type: str,
        dtype: torch.dtype | None = None,
        *args: object,
        **kwargs: object,
    ) -> None:
        if _on_cpu(device_type) != device_type:
            device_type, dtype = "cpu", dtype or torch.float16
        make(self, device_type, dtype, *args, **kwargs)

    return init


def _storage_tag(storage: Any) -> str | None:
    """Return where `torch.save` says that a storage was."""
    return str(places.CUDA) if getattr(storage, places.MARK, None) else None


def _restored(storage: Any, location: str) -> Any:
    """Put a storage that `torch.load` reads to a place, if it is one of the stand-in."""
    if location.partition(":")[0] == "cuda":
        places.check_index(torch.device(location).index)
    elif location != "cpu":
        return None
    setattr(storage, places.MARK, location != "cpu")
    return storage


@contextmanager
def _saving_places() -> Iterator[None]:
    """Let `torch.save` and `torch.load` know the places of tensors."""
    first = (-1, _storage_tag, _restored)  # before PyTorch's own, which asks its C++
    registry = torch.serialization._package_registry
    registry.insert(0, first)
    try:
        yield
    finally:
        registry.remove(first)


def _of_host(make: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Let it be known of a function's results that they are on the host."""

    def made(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        result = make(*args, **kwargs)
        places.put(result, False)
        return result

    return made


def _shared(given: object, **options: Any) -> Tensor:
    """Make a tensor of the memory of another one, as `torch.from_dlpack`; it is where that is."""
    result: Tensor = from_dlpack(given, **options)
    places.put(result, places.mark_of(given))
    return result


def _with_index(make: Callable[..., None]) -> Callable[..., None]:
    """Let the default device have its number, for which PyTorch's C++ would ask CUDA."""

    def init(self: default_device.DeviceContext, device: Device) -> None:
        make(self, device)
        if self.device.type == "cuda":
            places.check_index(self.device.index)
            self.device = places.CUDA

    return init


def _with_type(set_type: Function, watcher: Watcher) -> Function:
    """Let factories be on the device, perhaps, after a script has set the default type."""

    def set_default(t: object) -> None:
        watcher.has_default_type = True
        set_type(_on_cpu(t))

    return set_default


def _without_devices(make: Callable[..., None], watcher: Watcher) -> Callable[..., None]:
    """Let DistributedDataParallel take the CPU where a script names a device; note its stream."""

    def init(
        self: DistributedDataParallel,
        module: torch.nn.Module,
        device_ids: Sequence[Device] | None = None,
        output_device: Device = None,
        **kwargs: object,
    ) -> None:
        for device in (*(device_ids or ()), output_device):
            _check_device(device)
        make(self, module, **kwargs)
        watcher.context.streams.of_modules[self] = watcher.context.streams.current

    return init


def _by_gloo(make: Callable[..., None]) -> Callable[..., None]:
    """Let processes that ask for NCCL talk by gloo."""

    def init(
        backend: str | None = None, *args: object, device_id: Device = None, **kwargs: object
    ) -> None:
        _check_device(device_id)
        is_of_device = backend is None or "nccl" in str(backend)
        make("gloo" if is_of_device else backend, *args, **kwargs)

    return init


def _fork_of_cpu(fork: Callable[..., T]) -> Callable[..., T]:
    """Let `torch.random.fork_rng` keep the CPU's state alone."""
    return lambda devices=None, enabled=True, **kwargs: fork([], enabled)


def _with_mode(function: Callable[P, T], watcher: Watcher) -> Callable[P, T]:
    """Let a function call back with the mode, which PyTorch leaves before it calls it."""

    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with _OnCpu(watcher):
            return function(*args, **kwargs)

    return call


def _start_with_mode(start: Callable[[Thread], None], watcher: Watcher) -> Callable[[Thread], None]:
    """Let new threads have the mode, because each thread has modes of its own."""

    def started(thread: Thread) -> None:
        thread.run = _with_mode(thread.run, watcher)  # type: ignore[method-assign]
        start(thread)

    return started


GROUPS = "_group_tensors_by_device_and_dtype"
GROUPING = (_foreach_utils, clip_grad, optimizer, swa_utils)  # modules that have the function


# What the function is given and returns: the tensors, and their indices in the lists.
Lists = Sequence[Sequence[Tensor | None]]
Groups = dict[tuple[torch.device, torch.dtype], tuple[Lists, Sequence[int]]]


def _grouped(module: ModuleType) -> Attributes:
    """Return the function that groups tensors, which groups them by where they would be."""
    group: Callable[[Lists, bool], Groups] = getattr(module, GROUPS)

    def grouped(lists: Lists, with_indices: bool = False) -> Groups:
        found = group(lists, with_indices)
        first = lists[0][0] if lists and lists[0] else None
        if first is None:
            return found
        return {(places.device_of(first), dtype): one for (_, dtype), one in found.items()}

    return {GROUPS: grouped}


CUDA_VERSION = "13.0"  # said where PyTorch is built without CUDA
MAKE_DDP = DistributedDataParallel.__init__
INIT_DEFAULT = default_device.DeviceContext.__init__
# The versions of torch that the names below were read in.
MADE_FOR = ("2.11", "2.14")
# Names that some of these versions lack, and a version without them. A test fails for another name
# that the installed version lacks: a script that asks by its new name would ask PyTorch itself.
LACKING = {"_cuda_graph_capture_health_check": "2.11"}


def replacements(emulator: Emulator, watcher: Watcher) -> list[tuple[object, Attributes]]:
    """Return what is replaced: modules and classes, and their attributes by name."""
    import triton
    from triton._C.libtriton import nvidia

    def bench(
        call: Callable[[], object],
        *args: object,
        quantiles: Sequence[float] | None = None,
        return_mode: str = "mean",
        **kwargs: object,
    ) -> float | list[float]:
        call()
        return [1.0] * len(quantiles) if quantiles else [1.0] if return_mode == "all" else 1.0

    cuda = _answers(emulator) | watcher.answers()
    autocast = torch.amp.autocast_mode.autocast
    return [
        (torch.cuda, cuda),
        (torch.accelerator, _of_accelerator(cuda)),
        (torch, {"Generator": _Generator, **_autocasts()}),
        (torch, {"from_numpy": _of_host(torch.from_numpy)}),
        (torch, {"from_dlpack": _shared}),
        (dlpack, {"from_dlpack": _shared}),
        (torch.version, {"cuda": torch.version.cuda or CUDA_VERSION}),
        (torch.backends.cudnn, {"is_acceptable": _always(False)}),  # its kernels are a GPU's
        (default_device.DeviceContext, {"__init__": _with_index(INIT_DEFAULT)}),
        (torch, {"set_default_tensor_type": _with_type(torch.set_default_tensor_type, watcher)}),
        # Functions of PyTorch's, within which there is no mode, ask for the device, too.
        (Tensor, {"device": property(places.device_of), "get_device": places.index_of}),
        (Tensor, {"is_cuda": property(places.is_cuda), "is_cpu": property(places.is_cpu)}),
        (Tensor, {"record_stream": lambda t, stream: None}),
        *((module, _grouped(module)) for module in GROUPING),
        (torch.random, {"fork_rng": _fork_of_cpu(torch.random.fork_rng)}),
        (DistributedDataParallel, {"__init__": _without_devices(MAKE_DDP, watcher)}),
        (torch.distributed, {"init_process_group": _by_gloo(init_process_group)}),
        (autocast, {"__init__": _autocast_on_cpu(autocast.__init__)}),
        (torch.autograd, {"_engine_run_backward": _with_mode(graph._engine_run_backward, watcher)}),
        (Thread, {"start": _start_with_mode(Thread.start, watcher)}),
        *watcher.changes(),
        (emulator, {"watcher": watcher}),
        (Driver, {"get_active_torch_device": _always(places.CUDA)}),
        (Driver, {"get_device_interface": _always(torch.cuda), "get_current_device": _always(0)}),
        (nvidia.cublas, {"CublasLt": CublasLt}),
        (triton.testing, {"do_bench": bench, "do_bench_cudagraph": bench}),
    ]


def missing_names(changes: list[tuple[object, Attributes]]) -> list[str]:
    """Return the names that the installed versions lack, some of which `LACKING` explains."""
    return [
        f"{getattr(place, '__name__', place)}.{name}"
        for place, attributes in changes
        for name in attributes
        if not hasattr(place, name) and name not in (*LACKING, RAW_STREAM)
    ]


@context_manager("cuda_is_cpu")
def cuda_is_cpu(emulator: Emulator) -> Iterator[None]:
    """Let the block's "cuda" be the CPU, on which ``emulator`` executes the launches."""
    watcher = Watcher(emulator)
    watcher.program = lambda: _OnCpu(watcher)
    with ExitStack() as stack:
        for place, attributes in replacements(emulator, watcher):
            for name, value in attributes.items():
                is_made = name == RAW_STREAM
                if is_made or hasattr(place, name):  # `LACKING` says which may be missing
                    stack.enter_context(patch.object(place, name, value, create=is_made))
        stack.callback(optimizer.register_optimizer_step_post_hook(watcher.note_step).remove)
        stack.enter_context(_saving_places())
        stack.enter_context(emulate_numba(emulator))
        stack.enter_context(_OnCpu(watcher))
        yield
