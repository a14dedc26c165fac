# SPDX-License-Identifier: MIT
"""The check of a kernel: its values beside a reference, and its faults, in a table."""
