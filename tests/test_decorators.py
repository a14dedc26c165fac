# SPDX-License-Identifier: MIT
"""Blocks that decorate a function: one whose body runs after the block is refused in one line."""

import asyncio
import contextlib
import importlib
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any

import pytest

import torchpar
from torchpar import exact
from torchpar.decorating import context_manager
from torchpar.errors import ConfigError
from torchpar.parallel import join_world
from torchpar.training.profile.phases import phase

seen: list[str | None] = []


def get() -> str | None:
    return torchpar.fp32_products.get()


def generator() -> Iterator[int]:
    seen.append(get())
    yield 1


async def coroutine() -> None:
    seen.append(get())


async def asynchronous_generator() -> AsyncIterator[int]:
    seen.append(get())
    yield 1


class Callee:
    async def __call__(self) -> None:
        seen.append(get())


FUNCTIONS: dict[str, tuple[Callable[..., Any], str]] = {
    "generator": (generator, "generator, a generator function, whose body"),
    "coroutine": (coroutine, "coroutine, a coroutine function, whose body"),
    "asynchronous generator": (asynchronous_generator, "an asynchronous generator function, whose"),
    "partial": (partial(generator), "partial, a generator function, whose body"),
    "object": (Callee(), "Callee, a coroutine function, whose body"),
}
# At the call.
RETURNED: dict[str, tuple[Callable[..., Any], str]] = {
    "generator": (lambda: generator(), "which returns an object of type generator, whose"),
    "coroutine": (lambda: coroutine(), "which returns an object of type coroutine, whose"),
    "asynchronous generator": (
        lambda: asynchronous_generator(),
        "which returns an object of type async generator, whose",
    ),
}


def emulate() -> Any:
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    from nogpu import emulate

    return emulate()


MANAGERS: dict[str, Callable[[], Any]] = {
    "fp32_products": lambda: torchpar.fp32_products("tf32x3"),
    "torchpar.exact.mode": exact.mode,
    "nogpu.emulate": emulate,
    "torchpar.parallel.join_world": lambda: join_world("cpu"),
    "phase": lambda: phase("forward"),
}


@pytest.mark.parametrize("name", MANAGERS)
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_function_whose_body_runs_later_is_refused(kind: str, name: str) -> None:
    function, words = FUNCTIONS[kind]
    with pytest.raises(ValueError, match="decorates") as e:  # nogpu has no class of its own
        MANAGERS[name]()(function)
    line = str(e.value)
    assert line.startswith(f"{name} decorates ")
    assert words in line
    assert line.endswith(f"when the block has ended; write `with {name}(…):` within the body")
    assert "\n" not in line
    assert get() is None  # also where the manager has set it before


@pytest.mark.parametrize("name", ["fp32_products", "torchpar.exact.mode", "phase"])
@pytest.mark.parametrize("kind", RETURNED)
def test_what_returns_such_an_object_is_refused_at_the_call(kind: str, name: str) -> None:
    function, words = RETURNED[kind]
    decorated = MANAGERS[name]()(function)
    with pytest.raises(ConfigError, match=words):
        decorated()
    assert get() is None


def test_a_block_within_the_body_holds() -> None:
    async def within() -> None:
        with torchpar.fp32_products("tf32x3"):
            await coroutine()

    seen.clear()
    asyncio.run(within())
    assert (seen, get()) == (["tf32x3"], None)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    with torchpar.fp32_products("tf32x3"):
        yield


checked = context_manager("checked")(plain.__wrapped__)  # type: ignore[attr-defined]


def test_contextlib_ends_the_block_before_the_body() -> None:
    seen.clear()
    assert list(plain()(generator)()) == [1]
    assert seen == [None]
    with pytest.raises(ConfigError, match="checked decorates generator"):
        checked()(generator)


def test_other_functions_run_in_the_block_each_time() -> None:
    @checked()
    def mode(add: str) -> str:
        """Return it."""
        return f"{get()}{add}"

    assert [mode("!"), mode(add="?")] == ["tf32x3!", "tf32x3?"]
    assert (mode.__name__, mode.__doc__, get()) == ("mode", "Return it.", None)
    with checked() as nothing:
        assert (nothing, get()) == (None, "tf32x3")


ROOMS = ("data", "exact", "ops", "optim", "parallel", "testing", "training")


def test_public_context_managers_are_checked() -> None:
    found = set()
    for room in ("nogpu", *(f"torchpar.{room}" for room in ROOMS)):
        module = importlib.import_module(room)
        for name in module.__all__:
            function = getattr(module, name)
            if inspect.isgeneratorfunction(getattr(function, "__wrapped__", None)):
                found.add(name)
                assert function.__code__.co_filename != contextlib.__file__, name
    assert found == {"mode", "record", "emulate", "cuda_is_cpu", "join_world"}
    assert plain.__code__.co_filename == contextlib.__file__
