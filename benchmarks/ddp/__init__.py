# SPDX-License-Identifier: MIT
"""Steps of the lessons: the benchmark, and the plain script with DDP beside them."""
