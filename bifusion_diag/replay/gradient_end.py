"""Why a module that runs gets no gradient."""

from __future__ import annotations

from bifusion_diag.replay.incident import Cause
from bifusion_diag.replay.notes import StepNotes
from bifusion_diag.replay.step import Training


def where_gradient_ends(training: Training, notes: StepNotes, module: str) -> Cause | None:
    """Where the gradient of a module that runs is lost on its way from the loss. Changes nothing.

    The direction is "graph" where there is no way: its parameters do not require a gradient ("requires_grad=False"), its
    output is cut off (the operation that did it, such as "Tensor.detach", or "no_grad"), or the loss does not depend on
    it ("unused"). It is "backward" where there is a way, on which the gradient becomes exactly zero: the first node or
    hook that made it so. None: the module gets a gradient.

    Raises:
        UserError: the model has no module of that name that owns parameters.
    """
    raise NotImplementedError
