"""How good predictions are: each metric in a file of its own, on plain arrays, so that it can be computed by hand.

=====================  ==========================================================
``average_precision``  AP, AP50 and AP25 of instance masks, by ScanNet's protocol
``semantic``           mean IoU over the semantic classes
``alignment``          how well 2D and 3D features agree, and how evenly they lie
=====================  ==========================================================
"""

from bifusion_diag.evaluation.alignment import AlignmentMean, UniformityMean
from bifusion_diag.evaluation.average_precision import AveragePrecision, InstanceScene, average_precision
from bifusion_diag.evaluation.semantic import SemanticIoU

__all__ = [
    "AlignmentMean",
    "AveragePrecision",
    "InstanceScene",
    "SemanticIoU",
    "UniformityMean",
    "average_precision",
]
