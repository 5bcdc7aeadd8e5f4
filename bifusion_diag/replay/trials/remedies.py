"""What may help against a bad step: settings of our own models, and changes of the update that any loop can make.

The ids are stable: incidents name them, in ``Incident.remedies``. Numbers in parentheses are the source documents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bifusion_diag.errors import UserError, near_matches
from bifusion_diag.replay.incident import Incident

Patch = Mapping[str, Any]  # dotted key of the settings → its value

BASELINE_PARTS = (0.5, 1.0, 1.0, 0.5, 0.5)  # [class, BCE, Dice, score, box], ESAM's


@dataclass(frozen=True)
class Action:
    """What is done differently around the update, whatever the model and its settings.

    Attributes:
        clip: the gradient is clipped to this norm, before the loop's own clipping, as PyTorch's clip_grad_norm_ does.
        exact: that norm is taken in float64.
        rate: factor of every learning rate.
        skip: an update is left out, and the forward's buffers are taken back, in the bad step and in each step after it
            that is not finite.
        drop: samples of the bad step's batch that are left out.
        zero_bad: gradients that are NaN or infinite become 0, element by element.
        freeze_batchnorm: BatchNorm normalises with its running statistics, as in evaluation.
    """

    clip: float | None = None
    exact: bool = False
    rate: float = 1.0
    skip: bool = False
    drop: tuple[int, ...] = ()
    zero_bad: bool = False
    freeze_batchnorm: bool = False

    def __or__(self, other: Action) -> Action:
        """Both."""
        clips = [clip for clip in (self.clip, other.clip) if clip is not None]
        return Action(
            min(clips, default=None),
            self.exact or other.exact,
            self.rate * other.rate,
            self.skip or other.skip,
            tuple(sorted({*self.drop, *other.drop})),
            self.zero_bad or other.zero_bad,
            self.freeze_batchnorm or other.freeze_batchnorm,
        )


@dataclass(frozen=True)
class Remedy:
    """One change worth trying.

    Attributes:
        id: its name.
        title: in words.
        why: what it does, and the document or paper that it is from.
        patch: (settings, incident) → what changes in our own settings, or in words why it does not apply to them. None:
            no setting does this.
        action: incident → the same for any loop, or why it does not apply. None: a loop knows no such thing.
        code: how a user's loop says it.
        gives_up: what is lost with it; "" for nothing but time.
        documented: the documents ask for it, so that it is tried for every incident that it applies to.
    """

    id: str
    title: str
    why: str
    patch: Callable[[Settings, Incident], Patch | str] | None = None
    action: Callable[[Incident], Action | str] | None = None
    code: str = ""
    gives_up: str = ""
    documented: bool = True


@dataclass(frozen=True)
class Settings:
    """A run's settings as they are stored, read by dotted key; empty for a user's own code."""

    stored: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Any:
        """The value; None where it is not there."""
        value: Any = self.stored
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return None
            value = value[part]
        return value

    @property
    def ours(self) -> bool:
        """They are those of a run of ``bifusion-diag train``."""
        return all(isinstance(self.stored.get(part), Mapping) for part in ("model", "losses", "optim", "data"))

    @property
    def aligns(self) -> bool:
        """CLIP's features are there and aligned with those of 3D."""
        return self.fuses and bool(self["losses.clip_align.weight"])

    @property
    def fuses(self) -> bool:
        """The model has a 2D branch."""
        return self["model.fusion"] != "none" and bool(self["model.clip.use"])


def remedy(name: str) -> Remedy:
    """The remedy of that id.

    Raises:
        UserError: there is none.
    """
    if name not in REMEDIES:
        raise UserError(f"there is no remedy {name!r}.{near_matches(name, REMEDIES)}")
    return REMEDIES[name]


def _isolate_clip(settings: Settings, incident: Incident) -> Patch | str:
    if not settings.aligns:
        return "nothing is aligned with CLIP"
    return {"losses.clip_align.weight": 0.0, "losses.clip_align.gradient_flow": 0.0}


