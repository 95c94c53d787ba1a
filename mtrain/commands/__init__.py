"""One file per command: `configure(parser)` declares its arguments, `run(args)` does it and returns the exit code.

The files are imported for `mtrain --help`, so they import torch and everything heavy only inside `run`.
"""
