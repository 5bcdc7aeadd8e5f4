"""Weights of other projects, and of earlier runs, in this project's modules.

================  ====================================================================
``load``          :func:`load_weights`: reads a file, recognises its layout, loads it
``report``        :class:`LoadReport`: what was loaded, what was not, and why
``layout``        :class:`Layout`: how a project names its weights, and ours for them
``esam``          ESAM and OneFormer3D
``mask3d``        Mask3D
``res16unet``     a sparse U-Net alone
``own``           this project's checkpoints
================  ====================================================================
"""

from bifusion_diag.model.checkpoints.load import load_weights
from bifusion_diag.model.checkpoints.report import LoadReport, MisShaped

__all__ = ["LoadReport", "MisShaped", "load_weights"]