def _clip_grad(settings: Settings, incident: Incident) -> Patch | str:
    limit = settings["optim.clip_grad"]
    return f"optim.clip_grad is {limit:g}" if limit is not None and limit <= 1.0 else {"optim.clip_grad": 1.0}


def _sanitize(settings: Settings, incident: Incident) -> Patch | str:
    if not settings.fuses:
        return "nothing is projected into images"
    if settings["model.projection.sanitize"] == "strict":
        return "camera coordinates are sanitised strictly"
    return {"model.projection.sanitize": "strict"}


def _temperature(settings: Settings, incident: Incident) -> Patch | str:
    if not settings.aligns:
        return "nothing is aligned with CLIP"
    temperature = settings["losses.clip_align.temperature"]
    return f"τ is {temperature:g}" if temperature >= 0.1 else {"losses.clip_align.temperature": 0.1}


def _baseline_weights(settings: Settings, incident: Incident) -> Patch | str:
    if settings["losses.instance.style"] != "esam" or not settings["losses.instance.weight"]:
        return f"the baseline's weights are those of ESAM's parts; the style is {settings['losses.instance.style']!r}"
    wanted = {"losses.instance.parts": list(BASELINE_PARTS), "losses.instance.no_object_weight": 0.1}
    same = tuple(settings["losses.instance.parts"]) == BASELINE_PARTS
    if same and settings["losses.instance.no_object_weight"] == 0.1:
        return "the instance weights are the baseline's"
    return wanted


def _empty_match(settings: Settings, incident: Incident) -> Patch | str:
    if settings["losses.instance.empty_match"] != "nan":
        return "an object that no query matches is skipped already"
    return {"losses.instance.empty_match": "zero"}


def _normalize_order(settings: Settings, incident: Incident) -> Patch | str:
    if not settings.fuses:
        return "nothing is projected into images"
    if settings["model.projection.normalize"] == "before_sampling":
        return "features are normalised before they are sampled"
    return {"model.projection.normalize": "before_sampling"}


def _clamp_features(settings: Settings, incident: Incident) -> Patch | str:
    if not settings.aligns:
        return "nothing is aligned with CLIP"
    clamp = settings["losses.clip_align.clamp"]
    if clamp is not None and clamp <= 10:
        return f"features are clamped to ±{clamp:g}"
    return {"losses.clip_align.clamp": 10.0}


def _exclude(settings: Settings, incident: Incident) -> Patch | str:
    names = [sample.name for sample in incident.samples]
    if not names:
        return "no sample stands out"
    if None in names:
        return "the sample has no name"
    return {"data.exclude": list(dict.fromkeys([*(settings["data.exclude"] or ()), *names]))}


def _drop(incident: Incident) -> Action | str:
    if not incident.samples:
        return "no sample stands out"
    return Action(drop=tuple(sample.index for sample in incident.samples))


