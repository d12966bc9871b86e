"""Benchmarks of FROG; installed as ``frog_triton.benchmarks``."""
