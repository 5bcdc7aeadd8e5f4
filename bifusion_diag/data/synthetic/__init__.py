"""Procedural indoor rooms, ray-cast to RGB-D: ground truth without a download.

==============  ==============================================================================
``rooms``       :class:`SyntheticRooms`, the scene source
``room``        layout: shell, openings, furniture
``furniture``   builders of single pieces, from ``fittings``; ``maker`` draws sizes and materials
``solids``      the primitives; ``texture`` their surfaces
``raycast``     what every pixel sees; ``render`` its colour
``camera``      path, intrinsics and depth sensor
``flaws``       flaws of real captures, on demand
==============  ==============================================================================
"""

from bifusion_diag.data.synthetic.rooms import SyntheticRooms

__all__ = ["SyntheticRooms"]
