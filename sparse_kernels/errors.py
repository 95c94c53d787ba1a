"""What this package raises for its users."""


class PatternError(ValueError):
    """A pattern whose tensors do not describe a mask, or that does not hold what is asked of it."""
