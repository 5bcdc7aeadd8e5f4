"""How a step goes bad: the mechanisms that are known, by id. docs/mechanisms.md has a section for each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mechanism:
    """One way for a step to go bad.

    Attributes:
        id: stable: it stands in records and capsules.
        title: in words.
        why: how it comes about, in one sentence.
        remedies: ids of :mod:`bifusion_diag.replay.trials.remedies`, the most promising first.
    """

    id: str
    title: str
    why: str
    remedies: tuple[str, ...] = ("skip-step",)


UNKNOWN = "unknown"

MECHANISMS: dict[str, Mechanism] = {
    mechanism.id: mechanism
    for mechanism in (
        Mechanism(
            "empty-selection",
            "A mean over nothing",
            "a mean over an empty selection is 0/0; its gradient reaches nobody, so that all others stay good",
            ("empty-match-zero", "drop-sample"),
        ),
        Mechanism(
            "few-row-batchnorm",
            "BatchNorm over a handful of rows",
            "in train mode BatchNorm divides by the deviation of the rows that it got; where those are few it is tiny, "
            "and its gain 1/√(variance + ε) multiplies the gradient once for each such layer",
            ("freeze-batchnorm", "larger-crop", "larger-batch", "smaller-voxels", "drop-sample", "clip-grad"),
        ),
        Mechanism(
            "nan-through-clipping",
            "One bad gradient spread by clipping",
            "clipping multiplies every gradient by limit / norm, and one bad element makes the norm NaN",
            ("zero-bad-gradients", "skip-step", "drop-sample"),
        ),
        Mechanism(
            "overflowed-norm",
            "The norm overflows in float32",
            "the squares of finite gradients exceed 3.4e38, so that clipping divides by infinity and the step is lost",
            ("exact-norm", "lower-lr", "drop-sample"),
        ),
        Mechanism(
            "poisoned-buffers",
            "Running statistics take in bad values",
            "BatchNorm updates its buffers in the forward, before anything is judged: leaving out the update saves the "
            "weights and leaves evaluation NaN, unless the buffers are taken back too",
            ("skip-step", "sanitize", "drop-sample"),
        ),
        Mechanism(
            "log-of-zero",
            "Logarithm of zero",
            "log(0) is -∞ and its derivative 1/0; log of a negative number is NaN",
            ("drop-sample", "skip-step"),
        ),
        Mechanism(
            "sqrt-at-zero",
            "Square root or norm at zero",
            "the root is finite at zero and its derivative 1/(2√x) is not; times a zero it is NaN",
            ("zero-bad-gradients", "drop-sample", "skip-step"),
        ),
        Mechanism(
            "division-by-zero",
            "Division by zero",
            "the divisor is zero or nearly so: the quotient is infinite, or NaN for 0/0",
            ("drop-sample", "skip-step"),
        ),
        Mechanism(
            "exp-overflow",
            "An exponential overflows",
            "exp(x) is infinite from x = 88.7 on in float32, and from 11.1 on in float16",
            ("clip-grad", "lower-lr", "drop-sample"),
        ),
        Mechanism(
            "half-overflow",
            "A half-precision number overflows",
            "float16 ends at 65504: a larger result is infinite",
            ("lower-lr", "clip-grad", "skip-step"),
        ),
        Mechanism(
            "masked-softmax-row",
            "A softmax row with every entry masked",
            "the softmax of a row of -∞ is 0/0",
            ("drop-sample", "skip-step"),
        ),
        Mechanism(
            "normalise-near-zero",
            "A nearly zero vector is normalised",
            "x/‖x‖ has the gain 1/max(‖x‖, ε): up to 1e12 for the zero vector with PyTorch's ε",
            ("normalize-order", "sanitize", "clip-grad", "drop-sample"),
        ),
        Mechanism(
            "inverse-trig-edge",
            "An inverse function at the edge of its domain",
            "the derivative of acos and asin is 1/√(1-x²), infinite at ±1, and outside them they are NaN",
            ("drop-sample", "skip-step"),
        ),
        Mechanism(
            "nonfinite-input",
            "The batch holds NaN or infinity",
            "what went in was not finite before anything was computed",
            ("sanitize", "drop-sample", "skip-step"),
        ),
        Mechanism(
            "input-outlier",
            "A sample far outside the range of all others",
            "the gradient grows with the input that it is computed of",
            ("drop-sample", "clip-grad", "skip-step"),
        ),
        Mechanism(
            "wrong-labels",
            "A sample whose loss does not fit its input",
            "the input is like all others, and the loss of the sample alone is far above theirs: its labels, or an "
            "example that is truly hard",
            ("drop-sample", "skip-step", "clip-grad", "baseline-instance-weights"),
        ),
        Mechanism(
            "tiny-sample",
            "A sample of a handful of rows",
            "a nearly blank capture leaves so few rows that means, attention and matching over them are extreme",
            ("drop-sample", "larger-crop", "clip-grad"),
        ),
        Mechanism(
            "nonfinite-weights",
            "Weights are NaN or infinite",
            "a weight that is not finite was there before the step began, or was made by its update",
            ("skip-step", "lower-lr"),
        ),
        Mechanism(
            "lr-jump",
            "The learning rate has jumped",
            "the update is proportional to the learning rate, which is far above what it was",
            ("lower-lr", "skip-step"),
        ),
        Mechanism(
            "corrupt-optimizer-state",
            "The optimiser's moments are not those of the gradients",
            "no sequence of gradients leaves such moments, and the update is computed from them",
            ("skip-step", "lower-lr"),
        ),
        Mechanism(
            "weights-changed-outside",
            "Weights were changed outside an update",
            "the weights are not those that the last update left, so that even the last healthy batch is bad now",
            ("skip-step",),
        ),
        Mechanism(
            "detached",
            "A part is cut off from the loss",
            "its output reaches the loss without a graph, or not at all",
            (),
        ),
        Mechanism("frozen", "A part was frozen", "its parameters do not require a gradient any more", ()),
        Mechanism(
            "dead-units",
            "A part's gradient is exactly zero",
            "its output is constant where it is evaluated, as of a ReLU whose inputs are all negative, or it is "
            "multiplied by zero",
            ("lower-lr",),
        ),
        Mechanism(
            "not-in-optimizer", "No optimiser holds a part", "a gradient arrives, and nothing ever applies it", ()
        ),
        Mechanism("zero-lr", "A part's learning rate is zero", "its gradients are applied with the factor 0", ()),
        Mechanism(
            "module-output-jump",
            "A module's output has jumped",
            "the module changes its output by a factor or to values that its inputs and weights do not explain",
            ("skip-step", "clip-grad"),
        ),
        Mechanism(
            "gradient-scaled",
            "A gradient is changed on its way",
            "something between the loss and the optimiser multiplies or replaces the gradient",
            ("skip-step", "clip-grad"),
        ),
        Mechanism(
            "gradients-not-cleared",
            "The gradients of earlier steps are still there",
            "no zero_grad() came between an update and the next backward, which adds its gradients to those that it "
            "finds, so that every update is of the sum of all steps before it",
            (),
        ),
        Mechanism(
            "loss-term-jump",
            "One loss term has jumped",
            "the term or its weight is far above what it was, with the batch and the weights as they were",
            ("isolate-clip", "temperature", "baseline-instance-weights", "clip-grad"),
        ),
        Mechanism(
            "gate-saturated",
            "A fusion gate is saturated",
            "at one end of the sigmoid its derivative α(1-α) is zero: the gate takes one side and does not come back",
            ("lower-lr", "clip-grad", "isolate-clip"),
        ),
        Mechanism(
            "custom-function",
            "A custom function's own backward is wrong",
            "the backward of an autograd.Function was written by hand, and makes a bad gradient of a good one",
            ("zero-bad-gradients", "skip-step"),
        ),
        Mechanism(
            "rank-desync",
            "The processes are not in step",
            "the processes of one run hold different weights, or one of them alone has a bad step",
            ("skip-step",),
        ),
        Mechanism(
            "raised",
            "The step raised an error",
            "the error ended the step before its update",
            ("drop-sample",),
        ),
        Mechanism(
            UNKNOWN, "Not known", "none of the known mechanisms fits what was measured", ("skip-step", "clip-grad")
        ),
    )
}
