"""What everything computes on: rows, samples behind a linear map, exact scales."""
