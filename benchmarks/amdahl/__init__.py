# SPDX-License-Identifier: MIT
"""What data-parallel training gains from more processes, and what by Amdahl's law it could."""
