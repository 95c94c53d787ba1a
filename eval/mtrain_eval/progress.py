"""How far an evaluation is, for the person who waits: on one rank, by tokens, so that the time left means something."""

from __future__ import annotations

import sys

from tqdm import tqdm


class Progress:
    """A bar over the tokens still to be asked; off the first rank it does nothing.

    Args:
        enabled: False on every rank but the first.
        total: tokens over all samples to come.
    """

    def __init__(self, enabled: bool, total: int) -> None:
        self._bar = None
        if enabled and total:
            terminal = sys.stderr.isatty()
            self._bar = tqdm(
                total=total,
                unit="tok",
                unit_scale=True,
                dynamic_ncols=True,
                file=sys.stderr,
                mininterval=0.5 if terminal else 30.0,  # a log file needs no animation
            )

    def show(self, text: str) -> None:
        """What is being asked."""
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=False)

    def advance(self, tokens: int) -> None:
        """One sample done."""
        if self._bar is not None:
            self._bar.update(tokens)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def say(text: str) -> None:
    """A line that does not tear a bar."""
    tqdm.write(text, file=sys.stderr)
