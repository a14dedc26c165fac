# SPDX-License-Identifier: MIT
"""Trial of an optimizer in many situations on several ranks: `check_optimizer`."""
