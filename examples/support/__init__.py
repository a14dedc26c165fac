# SPDX-License-Identifier: MIT
"""Support code of the examples: command-line flags, console output and plots.

`lesson` holds what the training lessons share, such as flags and the log, and `learning_rate` the
schedules. `cli` reads flags, `console` prints progress and tables, and `ending` the line of an
error. `plots` draws pictures, and `report` a page of a run by `drawing`; `timeline` draws a
pipeline's step as text. `checks` compares a reader's functions, and `kernels` runs a reader's
kernels; `cuda_layers` reads those of layers in CUDA C++, and `matrix` holds memory of the host and
of the device. `measure` times, `one_process` trains beside MPI, `mat` reads MATLAB's files, and
`orthogonality` is a penalty.

The examples import it before torch and NumPy, which read OMP_WAIT_POLICY when they are imported.
Their threads then leave their core to others while they wait.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
