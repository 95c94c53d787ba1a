"""The parts of scripts/bench_kernels.py: cases, contestants, measuring, reporting."""
