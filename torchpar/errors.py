# SPDX-License-Identifier: MIT
"""The error a person can mend."""


class ConfigError(ValueError):
    """What was asked for cannot be done. One line: what was wrong, what was expected, what to do.

    Attributes:
        told: another rank has met it too, and tells it.
    """

    told = False
