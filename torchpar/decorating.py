# SPDX-License-Identifier: MIT
"""Context managers that decorate functions, and refuse those whose body runs later."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, _GeneratorContextManager
from functools import wraps
from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import Any, ParamSpec, TypeVar

from torchpar.errors import ConfigError

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def decorated(
    name: str, enter: Callable[[], AbstractContextManager[object]], function: Callable[P, R]
) -> Callable[P, R]:
    """A function whose calls are made within ``enter()``, as `contextlib.ContextDecorator` does it.

    Raises:
        ConfigError: a generator or a coroutine function, or at the call one that returns such an
            object. The block would end before the body begins. ``name`` names the block.
    """
    _refuse_suspended(name, function, _kind_of_function(function))

    @wraps(function)
    def within(*args: P.args, **kwargs: P.kwargs) -> R:
        with enter():
            result = function(*args, **kwargs)
        if isinstance(result, _SUSPENDED):
            if not isinstance(result, AsyncGeneratorType):
                result.close()  # else Python warns of a coroutine that was never awaited
            kind = type(result).__name__.replace("_", " ")
            _refuse_suspended(name, function, f"which returns an object of type {kind}")
        return result

    return within


_SUSPENDED = GeneratorType, CoroutineType, AsyncGeneratorType


def _kind_of_function(function: Callable[..., object]) -> str:
    """The kind of a function whose body runs after its call has returned, or ""."""
    for one in (function, getattr(function, "__call__", None)):  # noqa: B004  # it may be async
        if isasyncgenfunction(one):
            return "an asynchronous generator function"
        if isgeneratorfunction(one):
            return "a generator function"
        if iscoroutinefunction(one):
            return "a coroutine function"
    return ""


def _refuse_suspended(name: str, function: Callable[..., object], kind: str) -> None:
    if kind:
        whose = getattr(function, "__qualname__", type(function).__qualname__)
        raise ConfigError(
            f"{name} decorates {whose}, {kind}, whose body runs when the block has ended; write "
            f"`with {name}(…):` within the body"
        )


class _ContextManager(_GeneratorContextManager[T]):
    """A context manager by `context_manager`."""

    name: str

    def __call__(self, func: Callable[P, R]) -> Callable[P, R]:  # type: ignore[override]
        return decorated(self.name, self._recreate_cm, func)


def context_manager(
    name: str,
) -> Callable[[Callable[P, Iterator[T]]], Callable[P, _ContextManager[T]]]:
    """`contextlib.contextmanager`, whose managers refuse to decorate what `decorated` refuses.

    Args:
        name: of the function, as its users write it.
    """

    def make(function: Callable[P, Iterator[T]]) -> Callable[P, _ContextManager[T]]:
        @wraps(function)
        def enter(*args: P.args, **kwargs: P.kwargs) -> _ContextManager[T]:
            generator: Any = function
            found = _ContextManager[T](generator, args, kwargs)
            found.name = name
            return found

        return enter

    return make
