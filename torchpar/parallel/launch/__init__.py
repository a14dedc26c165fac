# SPDX-License-Identifier: MIT
"""Launch: find the other ranks, connect to them, form the mesh, and compare arguments.

`world` is the ranks and their mesh: it joins them, divides samples among them, and exchanges
results. `rank_info` reads the environment, `rendezvous` is the store, `settings` are shared,
`interface` is where gloo listens, and `agreement` compares arguments. `local` and `processes` start
and end ranks of this machine. `guard` runs a reader's code in a child process, and `silence` names
a rank that hangs.
"""
