# SPDX-License-Identifier: MIT
"""One launch: CTAs, warps, memory, what they know of each other, and counters."""
