# SPDX-License-Identifier: MIT
"""Epochs of training, from pure Python to two ranks: `python -m benchmarks run train`."""
