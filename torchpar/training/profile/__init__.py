# SPDX-License-Identifier: MIT
"""Profiling: when each phase of a step runs, which messages it sends, how much memory it takes.

`recorder` measures, and `record` holds what was measured: `phases` the seconds of each phase,
`collectives` each call of a collective, and `step_memory` the bytes. `replay_page` makes a page
that plays a step that was recorded event by event, and `replay_command` is its command.
"""
