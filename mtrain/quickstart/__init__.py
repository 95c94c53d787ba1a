"""The first thing a new user runs: a context extension in miniature, with its proof. See `mtrain.quickstart.stages`."""
