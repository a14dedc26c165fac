# SPDX-License-Identifier: MIT
"""The settings of this process that a call must leave as they were: PyTorch's, Python's, NumPy's.

`Settings` holds their values at one time. `EVERY` lists them by the names that messages have.
"""

import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial, reduce
from typing import Any, NamedTuple

import torch

# An attribute that this version of PyTorch lacks, or a mixture of its old and new switches for
# TF32, which it refuses to read; or a working directory that somebody has removed.
UNREADABLE = (AttributeError, RuntimeError, TypeError, ValueError, AssertionError, OSError)


class Setting(NamedTuple):
    """A setting of the process.

    Attributes:
        get: returns the value.
        put: takes a value that ``get`` has returned.
        other: another value, with which a call is tried, too: a call that sets what was set already
            changes nothing.
        is_state: whether the value is too long for a message, as the state of a generator is.
    """

    get: Callable[[], Any]
    put: Callable[[Any], object]
    other: Callable[[Any], Any] | None = None
    is_state: bool = False


def _of(owner: object, path: str, other: Callable[[Any], Any] | None = None) -> Setting:
    """The setting that is an attribute of ``owner``."""
    *places, name = path.split(".")

    def holder() -> Any:
        return reduce(getattr, places, owner)

    return Setting(
        lambda: getattr(holder(), name), lambda value: setattr(holder(), name, value), other
    )


def _flushes() -> bool:
    """Whether the processor takes subnormal numbers for 0, which no function of PyTorch tells."""
    return not (torch.full((1,), 5e-324, dtype=torch.float64, device="cpu") * 1).any()


def _put_device(device: torch.device) -> None:
    torch.set_default_device(None if device.type == "cpu" else device)


def _autocast(device: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _put_autocast(device: str, value: tuple[bool, torch.dtype]) -> None:
    torch.set_autocast_enabled(device, value[0])
    torch.set_autocast_dtype(device, value[1])


def _state() -> bytes:
    return torch.default_generator.get_state().numpy().tobytes()


def _put_state(state: bytes) -> None:
    numbers = torch.frombuffer(bytearray(state), dtype=torch.uint8)
    torch.default_generator.set_state(numbers)


def _of_gpus(get: Callable[[], Any]) -> Callable[[], Any]:
    """``get`` where this process has used a GPU; otherwise asking would begin to use it."""

    def call() -> Any:
        if not torch.cuda.is_initialized():
            raise RuntimeError("this process has used no GPU")
        return get()

    return call


def _states_of_gpus() -> tuple[bytes, ...]:
    return tuple(state.numpy().tobytes() for state in torch.cuda.get_rng_state_all())


def _put_states_of_gpus(states: tuple[bytes, ...]) -> None:
    torch.cuda.set_rng_state_all(
        [torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in states]
    )


def _numpy() -> Any:
    """NumPy, if this process has imported it: otherwise an import would be a change, too."""
    if "numpy" not in sys.modules:
        raise RuntimeError("this process has not imported NumPy")
    return sys.modules["numpy"]


def _state_of_numpy() -> object:
    name, numbers, *others = _numpy().random.get_state()
    return (name, numbers.tobytes(), *others)


def _put_state_of_numpy(state: Any) -> None:
    name, numbers, *others = state
    numpy = _numpy()
    numpy.random.set_state((name, numpy.frombuffer(numbers, "uint32"), *others))


# The beginnings of variables that Inductor and Triton set where they are missing, as the places of
# their caches.
OF_COMPILERS = ("TORCHINDUCTOR_", "_TORCHINDUCTOR_", "TRITON_")


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(OF_COMPILERS)}


def _put_environment(before: dict[str, str]) -> None:
    for name in _environment().keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def _put_filters(filters: list[Any]) -> None:
    warnings.filters[:] = filters  # type: ignore[index]


def _of_backend(path: str) -> Setting:
    return _of(torch.backends, path)


def _switch(get: str, put: str) -> Setting:
    """A switch of `torch.backends` that has a function to read it and one to set it."""

    def call(path: str, *args: object) -> Any:
        function: Any = reduce(getattr, path.split("."), torch.backends)
        return function(*args)

    return Setting(partial(call, get), partial(call, put))


