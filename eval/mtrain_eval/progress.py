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
        self._enabled, self._total = enabled, total
        self._bar: tqdm | None = None

    def show(self, text: str) -> None:
        """What is being asked; the first time the bar appears, so that nothing stands above an early error."""
        if self._enabled and self._bar is None:
            self._bar = tqdm(
                total=self._total,
                unit="tok",
                unit_scale=True,
                dynamic_ncols=True,
                file=sys.stderr,
                mininterval=0.5 if sys.stderr.isatty() else 30.0,  # a log file needs no animation
                desc=text,
            )
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