REMEDIES: dict[str, Remedy] = {
    one.id: one
    for one in (
        Remedy(
            "isolate-clip",
            "no CLIP loss, no gradient to the 2D side",
            "isolates CLIP's gradients: the emergency measure of phase 1 (000)",
            _isolate_clip,
            gives_up="the term clip_align: 2D and 3D features are not aligned any more",
        ),
        Remedy(
            "clip-grad",
            "gradient clipped to norm 1",
            "bounds the update of every step (000, 001); of a norm that is NaN or infinite it makes no good one",
            _clip_grad,
            lambda incident: Action(clip=1.0),
            code="torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)",
        ),
        Remedy(
            "sanitize",
            "points with non-finite camera coordinates are not valid",
            "makes them harmless (000), which neither a clamp (it keeps NaN) nor the untransformed points do",
            _sanitize,
        ),
        Remedy(
            "temperature",
            "τ of the alignment loss 0.1",
            "bounds the gradient by the cosine by 10 instead of 14.3 at 0.07 (002)",
            _temperature,
        ),
        Remedy(
            "baseline-instance-weights",
            "the baseline's instance weights, no-object 0.1",
            "the aggressive weights undone: phase 2 (000)",
            _baseline_weights,
        ),
        Remedy(
            "empty-match-zero",
            "an object that no query matches is skipped",
            "a mean over nothing is NaN in ESAM's code",
            _empty_match,
        ),
        Remedy(
            "normalize-order",
            "2D features are normalised before they are sampled",
            "points out of view are zero vectors, and normalising those has a gain of 1e12",
            _normalize_order,
        ),
        Remedy(
            "clamp-features",
            "features clamped to ±10 before the cosine",
            "numerical stabilisation (002); a clamped element has no gradient",
            _clamp_features,
        ),
        Remedy(
            "drop-sample",
            "without the sample",
            "leaves out what the step went wrong on",
            _exclude,
            _drop,
            code="leave the sample out of the data set",
            gives_up="what the sample teaches",
        ),
        Remedy(
            "lower-lr",
            "a tenth of the learning rate",
            "smaller updates (001)",
            lambda settings, incident: {"optim.lr": float(f"{settings['optim.lr'] * 0.1:.6g}")},
            lambda incident: Action(rate=0.1),
            code="for group in optimizer.param_groups: group['lr'] *= 0.1",
            gives_up="speed: every step moves a tenth as far",
        ),
        Remedy(
            "skip-step",
            "the update of a bad step is left out",
            "what the step would have spoilt stays as it was, buffers included",
            lambda settings, incident: {"incidents.policy": "skip"},
            lambda incident: Action(skip=True),
            code='FlightRecorder(step_fn, on_incident="skip")',
            gives_up="what the other samples of the batch teach in that step",
        ),
        Remedy(
            "larger-batch",
            "twice as many scenes a step",
            "BatchNorm has more rows to take its statistics of",
            lambda settings, incident: {"training.batch_size": 2 * settings["training.batch_size"]},
            gives_up="time: a step costs twice as much",
            documented=False,
        ),
        Remedy(
            "smaller-voxels",
            "voxels of half the size",
            "the coarse levels have more voxels, of which BatchNorm takes its statistics",
            lambda settings, incident: {"model.backbone.voxel_size": settings["model.backbone.voxel_size"] / 2},
            gives_up="time and memory: more voxels on every level",
            documented=False,
        ),
        Remedy(
            "larger-crop",
            "crops of twice the side and points",
            "more of the scene is kept, and with it more voxels on the coarse levels",
            lambda settings, incident: {
                "data.crop_size": 2 * settings["data.crop_size"],
                "data.max_points": 2 * settings["data.max_points"],
            },
            gives_up="time and memory: more points a scene",
            documented=False,
        ),
        Remedy(
            "freeze-batchnorm",
            "BatchNorm with its running statistics",
            "the gain of a normalisation over few rows, 1/√(variance + ε), is gone",
            action=lambda incident: Action(freeze_batchnorm=True),
            code="for m in model.modules():\n    if isinstance(m, nn.modules.batchnorm._BatchNorm): m.eval()",
            gives_up="running statistics that follow the weights",
            documented=False,
        ),
        Remedy(
            "zero-bad-gradients",
            "gradients that are not finite become 0",
            "one NaN in one gradient makes every gradient NaN when the norm is clipped",
            action=lambda incident: Action(zero_bad=True),
            code="for p in model.parameters():\n    if p.grad is not None: p.grad.nan_to_num_(0, 0, 0)",
            gives_up="the sight of where they come from",
            documented=False,
        ),
        Remedy(
            "exact-norm",
            "clipping by a norm taken in float64",
            "a float32 norm of finite gradients can be infinite: the update is lost",
            action=lambda incident: Action(clip=1.0, exact=True),
            code="norm = torch.stack([g.double().norm() for g in gradients]).norm(); scale by min(1, 1 / norm)",
            documented=False,
        ),
    )
}
