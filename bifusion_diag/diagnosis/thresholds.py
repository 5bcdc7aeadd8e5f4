"""The bounds of the rules, in one typed table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Thresholds:
    """When a rule fires.

    Attributes:
        min_steps: fewer steps than this are not enough to call a run stable: the spike detector's full window.
        spike_rate: above this share of spikes a run is unstable. Healthy runs from scratch have none.
        clipped_share: above this share, clipping is the rule and not the exception: the step length no longer follows
            the gradient.
        alpha_low: lower end of the documents' band of the mean α.
        alpha_high: its upper end.
        alpha_stuck: below this standard deviation over steps, the mean α does not move after the warm-up; float32 noise
            of a mean of thousands of sigmoids is about 1e-7.
        saturated_share: above this share of α outside [.05, .95] the sigmoid passes less than 5 % of its slope for most
            points.
        valid_share: below this mean share of points with a valid view, 2D features reach few points.
        clip_absmax: document 002 clamps features to ±10; features past the projection head are expected within.
        norm_ratio: above this ratio of the 2D and 3D norms (or below its inverse), one branch drowns the other.
        dominant_term: above this share of the loss, one term is nearly all of it.
    """

    min_steps: int = 50
    spike_rate: float = 0.01
    clipped_share: float = 0.9
    alpha_low: float = 0.3
    alpha_high: float = 0.7
    alpha_stuck: float = 1e-6
    saturated_share: float = 0.5
    valid_share: float = 0.2
    clip_absmax: float = 10.0
    norm_ratio: float = 10.0
    dominant_term: float = 0.9


DEFAULT_THRESHOLDS = Thresholds()
