# SPDX-License-Identifier: MIT
"""First divergence: record two runs, and name the first tensor in which they differ.

`recording` watches a training, `checksums` sums up tensors, and `recorded_files` writes and reads
the files. `compare_runs` is the command that compares two of them.
"""
