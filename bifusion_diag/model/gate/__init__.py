"""Fusion of 2D and 3D features, point by point. All of them return a ``GateOutput``.

============  ==========================================================================  ==================
``simple``    :class:`SimpleFusion`: the mean where a view sees the point                 001, plan A
``lite``      :class:`LiteFusionGate`: α by an MLP on the point's own features            003
``enhanced``  :class:`EnhancedFusionGate`: α after attention over the point's neighbours  003's predecessor
``learned``   :class:`LearnedGate`: what the two learned gates share
============  ==========================================================================  ==================
"""

from __future__ import annotations

from bifusion_diag.config.settings import ModelSettings
from bifusion_diag.model.gate.enhanced import EnhancedFusionGate
from bifusion_diag.model.gate.learned import LearnedGate
from bifusion_diag.model.gate.lite import LiteFusionGate
from bifusion_diag.model.gate.simple import SimpleFusion

__all__ = ["EnhancedFusionGate", "LearnedGate", "LiteFusionGate", "SimpleFusion", "make_gate"]


def make_gate(settings: ModelSettings, *, early_share: float) -> LearnedGate | SimpleFusion:
    """The gate that ``model.fusion`` names.

    Args:
        settings: of a model that has a 2D branch.
        early_share: share of the run for which a learned gate is held at ½.
    """
    if settings.fusion == "simple":
        return SimpleFusion()
    learned = {"lite": LiteFusionGate, "enhanced": EnhancedFusionGate}[settings.fusion]
    return learned(settings.gate, settings.common_width, early_share=early_share)
