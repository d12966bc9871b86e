"""A model as FROG sees it: which layers it serves, and how that is told."""
