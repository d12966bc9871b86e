"""Ranks that train one model together: who solves which rows, from whose samples.

All ranks solve the same systems. Each draws its share of the samples from its own part
of the batch; the rank that solves a row is sent all of X, and of Y the row's column. A
rank holds some rows of a layer (all of them, or its shard), and solves those that are
its own; where other ranks hold the same rows, the updated rows go to them. A step makes
three kinds of collectives, each over all layers at once: what each rank brings
(integers), the samples, and the updated rows.
"""

from __future__ import annotations

from .division import Group, check_placements, find_division
from .ranks import Ranks

__all__ = ["Group", "Ranks", "check_placements", "find_division"]
