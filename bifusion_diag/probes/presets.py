"""Probes that are told where to look, for models with known names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from bifusion_diag.errors import UserError, near_matches
from bifusion_diag.probes.attention import AttentionProbe
from bifusion_diag.probes.base import Probe
from bifusion_diag.probes.catalogue import make_probes
from bifusion_diag.probes.clip import ClipProbe
from bifusion_diag.probes.data import DataProbe
from bifusion_diag.probes.flow import FlowProbe
from bifusion_diag.probes.gate import GateProbe
from bifusion_diag.probes.losses import LossesProbe
from bifusion_diag.probes.matching import MatchingProbe
from bifusion_diag.probes.normalize import NormalizeProbe
from bifusion_diag.probes.projection import ProjectionProbe


def _bifusion() -> list[Probe]:
    """All models of this package: without the attention of the CLIP tower, which never changes."""
    return [
        ClipProbe(head=("encoder.spatial_head",)),
        FlowProbe(modules=("criterion",)),
        ProjectionProbe(modules=("encoder.projection",)),
        GateProbe(modules=("encoder.gate",)),
        AttentionProbe(modules=("decoder.*",)),
        MatchingProbe(modules=("criterion",)),
        LossesProbe(modules=("criterion",)),
        DataProbe(labels={"semantic": (0, 199)}),
    ]


def _esam() -> list[Probe]:
    """ESAM (github.com/xuxw98/ESAM), whose ``_FF`` variants have the image branch."""
    return [
        # FastSAM's feature map (1, C, h, w) of a frame; the projection to points is a function, `conv` is behind it
        ClipProbe(modules=("img_backbone",), fields={"tokens": ""}, head=("conv",)),
        # the geometry-aware pooling's weight of a point in its superpoint, before it is doubled
        GateProbe(modules=("pool.pts_proj2",), fields={"alpha": ""}, name="pool"),
        AttentionProbe(modules=("decoder.*.attn",)),
        NormalizeProbe(outputs=("merge_head.net",)),
        MatchingProbe(modules=("matcher",)),  # see expose()
    ]


PRESETS: dict[str, Callable[[], list[Probe]]] = {"bifusion": _bifusion, "esam": _esam}


def probe_preset(
    name: str, probes: Sequence[str] = ("all",), *, labels: Mapping[str, tuple[int, int]] | None = None
) -> list[Probe]:
    """Probes of the catalogue, told where to look in a model with known names::

        Monitor(model, optimizer, probes=probe_preset("esam"))

    ``"bifusion"`` serves all models of this package, ``"esam"`` ESAM's. A part that a variant lacks is not recorded.
    ESAM's matcher is no module: before the Monitor is made, call ``expose(model, "criterion.inst_criterion.matcher")``.

    Args:
        name: of the model.
        probes: names of probes.
        labels: of probe `data`, the smallest and the largest class id of fields, instead of the preset's.

    Raises:
        UserError: an unknown name.
    """
    if name not in PRESETS:
        raise UserError(f"unknown preset of probes {name!r}.{near_matches(name, PRESETS)}")
    found: list[Probe] = []
    told = PRESETS[name]()
    if labels is not None:
        told = [probe for probe in told if not isinstance(probe, DataProbe)] + [DataProbe(labels=labels)]
    for probe in make_probes(probes):
        found += [t for t in told if type(t) is type(probe)] or [probe]
    return found


class Exposed(nn.Module):
    """A plain callable as a module, so that hooks see its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **keywords: Any) -> Any:
        """Call it."""
        return self.function(*args, **keywords)


def expose(model: nn.Module, path: str) -> None:
    """Make a callable that a model keeps in a plain object visible to probes, as a module with the path's last name.

    Its calls return what they did, and the model has the same parameters and buffers.

    Raises:
        UserError: there is no such callable, it is a module already, or the model has something else of that name.
    """
    *owners, name = path.split(".")
    owner: Any = model
    for part in owners:
        owner = getattr(owner, part, None)
    found = getattr(owner, name, None)
    if not callable(found) or isinstance(found, nn.Module):
        what = "a module already, which probes see" if isinstance(found, nn.Module) else f"a {type(found).__name__}"
        raise UserError(f"expose({path!r}): that is {what}; give the path of a plain callable, such as a matcher")
    if owner is not model and hasattr(model, name):
        raise UserError(f"expose({path!r}): the model has a {name!r} of its own")
    exposed = Exposed(found)
    setattr(owner, name, exposed)
    if owner is not model:
        model.add_module(name, exposed)
