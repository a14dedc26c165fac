# SPDX-License-Identifier: MIT
"""Profiling: when each phase of a step runs, which messages it sends, how much memory it takes."""
