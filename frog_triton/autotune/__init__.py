"""Kernel configurations: defaults by size."""
