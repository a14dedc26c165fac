# SPDX-License-Identifier: MIT
"""Support code of the examples: command-line flags, console output and plots.

The examples import it before torch and NumPy, which read OMP_WAIT_POLICY when they are imported.
Their threads then leave their core to others while they wait.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
