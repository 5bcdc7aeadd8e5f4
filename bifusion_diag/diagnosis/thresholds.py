"""The bounds of the rules, in one typed table. Why each is what it is stands in its description."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bifusion_diag.errors import UserError, near_matches

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Factor = Annotated[float, Field(gt=1.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Thresholds(BaseModel):
    """When a rule fires."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_steps: Count = Field(
        50, description="fewer steps than this are not enough to call a run stable: the spike detector's full window"
    )
    spike_rate: Share = Field(
        0.01, description="above this share of spikes a run is unstable; healthy runs from scratch have none"
    )
    clipped_share: Share = Field(
        0.9,
        description="above this share clipping is the rule and not the exception: the step length no longer follows "
        "the gradient",
    )
    alpha_low: Share = Field(0.3, description="lower end of the documents' band of the mean α")
    alpha_high: Share = Field(0.7, description="its upper end")
    alpha_stuck: Positive = Field(
        1e-6,
        description="below this standard deviation over steps the mean α does not move after the warm-up; float32 "
        "noise of a mean of thousands of sigmoids is about 1e-7",
    )
    saturated_share: Share = Field(
        0.5,
        description="above this share of α outside [.05, .95] the sigmoid passes less than 5 % of its slope for most "
        "points",
    )
    valid_share: Share = Field(
        0.2, description="below this mean share of points with a valid view, 2D features reach few points"
    )
    clip_absmax: Positive = Field(
        10.0, description="document 002 clamps features to ±10; past the projection head they are expected within"
    )
    norm_ratio: Positive = Field(
        10.0, description="above this ratio of the 2D and 3D norms (or below its inverse) one branch drowns the other"
    )
    alike_features: Share = Field(
        0.95,
        description="above this mean cosine of two points' features they have collapsed; healthy young runs have 0.35 "
        "to 0.55 (3D) and 0.4 to 0.8 (2D). As uniformity, -4 (1 - cos), this is -0.2",
    )
    flow_error: Positive = Field(
        0.01,
        description="a measured share of the gradient that is further from the declared one is another; rounding in "
        "float32 is about 1e-6",
    )
    temperature_gain: Positive = Field(
        20.0,
        description="above this slope of the alignment loss per pair its temperature is below 0.05; the documents' "
        "0.07 is bounded by 14.3, and that is no explosion",
    )
    dominant_gradient: Share = Field(
        0.5, description="above this share of the gradient on shared weights one term has more than all others together"
    )
    near_zero_norm: Positive = Field(
        1e-4,
        description="below this L2 norm a normalisation multiplies the gradient by more than 10,000; healthy features "
        "that are normalised have norms of 0.5 and more",
    )
    captured_distance: Positive = Field(
        0.01,
        description="[m] what is projected may be this far from the captured points; rounding is about 1e-6, the "
        "smallest augmentation some centimetres",
    )
    background_low: Share = Field(
        0.2, description="below this share of the classification's weights the background hardly counts"
    )
    background_high: Share = Field(
        0.95, description="above this share the background is nearly all of the classification's weights"
    )
    weight_factor: Positive = Field(
        1.05, description="weights that differ by a smaller factor from the baseline's are the same but for rounding"
    )
    far_coordinate: Positive = Field(
        100.0, description="[m] no room reaches this far; a far outlier of a depth camera does"
    )
    far_depth: Positive = Field(
        20.0, description="[m] depth cameras read up to 10 m; 65.535 m is the mark of no reading in millimetres"
    )
    schedule_distance: Count = Field(
        2, description="changes by plan that are at most so many steps apart fall on each other"
    )
    schedule_jump: Positive = Field(
        3.0,
        description="medians of 10 steps after and before a change that differ by more are a jump; healthy swings "
        "between single steps reach 6, their medians 2",
    )
    spent_rate: Share = Field(
        0.05,
        description="below this share of its largest the learning rate is spent: what is released then stays as it is",
    )
    dominant_term: Share = Field(
        0.9,
        description="above this share of the loss, or of the gradient on shared weights, one term is nearly all of it",
    )
    conflict_cosine: Share = Field(
        0.3,
        description="terms whose gradients' median cosine is below its negative pull apart; gradients of n weights "
        "that have nothing to do with each other have cosines of about ±1/√n, far nearer to 0",
    )
    conflict_share: Share = Field(
        0.1, description="a term with less of the gradient than this is no party to a conflict: the other one wins"
    )
    drift_factor: Factor = Field(
        4.0,
        description="a gradient norm that grows by so much after the beginning drifts; it falls or stays in healthy "
        "runs",
    )
    exploding_factor: Factor = Field(
        10.0, description="a module's gradient or output that grows by so much after the beginning is out of proportion"
    )
    exploding_share: Share = Field(
        0.5, description="from this share of the squared gradient norm on one module decides the length of the whole"
    )
    activation_absmax: Positive = Field(
        1000.0,
        description="outputs that grow beyond it are on their way to 65,504, float16's largest number; normalised "
        "features stay below 100",
    )
    vanishing_share: Share = Field(
        1e-4,
        description="below this share of the upper quartile of all modules, a weight and beside the weights, a "
        "gradient is next to nothing; the layers of a healthy model lie within a factor of 1,000 of each other",
    )
    dead_share: Share = Field(
        0.999,
        description="from this share of zeros on at every step a ReLU is dead; sparse ones that work have a few units "
        "alight in some batch",
    )
    update_ratio_high: Positive = Field(
        0.1,
        description="an update longer than this share of its weights replaces them within ten steps; usual is 0.001",
    )
    update_ratio_low: Positive = Field(
        1e-6, description="at a shorter update than this share a weight needs a million steps to change by its own size"
    )
    skipped_share: Share = Field(
        0.05,
        description="above this share of steps left out a GradScaler does not settle; with its defaults it tries a "
        "larger scale once in 2,000 steps, which may cost one",
    )
    amp_scale: Positive = Field(
        1.0, description="below this scale float16 loses small gradients that it would keep without any scaling"
    )
    learning_steps: Count = Field(
        200, description="fewer steps may all lie in a warm-up: a loss that has not fallen in them proves nothing"
    )
    divergence_share: Share = Field(
        0.5,
        description="a loss that has climbed back by more than this share of what it had fallen has lost what it "
        "learnt",
    )
    few_rows: Count = Field(
        16,
        description="audit: fewer rows than this are too few for BatchNorm's statistics: the variance of 16 samples is "
        "off by a third",
    )
    few_points: Count = Field(
        100,
        description="a crop with fewer points is a handful of voxels; ScanNet's evaluation ignores objects that small",
    )
    stage_steps: Count = Field(10, description="audit: AdamW's mean looks back over so many steps")
    release_rate: Share = Field(
        0.001, description="audit: what is released at a smaller share of the learning rate does not learn any more"
    )
    new_terms_share: Share = Field(
        0.7,
        description="audit: above this share of the trunk's gradient, terms that the baseline has not decide what the "
        "trunk learns",
    )
    unlabelled_share: Share = Field(
        0.9, description="audit: above this share of points without a class little is taught"
    )
    augmentation_gain: Share = Field(
        0.1,
        description="audit: other coordinates that agree with the depth of so many more points are the captured ones; "
        "by chance it is a few in a hundred",
    )
    expected_events: Positive = Field(
        0.05,
        description="audit: a step that is expected more often than this in the whole run, once in 20 runs, is to be "
        "reckoned with",
    )


