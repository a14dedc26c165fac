# SPDX-License-Identifier: MIT
"""State beside the model's: random generators, and objects that a program gives to `Run`.

The state of such an object is nested: numbers, text, tensors and NumPy's arrays. `torch.save` turns
it into bytes, and a checkpoint holds these as a tensor. `torch.load` reads them by its allow-list,
to which NumPy's arrays are added.
"""

import io
import random
from collections.abc import Callable, Mapping
from functools import partial
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchpar.errors import ConfigError, first_line
from torchpar.library.sharding import is_dtensor

# What a pickled array or a number of NumPy consists of. Arrays of Python's objects are left out.
_NUMPY: list[Any] = [
    np.ndarray,
    np.dtype,
    np.zeros(1).__reduce__()[0],
    np.float64(0).__reduce__()[0],
    *{type(np.dtype(code)) for code in np.typecodes["All"] if code != "O"},
]

_GENERATORS = (
    torch.Generator,
    random.Random,
    np.random.RandomState,
    np.random.Generator,
    np.random.BitGenerator,
)


class Access(NamedTuple):
    """How to get and set the state of an object."""

    get: Callable[[], Any]
    set: Callable[[Any], object]


def access(value: object) -> Access | None:
    """How to get and set the state of a generator, or of what has a state dict; None for others."""
    if isinstance(value, torch.Generator):
        return Access(value.get_state, value.set_state)
    if isinstance(value, random.Random):
        return Access(value.getstate, value.setstate)
    if isinstance(value, np.random.RandomState):
        return Access(partial(value.get_state, legacy=False), value.set_state)
    if isinstance(value, np.random.Generator):
        value = value.bit_generator
    if isinstance(value, np.random.BitGenerator):
        bits = value
        return Access(lambda: bits.state, lambda state: setattr(bits, "state", state))
    if isinstance(value, Optimizer):
        return Access(value.state_dict, partial(_load_optimizer, value))
    get, put = (getattr(value, name, None) for name in ("state_dict", "load_state_dict"))
    return Access(get, put) if callable(get) and callable(put) else None


def _load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load a state dict. PyTorch casts state to the dtype of its parameter; this does not."""
    optimizer.load_state_dict(dict(state))
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, p in zip(numbers, parameters, strict=True):
        for key, value in state["state"].get(number, {}).items():
            if isinstance(value, Tensor):
                optimizer.state[p][key] = value.to(optimizer.state[p][key].device, copy=True)


def is_generator(value: object) -> bool:
    return isinstance(value, _GENERATORS)


def is_plain_module(value: object) -> bool:
    """Whether a module's state dict is that of `torch.nn.Module`: parameters, buffers, and extra
    states. Another one is saved as any object is."""
    if not isinstance(value, nn.Module):
        return False
    methods = "state_dict", "load_state_dict", "_save_to_state_dict"
    return all(
        getattr(type(module), name) is getattr(nn.Module, name)
        or type(module).__module__.startswith("torch.")
        for module in value.modules()
        for name in methods
    )


def check_stateful(stateful: object) -> dict[str, Any]:
    """Return the objects by name, or refuse what a checkpoint cannot hold.

    Raises:
        ConfigError: no mapping from identifiers to modules, generators, and objects with
            ``state_dict`` and ``load_state_dict``.
    """
    if stateful is None:
        return {}
    if not isinstance(stateful, Mapping):
        raise ConfigError(
            f"Run: stateful is of type {type(stateful).__name__}, expected objects by name, such "
            'as {"scaler": scaler}'
        )
    for name, value in stateful.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise ConfigError(f"Run: stateful has the name {name!r}, expected a name as of Python")
        if access(value) is None:
            raise ConfigError(
                f"Run: stateful[{name!r}] is of type {type(value).__name__}, expected a module, a "
                "generator, or an object that has state_dict and load_state_dict"
            )
    return dict(stateful)


def objects_of(stateful: Mapping[str, object]) -> dict[str, Access]:
    """The objects that are not saved as modules are, by name."""
    found = {name: access(x) for name, x in stateful.items() if not is_plain_module(x)}
    return {name: one for name, one in found.items() if one is not None}


def pack(name: str, state: object, is_known: bool = False) -> Tensor:
    """Return ``state`` as a tensor of bytes.

    Args:
        name: of the state, for the error.
        is_known: the state can be loaded, and need not be tried.

    Raises:
        ConfigError: the state has a value that could not be loaded, such as a DTensor.
    """
    if (kind := _foreign(state)) is not None:
        raise ConfigError(f"{name} holds a {kind}, which would not be loaded; {_REMEDY}")
    file = io.BytesIO()
    try:
        torch.save(state, file)
        packed = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
        if not is_known:
            unpack(packed)
    except Exception as e:  # of any kind: values have methods of their own for pickling
        kinds = _refused_kinds(file) if isinstance(e, UnpicklingError) else []
        reason = f"of type {kinds[0]}" if kinds else first_line(e)
        raise ConfigError(f"{name} holds what would not be loaded ({reason}); {_REMEDY}") from e
    return packed


def _refused_kinds(file: io.BytesIO) -> list[str]:
    """The types in a file of `torch.save` that are not in the allow-list."""
    file.seek(0)
    with torch.serialization.safe_globals(_NUMPY):
        return torch.serialization.get_unsafe_globals_in_checkpoint(file)


_REMEDY = "expected numbers, text, tensors, arrays, and lists, tuples, sets and dicts of these"


def _foreign(value: object) -> str | None:
    """The type of a DTensor or a sparse tensor within ``value``, or None."""
    if isinstance(value, Tensor):
        if is_dtensor(value):
            return "DTensor"
        return None if value.layout == torch.strided else f"tensor that is {value.layout}"
    if isinstance(value, Mapping):
        value = [*value.values()]
    nested = value if isinstance(value, list | tuple | set) else ()
    return next((kind for kind in map(_foreign, nested) if kind is not None), None)


def unpack(packed: Tensor, device: torch.device | None = None) -> Any:
    """Return the state that `pack` was given.

    Args:
        device: of the tensors that were on a GPU; the CPU by default.
    """
    kept = device or torch.device("cpu")

    def place(storage: Any, location: str) -> Any:
        return storage if location == "cpu" or kept.type == "cpu" else storage.to(kept)

    with torch.serialization.safe_globals(_NUMPY):
        file = io.BytesIO(packed.numpy().tobytes())
        return torch.load(file, map_location=place, weights_only=True)


def generators() -> dict[str, Access]:
    """The process's random generators: Python's, NumPy's global one, and PyTorch's by device.

    Their states are tensors.
    """
    of_numpy = Access(partial(np.random.get_state, legacy=False), np.random.set_state)
    found = {
        "cpu": Access(torch.get_rng_state, torch.set_rng_state),
        "python": _packed("Python's random state", Access(random.getstate, random.setstate)),
        "numpy": _packed("NumPy's random state", of_numpy),
    }
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind)
        if not module.is_available():
            continue
        present = module.current_device()
        for index in range(module.device_count()):
            # A rank's own device may have another number in a resumed run.
            name = kind if index == present else f"{kind}{index}"
            found[name] = _of_device(module, index)
    if torch.mps.is_available():
        found["mps"] = Access(torch.mps.get_rng_state, torch.mps.set_rng_state)
    return found


def _packed(name: str, one: Access) -> Access:
    return Access(lambda: pack(name, one.get(), is_known=True), lambda t: one.set(unpack(t)))


def _of_device(module: Any, index: int) -> Access:
    return Access(
        lambda: module.get_rng_state(index), lambda state: module.set_rng_state(state, index)
    )
