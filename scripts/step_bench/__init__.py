"""The parts of scripts/bench_step.py: the stopwatch, the model and its attentions, checking, measuring, reporting."""
