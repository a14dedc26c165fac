# SPDX-License-Identifier: MIT
"""Profiling: when each phase of a step runs, which messages it sends, how much memory it takes.

`recorder` measures, and `record` holds what was measured: `phases` the seconds of each phase,
`collectives` each call of a collective, and `step_memory` the bytes. `replay` writes a page that
plays some steps: `replaying` leaves marks in a step, with `messages` for what ranks send, and
`marks` makes `recorded_ranks` of them. `replay_trace` joins the ranks, `replay_totals` adds up,
`replay_page` draws and plays, and `replay_command` does so with two recordings side by side.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "replay":  # the other modules need no PyTorch
        from torchpar.training.profile.replaying import replay

        return replay
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
