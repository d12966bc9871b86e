"""The polynomial of Muon's Newton-Schulz iterations."""

QUINTIC = (3.4445, -4.7750, 2.0315)
"""K. Jordan's polynomial (Muon, 2024): steep at zero, so that five iterations bring
singular values above 0.3 % of the largest to between about 0.7 and 1.2."""

ITERATIONS = 5
