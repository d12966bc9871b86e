"""Types of command-line arguments: those of `frog_triton.cli.arguments`."""

from ...cli.arguments import above_zero, fraction, output_folder, positive

__all__ = ["above_zero", "fraction", "output_folder", "positive"]
