"""Samples: seen, drawn, and kept with the gradient that they belong to."""
