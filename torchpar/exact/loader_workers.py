# SPDX-License-Identifier: MIT
"""Workers of a `torch.utils.data.DataLoader` that is iterated in the exact mode.

A worker that is forked in the mode is in it. A worker that is started anew, by "spawn" or by
"forkserver", is not, so its first call enters the mode.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch.utils.data import DataLoader

from torchpar.errors import ConfigError

_lock = threading.Lock()
_threads_in_mode = 0
_iterate: Callable[[Any], Any] = DataLoader.__iter__  # PyTorch's, while it is replaced
_ours: Callable[[Any], Any] | None = None
_entered: list[AbstractContextManager[None]] = []  # a worker's, until it ends


class InMode:
    """A ``worker_init_fn`` that enters the mode, and then calls the loader's own function."""

    def __init__(
        self,
        mode: Callable[[], AbstractContextManager[None]],
        function: Callable[[int], object] | None,
    ):
        self.mode, self.function = mode, function

    def __call__(self, worker: int) -> None:
        _entered.append(self.mode())
        _entered[-1].__enter__()
        if self.function is not None:
            self.function(worker)


@contextmanager
def workers_enter(
    mode: Callable[[], AbstractContextManager[None]], is_active: Callable[[], bool]
) -> Iterator[None]:
    """Within the block, let the workers of a loader that is iterated in the mode enter ``mode``.

    PyTorch has no hook for workers, so `DataLoader.__iter__` is replaced while any thread is here.
    """
    global _threads_in_mode, _iterate, _ours
    with _lock:
        _threads_in_mode += 1
        if _threads_in_mode == 1:
            _iterate = DataLoader.__iter__
            _ours = _replacement(_iterate, mode, is_active)
            DataLoader.__iter__ = _ours  # type: ignore[method-assign]
    try:
        yield
    finally:
        with _lock:
            _threads_in_mode -= 1
            # Another library may have replaced it meanwhile.
            if not _threads_in_mode and DataLoader.__iter__ is _ours:
                DataLoader.__iter__ = _iterate  # type: ignore[method-assign]


def _replacement(
    iterate: Callable[[Any], Any],
    mode: Callable[[], AbstractContextManager[None]],
    is_active: Callable[[], bool],
) -> Callable[[Any], Any]:
    def __iter__(self: Any) -> Any:
        if not self.num_workers or not is_active():
            return iterate(self)
        function, living = self.worker_init_fn, self._iterator
        if living is not None and not isinstance(living._worker_init_fn, InMode):
            raise ConfigError(
                "the persistent workers of a DataLoader began outside of torchpar.exact.mode(); "
                "iterate it in the mode only, or give persistent_workers=False"
            )
        self.worker_init_fn = InMode(mode, function)
        try:
            return iterate(self)
        finally:
            self.worker_init_fn = function

    return __iter__
