"""The published experiment in small: does a model that is trained sparsely do what its dense twin does? See scripts/parity.py."""
