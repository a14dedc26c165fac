# SPDX-License-Identifier: MIT
"""Faults, counters, bounds and pictures of launches."""
