"""Which settings make a run unstable: delta debugging over the differences of two configurations, by short runs."""

from bifusion_diag.experiments.bisect.command import Request, bisect

__all__ = ["Request", "bisect"]
