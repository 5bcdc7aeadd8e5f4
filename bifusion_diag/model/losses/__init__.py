"""Losses: ground truth and matching, one file a term, the schedule of the weights, and the criterion that sums them.

=========================  ===================================================================================
``criterion``              :class:`Criterion`: all terms by name, weights, total
``schedule``               weights in the course of a run
``targets``                ground truth at point and superpoint level
``matcher``                which query is responsible for which object
``semantic``               cross-entropy over the semantic classes
``instance``               ESAM's, Mask3D's and document 003's instance loss: ``classification``, ``masks``, ``boxes``
``clip_align``             2D and 3D features together
``spatial_consistency``    similar features of neighbouring points
``no_view``                pseudo-labels for points that no view sees
=========================  ===================================================================================
"""

from bifusion_diag.model.losses.criterion import Criterion

__all__ = ["Criterion"]
