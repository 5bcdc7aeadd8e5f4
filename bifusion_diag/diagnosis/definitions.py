"""What every measure of stability means: one definition each, shown wherever the number is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Definition:
    """One measure.

    Attributes:
        key: its name in records and tables; one that ends in "/*" is a family, one member a term, module or place.
        title: in words.
        text: how it is computed.
        better: which direction is more stable, or of a validation metric the better one; "" where neither is.
        group: the table that it is shown in.
    """

    key: str
    title: str
    text: str
    better: Literal["lower", "higher", ""]
    group: str


_RUN = "Bad steps"
_NORM = "Pre-clip gradient norm"
_LOSS = "Loss terms"
_UPDATE = "Update ratio ‖Δw‖ ÷ ‖w‖"
_INSIDE = "Inside the model"
_DATA = "Data"
_TIME = "Time and memory"
_CLIP = "CLIP features"
_VIEW = "Projection"
_GATE = "Gate α"
_EVAL = "Validation"
_AT = "At the last evaluation (of two runs: at the last step at which both were evaluated)"

DEFINITIONS: tuple[Definition, ...] = (
    Definition("steps", "recorded steps", "Steps in the record.", "", _RUN),
    Definition("bad_steps", "bad steps", "Steps that are non-finite or a spike of the gradient norm.", "lower", _RUN),
    Definition(
        "nonfinite_steps",
        "non-finite steps",
        "Steps whose total loss, any raw loss term or pre-clip gradient norm is NaN or infinite.",
        "lower",
        _RUN,
    ),
    Definition("first_nonfinite_step", "first non-finite step", "The first of the non-finite steps.", "", _RUN),
    Definition(
        "spikes",
        "spikes",
        "Steps with a pre-clip gradient norm above 8 × the median of the previous 50 finite ones and more than 6 "
        "robust standard deviations (1.4826 · MAD) above the median of their logarithms.",
        "lower",
        _RUN,
    ),
    Definition(
        "spike_rate", "spike rate", "Spikes ÷ steps that could be judged (at least 10 earlier norms).", "lower", _RUN
    ),
    Definition("grad_norm/p50", "median", "Of the finite pre-clip gradient norms.", "", _NORM),
    Definition("grad_norm/p95", "95th percentile", "Of the finite pre-clip gradient norms.", "lower", _NORM),
    Definition("grad_norm/p99", "99th percentile", "Of the finite pre-clip gradient norms.", "lower", _NORM),
    Definition("grad_norm/max", "maximum", "Of the finite pre-clip gradient norms.", "lower", _NORM),
    Definition(
        "grad_cv", "spread (MAD ÷ median)", "Median absolute deviation ÷ median of the finite norms.", "lower", _NORM
    ),
    Definition(
        "clipped_share", "clipped steps", "Share of steps whose gradient was shrunk by clipping.", "lower", _NORM
    ),
    Definition("shrink_factor", "mean shrink factor", "Mean clip coefficient of the clipped steps.", "higher", _NORM),
    Definition(
        "update_ratio/p50", "median", "Median over modules of the median over steps of ‖Δw‖ ÷ ‖w‖.", "", _UPDATE
    ),
    Definition(
        "update_ratio/max",
        "largest",
        "Of any module at any step, where finite; 1 where all that moved was zero before.",
        "lower",
        _UPDATE,
    ),
    Definition("updates/skipped", "skipped", "Steps in which no optimiser has updated anything.", "lower", _UPDATE),
    Definition(
        "loss_share/*",
        "share of the loss",
        "Mean over steps of |weighted term| ÷ Σ |weighted terms|, where all terms are finite.",
        "",
        _LOSS,
    ),
    Definition(
        "gradient_share/*",
        "share of the gradient",
        "Median over steps of the norm of the weighted term's gradient on shared modules ÷ the sum of all norms.",
        "",
        _LOSS,
    ),
    Definition(
        "gradient_cosine/*",
        "cosine of gradients",
        "Median over steps, of two terms' gradients on shared modules; below 0 they pull in opposite directions.",
        "",
        _LOSS,
    ),
    Definition(
        "gradient_conflict", "smallest cosine", "Median over steps of the smallest of these cosines.", "", _LOSS
    ),
    Definition(
        "activations/nonfinite",
        "modules with a non-finite output",
        "Modules with a NaN or infinity in an output at any step.",
        "lower",
        _INSIDE,
    ),
    Definition(
        "weights/nonfinite",
        "modules with non-finite weights",
        "Modules with a NaN or infinity in their own weights at any step.",
        "lower",
        _INSIDE,
    ),
    Definition(
        "attention/masked_rows",
        "attention rows without a key",
        "Queries whose mask leaves no key to see, summed over modules and steps: a softmax over nothing.",
        "lower",
        _INSIDE,
    ),
    Definition(
        "attention/max_logit", "largest |attention logit|", "Of any module at any measured step.", "lower", _INSIDE
    ),
    Definition(
        "matching/empty",
        "scenes without a match",
        "Scenes with objects, none of which a query is matched with, summed over steps.",
        "lower",
        _INSIDE,
    ),
    Definition(
        "matching/unmatched",
        "objects without a query",
        "That no query is matched with, summed over steps.",
        "",
        _INSIDE,
    ),
    Definition("matching/queries_min", "fewest matched queries", "Of any scene at any step.", "", _INSIDE),
    Definition(
        "normalize/smallest",
        "smallest norm divided by",
        "Smallest norm or standard deviation, without ε, by which any normalisation divides; its gain is 1 over it.",
        "higher",
        _INSIDE,
    ),
    Definition("clip/*/min", "minimum", "Smallest value of any step.", "", _CLIP),
    Definition("clip/*/max", "maximum", "Largest value of any step.", "", _CLIP),
    Definition("clip/*/absmax", "largest |x|", "Largest absolute value of any step.", "lower", _CLIP),
    Definition("clip/*/p99.9", "99.9th percentile of |x|", "Median over steps.", "lower", _CLIP),
    Definition("clip/*/share_gt_10", "share of |x| > 10", "Mean over steps.", "lower", _CLIP),
    Definition("clip/*/norm_mean", "mean norm", "Median over steps of the mean feature norm.", "", _CLIP),
    Definition("clip/*/nonfinite", "non-finite values", "Summed over steps.", "lower", _CLIP),
    Definition("clip/ratio_2d_3d", "2D : 3D norm ratio", "Median over steps.", "", _CLIP),
    Definition("projection/points", "points", "Summed over steps.", "", _VIEW),
    Definition("projection/nan", "NaN coordinates", "Pairs of a point and a view, summed over steps.", "lower", _VIEW),
    Definition(
        "projection/inf", "infinite coordinates", "Pairs of a point and a view, summed over steps.", "lower", _VIEW
    ),
    Definition("projection/behind", "behind the camera", "Pairs, summed over steps.", "", _VIEW),
    Definition("projection/outside", "outside the image", "Pairs, summed over steps.", "", _VIEW),
    Definition(
        "projection/occluded",
        "occluded",
        "Pairs at which the depth image disagrees or is blank, summed over steps.",
        "",
        _VIEW,
    ),
    Definition("projection/valid", "valid", "Points visible in some view, summed over steps.", "higher", _VIEW),
    Definition("projection/valid_share", "valid share", "Mean over steps.", "higher", _VIEW),
    Definition("projection/valid_share_min", "lowest valid share", "Of any step.", "higher", _VIEW),
    Definition("gate/mean", "mean α", "Mean over steps of the mean weight of the 2D feature.", "", _GATE),
    Definition("gate/share_lt_0.05", "share of α < .05", "Mean over steps.", "lower", _GATE),
    Definition("gate/share_gt_0.95", "share of α > .95", "Mean over steps.", "lower", _GATE),
    Definition(
        "eval/miou",
        "mIoU",
        f"{_AT}: mean over the semantic classes in the validation scenes of points that are and are "
        "called the class ÷ points that are or are called it.",
        "higher",
        _EVAL,
    ),
    Definition("eval/miou_best", "best mIoU", "Of all evaluations.", "higher", _EVAL),
    Definition(
        "eval/ap",
        "AP, class-agnostic",
        f"{_AT}: average precision of the instance masks by ScanNet's script, mean over the IoU "
        "thresholds .50, .55, ... .90.",
        "higher",
        _EVAL,
    ),
    Definition("eval/ap50", "AP50", f"{_AT}: at IoU .50.", "higher", _EVAL),
    Definition("eval/ap50_best", "best AP50", "Of all evaluations.", "higher", _EVAL),
    Definition("eval/ap25", "AP25", f"{_AT}: at IoU .25.", "higher", _EVAL),
    Definition(
        "eval/alignment",
        "alignment of 2D and 3D",
        f"{_AT}: mean cosine between the 2D and the 3D feature of the valid points.",
        "higher",
        _EVAL,
    ),
    Definition(
        "eval/uniformity",
        "uniformity of 3D features",
        f"{_AT}: log of the mean over pairs of a scene of exp(−2 ‖x − y‖²), normalised. 0: collapsed.",
        "lower",
        _EVAL,
    ),
    Definition(
        "data/nonfinite", "non-finite values", "In all fields of the batches, summed over steps.", "lower", _DATA
    ),
    Definition("data/out_of_range", "labels out of range", "Ids that no class has, summed over steps.", "lower", _DATA),
    Definition(
        "data/ignored_share", "labels ignored", "Mean share over steps; of several label fields the largest.", "", _DATA
    ),
    Definition(
        "data/fewest_rows",
        "smallest entry of a batch",
        "Rows of the shortest tensor of any list in any batch; 0: an empty scene.",
        "",
        _DATA,
    ),
    Definition(
        "throughput/step_seconds", "step [s]", "Median over steps, as all times here; without loading.", "lower", _TIME
    ),
    Definition(
        "throughput/data_seconds",
        "between steps [s]",
        "From one step block to the next: loading, and what else the loop does there, such as evaluation.",
        "lower",
        _TIME,
    ),
    Definition("throughput/forward_seconds", "forward [s]", "Forward and loss.", "lower", _TIME),
    Definition("throughput/backward_seconds", "backward [s]", "From the first gradient to the last.", "lower", _TIME),
    Definition("throughput/update_seconds", "update [s]", "The optimisers' step().", "lower", _TIME),
    Definition("throughput/peak_resident_mib", "memory of the process [MiB]", "Its peak.", "lower", _TIME),
    Definition("throughput/device_peak_mib", "CUDA memory [MiB]", "Peak of what tensors take.", "lower", _TIME),
)

_BY_KEY = {definition.key: definition for definition in DEFINITIONS}


def is_defined(key: str) -> bool:
    """Whether a measure has a definition: an older program may have stored one that is no more."""
    try:
        definition_of(key)
    except KeyError:
        return False
    return True


def definition_of(key: str) -> Definition:
    """The definition of a measure, or of the family that it belongs to.

    Raises:
        KeyError: no definition has that key.
    """
    if key in _BY_KEY:
        return _BY_KEY[key]
    first, _, rest = key.partition("/")
    if first == "clip":  # clip/<where>/<statistic>
        return _BY_KEY[f"clip/*/{rest.split('/', 1)[-1]}"]
    return _BY_KEY[f"{first}/*"]


def member_of(key: str) -> str:
    """The term, module or place of a measure of a family; "" for a measure of its own."""
    if key in _BY_KEY:
        return ""
    first, _, rest = key.partition("/")
    return rest.split("/", 1)[0] if first == "clip" else rest
