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
    dominant_term: Share = Field(0.9, description="above this share of the loss one term is nearly all of it")


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
