# SPDX-License-Identifier: MIT
"""Programs that train for an epoch by themselves, and are timed as they are."""
