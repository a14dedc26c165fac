# SPDX-License-Identifier: MIT
"""Save: checkpoints written by all ranks, verified by SHA-256, and loadable on any other mesh."""
