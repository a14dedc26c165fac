# SPDX-License-Identifier: MIT
"""Triton's autotuner within an emulator: the first configuration that fits, or every one.

A configuration is tried without a launch: it is compiled, and the driver asks whether it fits.
Triton times each one on the kernel's own tensors, before the launch that counts. So this launch is
repeated, and what it then changes is named.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.autotuner import Autotuner, Config

from nogpu.machine.parse import is_of_handler
from nogpu.record.faults import ConfigurationNote, HostFault, Kind
from nogpu.record.source import program_line
from nogpu.triton.emulator import Emulator
from nogpu.triton.host_memory import has_host_memory, storage_of
from nogpu.triton.tuning import Tuning, called, configuration

# Of configurations that are executed before the chosen one, and of those that are not.
CHOSEN, OTHER, LEFT_OUT = 1.0, 2.0, float("inf")


def changes(present: Callable[[], Emulator]) -> ExitStack:
    """Let autotuners ask the emulator that ``present`` returns, until the stack is closed."""
    stack = ExitStack()
    for name, change in (("run", _run), ("_bench", _bench)):
        function = change(getattr(Autotuner, name), present)
        stack.enter_context(patch.object(Autotuner, name, function))
    return stack


def _run(run: Callable[..., Any], present: Callable[[], Emulator]) -> Callable[..., Any]:
    """Return the method of an autotuner that says which configuration the launches take.

    What it has chosen for a GPU stays as it is.
    """

    def tuned(autotuner: Autotuner, *args: object, **kwargs: object) -> object:
        emulator, tuning = present(), Tuning(autotuner)
        first, cache = len(emulator.launches), autotuner.cache
        keeps = getattr(autotuner, "cache_results", False)
        autotuner.cache = emulator.tuned.setdefault(autotuner, {})
        autotuner.cache_results = False  # there are no times to keep
        token = called.set(tuning)
        try:
            result = run(autotuner, *args, **kwargs)
            launched = emulator.launches[first:]
            if tuning.has_chosen and launched and not launched[-1].ended:
                _check_repeat(emulator, tuning, args, kwargs)
            return result
        finally:
            called.reset(token)
            autotuner.cache, autotuner.cache_results = cache, keeps
            for launch in emulator.launches[first:]:
                launch.configuration = launch.configuration or str(autotuner.best_config)

    return tuned


def _bench(bench: Callable[..., Any], present: Callable[[], Emulator]) -> Callable[..., Any]:
    """Return the method of an autotuner that times a configuration, for one that tries it.

    As Triton's, it leaves out those that do not fit, whose `tl.static_assert` fails, or that ptxas
    refuses. Other errors end a program on a GPU. Where every configuration is asked for, they are
    faults, so that the others are executed.
    """

    def tried(autotuner: Autotuner, *args: object, config: Config, **kwargs: object) -> object:
        emulator, tuning = present(), called.get()
        assert tuning is not None
        if emulator.watcher is not None:
            emulator.watcher.tune(autotuner.base_fn.__name__)
        executes, reasons = tuning.has_chosen, list[Exception]()
        if executes and emulator.configurations == "first":
            return [LEFT_OUT] * 3

        def call_once(call: Callable[[], object], **options: object) -> list[float]:
            try:
                with _executed(emulator) if executes else _trial(tuning):
                    call()
            except Exception as e:
                reasons.append(e)
                raise
            return [OTHER if executes else CHOSEN] * 3

        tuning.config = config
        kernel, ends = autotuner.base_fn.__name__, False
        try:
            with patch.dict(vars(autotuner), {"do_bench": call_once}):
                times = bench(autotuner, *args, config=config, **kwargs)
        except Exception as e:
            is_its_own = not isinstance(e, MemoryError) and not is_of_handler(e)
            if emulator.configurations == "first" or e not in reasons or not is_its_own:
                raise
            times, ends = [LEFT_OUT] * 3, True
        finally:
            tuning.config = None
        if reasons:
            emulator.note(*left_out(kernel, str(config), reasons[0], ends))
        elif not tuning.has_chosen:
            tuning.has_chosen = True
            given = _arguments(autotuner, args, kwargs)
            tuning.before = {
                name: t.detach().clone()
                for name in autotuner.restore_value
                if (t := given.get(name)) is not None
            }
        return times

    return tried


def _arguments(
    autotuner: Autotuner, args: Sequence[object], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a launch by their names."""
    return dict(zip(autotuner.arg_names, args, strict=False)) | dict(kwargs)


