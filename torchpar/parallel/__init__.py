# SPDX-License-Identifier: MIT
"""What crosses processes."""
