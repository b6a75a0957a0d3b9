"""The top floor: the only place that knows all the others."""
