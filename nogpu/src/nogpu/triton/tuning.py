# SPDX-License-Identifier: MIT
"""State of the autotuner that calls a kernel: its configuration, and whether it only tries it."""

from contextvars import ContextVar

from torch import Tensor
from triton.runtime.autotuner import Autotuner


class Tuning:
    """A call of an autotuned kernel.

    Attributes:
        config: that is tried now.
        has_chosen: a configuration that fits was found.
        is_trial: nothing is launched.
        is_repeat: a launch is repeated, and nothing is noted of it.
        before: what tensors held before the first launch, of those that Triton restores.
    """

    def __init__(self, autotuner: Autotuner):
        self.autotuner, self.config = autotuner, None
        self.has_chosen = self.is_trial = self.is_repeat = False
        self.before: dict[str, Tensor] = {}

    @property
    def configuration(self) -> str:
        config = self.config or getattr(self.autotuner, "best_config", None)
        return "" if config is None else str(config)


called: ContextVar[Tuning | None] = ContextVar("called", default=None)  # by this thread


def configuration() -> str:
    """Return the configuration that is executed now; "" if no autotuner has called."""
    tuning = called.get()
    return "" if tuning is None else tuning.configuration