DEFAULT_THRESHOLDS = Thresholds()


def read_thresholds(file: Path | None = None, assignments: Iterable[str] = ()) -> Thresholds:
    """The defaults with those of a YAML file and then with these on top.

    Args:
        file: YAML, threshold → number.
        assignments: each "threshold=number".

    Raises:
        UserError: an unknown threshold, or a number that it cannot be.
    """
    given: dict[str, Any] = {}
    if file is not None:
        try:
            stored = yaml.safe_load(file.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(
                f"{file}: cannot be read as YAML ({error}). Thresholds are lines such as spike_rate: 0.02"
            ) from None
        if not isinstance(stored, dict | None):
            raise UserError(f"{file}: holds no table. Thresholds are lines such as spike_rate: 0.02")
        given |= stored or {}
    for assignment in assignments:
        name, sign, number = assignment.partition("=")
        if not sign:
            raise UserError(f"--threshold {assignment}: write it as name=number, such as spike_rate=0.02")
        given[name.strip()] = number.strip()
    for name in given:
        if name not in Thresholds.model_fields:
            raise UserError(
                f"there is no threshold {name!r}.{near_matches(str(name), Thresholds.model_fields)} "
                "`bifusion-diag rules --thresholds` lists them."
            )
    try:
        return Thresholds.model_validate(given)
    except ValidationError as error:
        wrong = error.errors()[0]
        name = ".".join(map(str, wrong["loc"]))
        raise UserError(f"threshold {name}={wrong['input']!r}: {wrong['msg'].lower()}") from None
