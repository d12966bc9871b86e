"""Training runs that compare optimizers on real data."""
