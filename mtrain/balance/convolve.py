"""Sums along the diagonals of a block matrix, cut at the first block each row can see."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows that see at most this many blocks are summed offset by offset; a longer document is worth a transform.
_SHORT = 32


def visible_convolution(kernel: Tensor, signal: Tensor, first: Tensor) -> Tensor:
    """out[p, m] = sum over g and over n from first[m] to m of kernel[p, g, m - n] * signal[p, g, n].

    Args:
        kernel, signal: float64 [P or 1, G, N] holding whole numbers (the result is exact as long as it stays below 2^40).
        first: int64 [N] on the CPU, non-decreasing, first[m] <= m.

    Returns:
        float64 [P, N].
    """
    size = signal.shape[-1]
    span = torch.arange(size) - first
    rows = max(kernel.shape[0], signal.shape[0])
    out = torch.zeros(rows, size, dtype=torch.float64, device=signal.device)
    short = (span < _SHORT).to(signal.device)
    for offset in range(min(_SHORT, int(span.max()) + 1, size)):
        seen = short & (span >= offset).to(signal.device)
        term = (kernel[..., offset, None] * signal[..., : size - offset]).sum(1)
        out[:, offset:] += term * seen[offset:]
    for low, begin, end in _long_runs(first, span):
        length = end - low
        transform = 2 * length
        spectrum = torch.fft.rfft(kernel[..., :length], transform) * torch.fft.rfft(signal[..., low:end], transform)
        sums = torch.fft.irfft(spectrum.sum(1), transform).round()
        keep = torch.where(short[begin:end], out[:, begin:end], sums[:, begin - low : length])
        out[:, begin:end] = keep
    return out


def _long_runs(first: Tensor, span: Tensor) -> list[tuple[int, int, int]]:
    """(first block, first row, last row + 1) of every run of rows with one ``first`` in which some row sees many blocks."""
    lows, counts = torch.unique_consecutive(first, return_counts=True)
    ends = counts.cumsum(0)
    table = torch.stack([lows, ends - counts, ends], 1)
    return [tuple(row) for row in table[span[ends - 1] >= _SHORT].tolist()]
