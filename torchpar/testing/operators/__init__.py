# SPDX-License-Identifier: MIT
"""Trial of an operator with every part of PyTorch: `check_operator`, and the rules of its table."""
