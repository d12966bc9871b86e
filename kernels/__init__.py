"""Triton kernels of FROG, and nothing else: no torch in here.

Installed as ``frog_triton.kernels``. Each module holds one kernel family; the
launchers that choose grids and pass pointers are in ``frog_triton.ops.triton_ops``.
"""
