"""Every fault by name: where it strikes, how long it lasts, and how it ought to be found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from bifusion_diag.config.settings import LossSettings
from bifusion_diag.training.faults import batches, outputs, states

Place = Literal["forward", "backward", "loss", "data", "optimizer", "after backward", "ranks"]
Where = Literal["module", "term", "sample", "rank", ""]
Point = Literal["output", "term", "criterion", "batch", "weights", "gradients", "rates"]


@dataclass(frozen=True)
class Fault:
    """One way to break a step.

    Attributes:
        name: for ``--inject NAME@STEP[:WHERE]``.
        place: in which part of training.
        where: what WHERE names; "": nothing.
        lasts: from STEP on; else in STEP alone.
        silent: nothing becomes NaN or infinite.
        kinds: the incident that it is found as is of one of these; of :data:`bifusion_diag.replay.incident.KINDS`.
        description: what it does.
        point: which hook point it acts at.
        act: what is done there.
        default: WHERE if it is not given; "" = the first that the model has of
            :data:`bifusion_diag.training.faults.inject.MODULES`, the first term, sample 0, rank 1.
    """

    name: str
    place: Place
    where: Where
    lasts: bool
    silent: bool
    kinds: tuple[str, ...]
    description: str
    point: Point
    act: Callable[..., Any]
    default: str = ""


def _cold(settings: LossSettings) -> LossSettings:
    align = settings.clip_align.model_copy(update={"temperature": 1e-4})
    return settings.model_copy(update={"clip_align": align})


_LOSS, _GRADIENT = ("nonfinite-loss",), ("nonfinite-gradient",)
_HIGH = ("gradient-spike", "loss-spike")
_CUT = ("detached-module", "dead-module", "frozen-module")
_LABELS = ("loss-spike", "loss-shift", "gradient-spike")
_JUMP = ("update-jump", "gradient-spike", "loss-spike", "loss-shift")
_ALTERED = ("altered-gradient", "nonfinite-gradient")

_BATCHNORM = "encoder.backbone.bn1"

FAULTS: dict[str, Fault] = {
    fault.name: fault
    for fault in (
        # forward: a module's output
        Fault("nan-output", "forward", "module", False, False, _LOSS,
              "one element of the module's output is NaN", "output", outputs.one_nan),
        Fault("inf-output", "forward", "module", False, False, _LOSS,
              "one element of the module's output is infinite", "output", outputs.one_inf),
        Fault("scale-output", "forward", "module", False, True, _HIGH,
              "the module's output × 10,000", "output", lambda x: x * 1e4),
        Fault("log-zero", "forward", "module", False, False, _LOSS,
              "log(relu(x)) is added to the module's output x: −∞ where a feature is negative", "output",
              outputs.log_of_relu),
        Fault("exp-overflow", "forward", "module", False, False, _LOSS,
              "log(1 + exp(s·x)) is added to the module's output x without care: exp overflows", "output",
              outputs.naive_softplus),
        Fault("masked-softmax", "forward", "module", False, False, _LOSS,
              "the first row of the module's output is weighted by a softmax that is masked everywhere", "output",
              outputs.masked_softmax),
        Fault("zero-output", "forward", "module", True, True, (*_CUT, *_LABELS),
              "the module's output × 0: what it learns from is 0", "output", lambda x: x * 0),
        # backward: the gradient that arrives at a module's output
        Fault("sqrt-zero", "backward", "module", False, False, _GRADIENT,
              "√0 is added to the module's output: its derivative is infinite, the forward stays as it is", "output",
              outputs.root_of_zero),
        Fault("nan-gradient", "backward", "module", False, False, _GRADIENT,
              "one element of the gradient that arrives at the module's output is NaN", "output",
              outputs.with_gradient(outputs.one_nan)),
        Fault("scale-gradient", "backward", "module", False, True, ("gradient-spike",),
              "the gradient that arrives at the module's output × 1,000", "output",
              outputs.with_gradient(lambda gradient: gradient * 1e3)),
        Fault("zero-gradient", "backward", "module", True, True, _CUT,
              "the gradient that arrives at the module's output × 0", "output",
              outputs.with_gradient(lambda gradient: gradient * 0)),
        Fault("detach", "backward", "module", True, True, _CUT,
              "the module's output is detached from the graph", "output", lambda x: x.detach()),
        # loss: one term
        Fault("nan-term", "loss", "term", False, False, _LOSS, "the term is NaN, as 0 / 0 is", "term",
              lambda term: term * (term.new_zeros(()) / term.new_zeros(()))),
        Fault("scale-term", "loss", "term", False, True, _HIGH, "the term × 1,000", "term", lambda term: term * 1e3),
        Fault("empty-match", "loss", "term", False, False, _LOSS,
              "the term is a mean over nothing: NaN with finite gradients", "term", outputs.empty_mean,
              "instance_mask"),
        Fault("flip-term", "loss", "term", True, True, ("loss-shift", "loss-spike", "gradient-spike"),
              "the term's sign is turned: training goes uphill", "term", lambda term: -term),
        Fault("low-temperature", "loss", "", False, True, _HIGH, "τ of clip_align is 0.0001", "criterion", _cold),
        # data
        Fault("nan-color", "data", "sample", False, False, ("nonfinite-input", "nonfinite-loss"),
              "one point's colour is NaN", "batch", batches.nan_color),
        Fault("nan-depth", "data", "sample", False, False, ("nonfinite-input",),
              "one pixel of the depth image is NaN", "batch", batches.nan_depth),
        Fault("lost-pose", "data", "sample", False, False, ("nonfinite-input",),
              "one view's pose is −∞, as ScanNet marks lost tracking", "batch", batches.lost_pose),
        Fault("outlier-color", "data", "sample", False, True, ("input-outlier", *_HIGH),
              "one point's colour is 10,000 standard deviations off", "batch", batches.outlier_color),
        Fault("outlier-point", "data", "sample", False, True, ("input-outlier", *_HIGH),
              "one point lies 500 m away along each axis", "batch", batches.outlier_point),
        Fault("wrong-labels", "data", "sample", False, True, _LABELS,
              "the sample's superpoints have random classes and objects", "batch", batches.wrong_labels),
        Fault("all-labels-wrong", "data", "", True, True, _LABELS,
              "all superpoints have random classes and objects, anew in each step", "batch", batches.all_labels_wrong),
        Fault("swapped-images", "data", "sample", False, True, ("loss-spike", "gradient-spike", "input-outlier"),
              "the sample and the next one have each other's images", "batch", batches.swapped_images),
        Fault("empty-crop", "data", "sample", False, True, ("input-outlier", *_LABELS),
              "three points of the sample are left", "batch", batches.empty_crop),
        # optimiser, weights and buffers
        Fault("high-lr", "optimizer", "", False, True, _JUMP, "every learning rate × 1,000 in one update", "rates",
              lambda group: group.update(lr=group["lr"] * 1e3)),
        Fault("zero-lr", "optimizer", "module", True, True, ("not-updated",),
              "the module's learning rate is 0", "rates", lambda group: group.update(lr=0.0)),
        Fault("nan-moment", "optimizer", "module", False, False, ("nonfinite-weights",),
              "one element of the optimiser's first moment is NaN", "weights", states.nan_moment),
        Fault("zero-second-moment", "optimizer", "module", False, True, _JUMP,
              "the optimiser's second moments of the module are 0", "weights", states.zero_second_moment),
        Fault("not-in-optimizer", "optimizer", "module", True, True, ("not-updated",),
              "the optimiser does not hold the module's parameters", "weights", states.leave_out),
        Fault("frozen", "optimizer", "module", True, True, ("frozen-module", "detached-module"),
              "the module requires no gradient", "weights", states.freeze),
        Fault("scale-weights", "optimizer", "module", False, True, _JUMP,
              "the module's largest weight × 100, outside of an update", "weights", states.scale_weights),
        Fault("nan-weight", "optimizer", "module", False, False, ("nonfinite-loss", "nonfinite-weights"),
              "one element of the module's first weight is NaN", "weights", states.nan_weight),
        Fault("nan-buffer", "optimizer", "module", False, False, ("nonfinite-buffers",),
              "one element of the module's first buffer is NaN", "weights", states.nan_buffer, _BATCHNORM),
        # between the backward and the update
        Fault("nan-grad-element", "after backward", "module", False, False, _ALTERED,
              "one element of a gradient becomes NaN before clipping", "gradients",
              lambda parameters: states.one_gradient(parameters, float("nan"))),
        Fault("inf-grad-element", "after backward", "module", False, False, _ALTERED,
              "one element of a gradient becomes infinite before clipping", "gradients",
              lambda parameters: states.one_gradient(parameters, float("inf"))),
        Fault("huge-gradient", "after backward", "module", False, False, (*_ALTERED, "overflowed-norm"),
              "the module's gradients × 1e25: finite, and the sum of their squares is not", "gradients",
              lambda parameters: states.scale_gradients(parameters, 1e25)),
        Fault("lost-gradient", "after backward", "module", False, True, ("altered-gradient", "dead-module"),
              "the module's gradients are set to 0 before the update", "gradients",
              lambda parameters: states.scale_gradients(parameters, 0.0)),
        # one of several processes
        Fault("rank-nan", "ranks", "rank", False, False, ("nonfinite-input", "nonfinite-loss"),
              "one point's colour in the first sample of one process is NaN", "batch", batches.nan_color),
        Fault("rank-spike", "ranks", "rank", False, True, _HIGH,
              "the first loss term of one process × 1,000", "term", lambda term: term * 1e3),
        Fault("rank-desync", "ranks", "rank", False, True, ("rank-divergence",),
              "the weights of one process are 1 % larger than the others'", "weights", states.desynchronise),
    )
}  # fmt: skip


def fault_table() -> list[tuple[str, str, str, str, str]]:
    """(name, place, what WHERE names, how long it lasts, description) of every fault."""
    return [
        (f.name, f.place, f.where or "-", "from STEP on" if f.lasts else "STEP alone", f.description)
        for f in FAULTS.values()
    ]
