# SPDX-License-Identifier: MIT
"""Trainings in exact arithmetic, whose weights have published bits."""
