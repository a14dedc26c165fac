# SPDX-License-Identifier: MIT
"""Support code of the examples: command-line flags, console output and plots."""
