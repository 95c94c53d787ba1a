"""`python -m mtrain`, which is also what `accelerate launch -m mtrain` runs."""

from mtrain.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
