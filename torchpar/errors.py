# SPDX-License-Identifier: MIT
"""The error for requests that cannot be met."""


class ConfigError(ValueError):
    """A request that cannot be met. One line: what was wrong, what was expected, what to do."""
