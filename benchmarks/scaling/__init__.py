# SPDX-License-Identifier: MIT
"""The speed-up of a training step on more ranks: ``python -m benchmarks run scaling``."""
