"""Spikes of the pre-clip gradient norm: one definition, for a whole run and for a run that is going on.

A step with norm g is a spike if g > 8 × the median of the previous 50 norms **and** log g lies more than 6 robust
standard deviations above the median of their logarithms; the robust standard deviation is 1.4826 · MAD of log g over
the same 50. Natural swings of a healthy run from scratch reach 6 × and are not spikes.

Only finite, positive norms are judged or serve as "previous": a non-finite step is counted elsewhere, and zero has no
logarithm. A step with fewer than 10 previous norms is not judged.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

WINDOW = 50
MIN_PREVIOUS = 10
FACTOR = 8.0
DEVIATIONS = 6.0
MAD_TO_STD = 1.4826  # of a normal distribution
_CHUNK = 65_536  # windows a pass: bounds the memory at about 25 MB


class Spikes(NamedTuple):
    """What was found in K norms."""

    is_spike: NDArray[np.bool_]  # (K,)
    judged: NDArray[np.bool_]  # (K,) the step could be judged
    median: NDArray[np.float64]  # (K,) median of the previous norms; NaN where not judged


class SpikeDetector:
    """The definition for a run that is going on; gives what :func:`find_spikes` gives on the whole series."""

    def __init__(self, previous: Iterable[float] = ()) -> None:
        """``previous``: what :attr:`previous` was when an interrupted run ended."""
        self._previous: deque[float] = deque(previous, maxlen=WINDOW)

    @property
    def previous(self) -> list[float]:
        """The norms that the next one is judged by."""
        return list(self._previous)

    def judge(self, norm: float) -> bool:
        """Whether a next step with this pre-clip gradient norm would be a spike."""
        if not (math.isfinite(norm) and norm > 0) or len(self._previous) < MIN_PREVIOUS:
            return False
        window = np.asarray(self._previous, dtype=np.float64)[None]
        return bool(_judge(window, np.asarray([norm], dtype=np.float64))[0][0])

    def update(self, norm: float) -> bool:
        """Judge the next step's pre-clip gradient norm, then remember it."""
        spike = self.judge(norm)
        if math.isfinite(norm) and norm > 0:
            self._previous.append(float(norm))
        return spike


def find_spikes(norms: ArrayLike) -> Spikes:
    """Judge a whole series of pre-clip gradient norms (K,), in step order, one value a step."""
    values = np.asarray(norms, dtype=np.float64)
    usable = np.flatnonzero(np.isfinite(values) & (values > 0))
    clean = values[usable]
    spike = np.zeros(clean.size, dtype=bool)
    median = np.full(clean.size, np.nan)
    for end in range(MIN_PREVIOUS, min(WINDOW, clean.size)):
        spike[end : end + 1], median[end : end + 1] = _judge(clean[None, :end], clean[end : end + 1])
    if clean.size > WINDOW:
        windows = np.lib.stride_tricks.sliding_window_view(clean[:-1], WINDOW)
        for start in range(0, len(windows), _CHUNK):
            stop = min(start + _CHUNK, len(windows))
            here = slice(WINDOW + start, WINDOW + stop)
            spike[here], median[here] = _judge(windows[start:stop], clean[here])

    is_spike = np.zeros(values.size, dtype=bool)
    judged = np.zeros(values.size, dtype=bool)
    medians = np.full(values.size, np.nan)
    is_spike[usable] = spike
    judged[usable[MIN_PREVIOUS:]] = True
    medians[usable] = median
    return Spikes(is_spike, judged, medians)


def _judge(windows: NDArray[np.float64], norms: NDArray[np.float64]) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Judge norms (K,) against the norms that came before each, windows (K, W): is it a spike, and the median (K,)."""
    median = np.median(windows, axis=1)
    suspect = np.flatnonzero(norms > FACTOR * median)  # the second test is the dear one: only where the first one holds
    spike = np.zeros(norms.size, dtype=bool)
    if suspect.size:
        logs = np.log(windows[suspect])
        centre = np.median(logs, axis=1)
        spread = MAD_TO_STD * np.median(np.abs(logs - centre[:, None]), axis=1)
        spike[suspect] = np.log(norms[suspect]) - centre > DEVIATIONS * spread
    return spike, median
