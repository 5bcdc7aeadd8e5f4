"""A preflight: what a configured run would do, measured on its own first batch before it is trained.

=================  ====================================================================================
``result``         what was found, as plain data
``bench``          the model, the batch, and the gradients that several checks need
``calendar``       the run's phases: where stage, gate or weights of the losses change
``gradient_flow``  what reaches which part from which term; what is frozen and what never learns
``declared_flow``  `gradient_flow` as declared and as measured
``slopes``         gains at the extremes: temperature, normalisation, logarithm
``near_zero``      zero vectors that this configuration normalises
``sanitising``     what becomes of coordinates and poses that are not finite
``balance``        weights of the losses against the baseline's, and their shares of the gradient
``optimiser``      what the optimiser holds against what learns
``schedule``       stage, gate, learning rate and weights over the whole run
``coarse``         BatchNorm over few rows, attention rows without a key
``mechanisms``     how a step goes bad, on this run's own code
``data_scan``      poses, depth, colours, labels, points, views, matches of many scenes
``run``            :func:`audit`: all of them
``terminal``       what is printed
=================  ====================================================================================
"""

from bifusion_diag.experiments.audit.result import Audit, Number, Section, Table
from bifusion_diag.experiments.audit.run import CHECKS, SCENES, SECONDS, audit

__all__ = ["CHECKS", "SCENES", "SECONDS", "Audit", "Number", "Section", "Table", "audit"]
