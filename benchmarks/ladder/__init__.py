# SPDX-License-Identifier: MIT
"""The ladder: its cases, its rungs, a student's functions beside them, and its page."""
