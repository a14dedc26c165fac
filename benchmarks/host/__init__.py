# SPDX-License-Identifier: MIT
"""Calls on the host: the benchmark, and the process that makes the calls of a checkout."""
