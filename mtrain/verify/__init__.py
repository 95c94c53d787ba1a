"""Proof on the user's own machine: every combination of the four axes against the float64 truth."""
