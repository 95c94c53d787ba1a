"""The parts of scripts/ring_trace.py: the replay of a ring on one device, its cases, the model of time, the report."""