GENERATORS: dict[str, Setting] = {
    "PyTorch's random numbers": Setting(_state, _put_state, is_state=True),
    "the GPUs' random numbers": Setting(
        _of_gpus(_states_of_gpus), _put_states_of_gpus, is_state=True
    ),
    "Python's random numbers": Setting(random.getstate, random.setstate, is_state=True),
    "NumPy's random numbers": Setting(_state_of_numpy, _put_state_of_numpy, is_state=True),
}
# General switches come before those that they change, too.
SETTINGS: dict[str, Setting] = {
    "the default dtype": Setting(
        torch.get_default_dtype,
        torch.set_default_dtype,
        lambda x: torch.float32 if x == torch.float64 else torch.float64,
    ),
    "the default device": Setting(torch.get_default_device, _put_device),
    "the grad mode": Setting(torch.is_grad_enabled, torch.set_grad_enabled),
    "deterministic algorithms": Setting(
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        lambda x: torch.use_deterministic_algorithms(x[0], warn_only=x[1]),
    ),
    "torch.utils.deterministic.fill_uninitialized_memory": _of(
        torch.utils, "deterministic.fill_uninitialized_memory"
    ),
    "the number of threads": Setting(
        torch.get_num_threads, torch.set_num_threads, lambda x: 1 if x > 1 else 2
    ),
    "flush-denormal": Setting(_flushes, torch.set_flush_denormal, lambda x: not x),
    "the float32 matmul precision": Setting(
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
        lambda x: "high" if x == "medium" else "medium",
    ),
    **{
        f"torch.backends.{path}": _of_backend(path)
        for path in (
            "fp32_precision",
            "cuda.matmul.allow_tf32",
            "cuda.matmul.fp32_precision",
            "cuda.matmul.allow_fp16_reduced_precision_reduction",
            "cuda.matmul.allow_bf16_reduced_precision_reduction",
            "cuda.matmul.allow_fp16_accumulation",
            "cudnn.enabled",
            "cudnn.benchmark",
            "cudnn.benchmark_limit",
            "cudnn.deterministic",
            "cudnn.allow_tf32",
            "cudnn.fp32_precision",
            "cudnn.conv.fp32_precision",
            "cudnn.rnn.fp32_precision",
            "mkldnn.enabled",
            "mkldnn.deterministic",
            "mkldnn.fp32_precision",
            "mkldnn.matmul.fp32_precision",
            "mkldnn.conv.fp32_precision",
            "mkldnn.rnn.fp32_precision",
            "opt_einsum.enabled",
            "opt_einsum.strategy",
            "quantized.engine",
        )
    },
    "the fast path of attention": _switch("mha.get_fastpath_enabled", "mha.set_fastpath_enabled"),
    **{
        f"the {kind} of attention": _switch(f"cuda.{kind}_enabled", f"cuda.enable_{kind}")
        for kind in ("flash_sdp", "mem_efficient_sdp", "math_sdp", "cudnn_sdp")
    },
    **{
        f"autocast of {device}": Setting(partial(_autocast, device), partial(_put_autocast, device))
        for device in ("cpu", "cuda")
    },
    "the cache of autocast": Setting(
        torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled
    ),
    "anomaly detection": Setting(
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda x: torch.set_anomaly_enabled(*x),
    ),
    "torch.set_warn_always": Setting(torch.is_warn_always_enabled, torch.set_warn_always),
    "the current GPU": Setting(_of_gpus(torch.cuda.current_device), torch.cuda.set_device),
    "the current stream": Setting(_of_gpus(torch.cuda.current_stream), torch.cuda.set_stream),
    **GENERATORS,
}
# Imports change some of these once, so a first call may.
OF_THE_PROCESS: dict[str, Setting] = {
    "NumPy's handling of errors": Setting(
        lambda: _numpy().geterr(), lambda x: _numpy().seterr(**x)
    ),
    "environment variables": Setting(_environment, _put_environment, is_state=True),
    "the working directory": Setting(os.getcwd, os.chdir),
    "the filters of warnings": Setting(lambda: list(warnings.filters), _put_filters, is_state=True),
}
EVERY = SETTINGS | OF_THE_PROCESS


class Settings:
    """The values of settings at one time; those that cannot be read are left out."""

    def __init__(self, settings: dict[str, Setting]) -> None:
        self._before: dict[str, tuple[Setting, Any]] = {}
        for name, setting in settings.items():
            with suppress(*UNREADABLE):
                self._before[name] = setting, setting.get()

    def changes(self) -> dict[str, str]:
        """The settings that are others now, and how, as "'highest' to 'medium'"."""
        found = {}
        for name, (setting, before) in self._before.items():
            with suppress(*UNREADABLE):
                if (now := setting.get()) != before:
                    found[name] = "" if setting.is_state else f"{before} to {now}"
        return found

    def restore(self) -> None:
        for setting, before in self._before.values():
            with suppress(*UNREADABLE):
                if setting.get() != before:
                    setting.put(before)

    def put_others(self) -> None:
        """Give each setting that has another value this value."""
        for setting, before in self._before.values():
            with suppress(*UNREADABLE):
                if setting.other is not None:
                    setting.put(setting.other(before))


@contextmanager
def kept() -> Iterator[None]:
    """Restore every setting at the end."""
    before = Settings(EVERY)
    try:
        yield
    finally:
        before.restore()