def _check_repeat(
    emulator: Emulator, tuning: Tuning, args: Sequence[object], kwargs: Mapping[str, Any]
) -> None:
    """Warn if a second launch changes what the first one has computed."""
    autotuner, config = tuning.autotuner, tuning.autotuner.best_config
    hooks = [autotuner.user_defined_pre_hook, autotuner.user_defined_post_hook]
    if any(hooks) or any(one.pre_hook for one in autotuner.configs):
        return  # they may undo what a launch changes
    given = _arguments(autotuner, args, kwargs)
    zeroed = [name for name in autotuner.reset_to_zero if given.get(name) is not None]
    after = {name: given[name].detach().clone() for name in (*zeroed, *tuning.before)}
    names = {
        storage_of(t).address: name
        for name, value in given.items()
        if isinstance(t := getattr(value, "base", value), Tensor)
        and has_host_memory(t)
        and name not in after
    }
    tuning.is_repeat = True
    try:
        with torch.no_grad(), emulator.undone() as memory:
            for name in zeroed:
                given[name].zero_()
            for name, t in tuning.before.items():
                given[name].copy_(t)
            autotuner.fn.run(*args, **kwargs, **config.all_kwargs())
            changed = {
                names[place.start]: where
                for place in memory
                if place.start in names and (where := place.first_change())
            }
    finally:
        tuning.is_repeat = False
        with torch.no_grad():
            for name, t in after.items():
                given[name].copy_(t)
    kernel, line = autotuner.base_fn.__name__, program_line()
    for name, where in changed.items():
        message = (
            f"another launch of {kernel} changes {where}; on a GPU Triton times each "
            "configuration on these tensors before the launch that counts; give autotune "
            f'restore_value=["{name}"], or reset_to_zero=["{name}"] if the kernel adds to zeros'
        )
        fault = HostFault("warning", "tuned in place", message, kernel, source=line)
        emulator.note(fault, (fault.name, kernel, name, line))


def left_out(
    kernel: str, config: str, reason: Exception, ends: bool
) -> tuple[ConfigurationNote, tuple[object, ...]]:
    """Return the note that a configuration was left out, and its key.

    Args:
        ends: on a GPU the reason ends the program.
    """
    said = " ".join(str(reason).split()) or type(reason).__name__
    if isinstance(reason, CompilationError) and reason.src and hasattr(reason.node, "lineno"):
        code = reason.src.split("\n")[reason.node.lineno - 1].strip()
        why = f": {' '.join(reason.error_message.split())}" if reason.error_message else ""
        said = f"{code} fails{why}"
    message, name = f"{config}: {said}", "configuration left out"
    kind: Kind = "note"
    if ends:
        kind, name = "error", "failed configuration"
        message += (
            f"; on a GPU this {type(reason).__name__} ends the program; take the configuration away"
        )
    note = ConfigurationNote(kind, name, message, kernel, (), 0, None)
    return note, (note.name, kernel, config)


@contextmanager
def _trial(tuning: Tuning) -> Iterator[None]:
    """Launch nothing. Hooks that reset tensors have nothing to do; those of users may have."""
    autotuner = tuning.autotuner
    names = [
        name
        for name in ("pre_hook", "post_hook")
        if not getattr(autotuner, f"user_defined_{name}", False)
    ]
    idle = {name: lambda *args, **kwargs: None for name in names}
    tuning.is_trial = True
    try:
        with patch.dict(vars(autotuner), idle):
            yield
    finally:
        tuning.is_trial = False


@contextmanager
def _executed(emulator: Emulator) -> Iterator[None]:
    """Execute a configuration that is not the chosen one: memory is afterwards as before."""
    first = len(emulator.launches)
    with emulator.undone():
        yield
    for launch in emulator.launches[first:]:
        launch.configuration = configuration()
