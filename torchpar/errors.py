# SPDX-License-Identifier: MIT
"""The error a person can mend."""


class ConfigError(ValueError):
    """What was asked for cannot be done. One line: what was wrong, what was expected, what to do.

    Attributes:
        told: whether another rank has met it too, and tells it; None if that is not known.
    """

    told: bool | None = None
