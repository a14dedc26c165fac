# SPDX-License-Identifier: MIT
"""What more ranks bring to a training step, and should."""
