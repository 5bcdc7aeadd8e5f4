"""The plots of a report: each a small function from a run to an SVG."""

from bifusion_diag.reports.plots.features import draw_alpha, draw_clip_ranges, draw_projection, draw_terms
from bifusion_diag.reports.plots.heatmap import QUANTITIES, Quantity, draw_heatmap
from bifusion_diag.reports.plots.instruments import draw_gradients, draw_throughput, draw_updates
from bifusion_diag.reports.plots.timeline import Trace, draw_timeline
from bifusion_diag.reports.plots.validation import draw_validation

__all__ = [
    "QUANTITIES",
    "Quantity",
    "Trace",
    "draw_alpha",
    "draw_clip_ranges",
    "draw_gradients",
    "draw_heatmap",
    "draw_projection",
    "draw_terms",
    "draw_throughput",
    "draw_timeline",
    "draw_updates",
    "draw_validation",
]
