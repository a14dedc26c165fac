# SPDX-License-Identifier: MIT
"""Profiling: seconds by phase, collectives counted."""
