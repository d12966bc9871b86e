"""Configurations of the kernels: defaults, what they cost, and how to find better."""
