# SPDX-License-Identifier: MIT
"""Split: layers, pipeline stages, gradients and their sums, divided over the ranks of a mesh."""
