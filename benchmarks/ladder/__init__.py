# SPDX-License-Identifier: MIT
"""The same work on every rung, from pure Python to several processes: ``python -m benchmarks run ladder``."""
