"""Probes by name."""

from __future__ import annotations

from collections.abc import Sequence

from bifusion_diag.errors import UserError, near_matches
from bifusion_diag.probes.activations import ActivationsProbe
from bifusion_diag.probes.attention import AttentionProbe
from bifusion_diag.probes.base import Probe
from bifusion_diag.probes.clip import ClipProbe
from bifusion_diag.probes.data import DataProbe
from bifusion_diag.probes.flow import FlowProbe
from bifusion_diag.probes.gate import GateProbe
from bifusion_diag.probes.grads import GradsProbe
from bifusion_diag.probes.loss_gradients import LossGradientsProbe
from bifusion_diag.probes.losses import LossesProbe
from bifusion_diag.probes.matching import MatchingProbe
from bifusion_diag.probes.normalize import NormalizeProbe
from bifusion_diag.probes.projection import ProjectionProbe
from bifusion_diag.probes.throughput import ThroughputProbe
from bifusion_diag.probes.updates import UpdatesProbe
from bifusion_diag.probes.weights import WeightsProbe

PROBES: dict[str, type[Probe]] = {
    "grads": GradsProbe,
    "activations": ActivationsProbe,
    "weights": WeightsProbe,
    "updates": UpdatesProbe,
    "losses": LossesProbe,
    "loss_gradients": LossGradientsProbe,
    "clip": ClipProbe,
    "flow": FlowProbe,
    "projection": ProjectionProbe,
    "gate": GateProbe,
    "normalize": NormalizeProbe,
    "attention": AttentionProbe,
    "matching": MatchingProbe,
    "data": DataProbe,
    "throughput": ThroughputProbe,
}


def make_probes(probes: Sequence[str | Probe]) -> list[Probe]:
    """Probes from names and instances; "all" is every one of the catalogue, a repeated name counts once.

    Raises:
        UserError: no probe; an unknown name, with the near matches; two probes that would record under the same prefix.
    """
    names: list[str] = []
    given: list[Probe] = []
    for probe in [probes] if isinstance(probes, str) else probes:
        if isinstance(probe, Probe):
            given.append(probe)
        elif not isinstance(probe, str):
            raise UserError(f"{probe!r} is no probe; give names of the catalogue, or probes such as GradsProbe()")
        elif probe == "all":
            names.extend(PROBES)
        elif probe in PROBES:
            names.append(probe)
        else:
            raise UserError(f"unknown probe {probe!r}.{near_matches(probe, [*PROBES, 'all'])}")
    made = [PROBES[name]() for name in dict.fromkeys(names)] + given
    prefixes = [probe.name for probe in made]
    for prefix in prefixes:
        if prefixes.count(prefix) > 1:
            raise UserError(f"two probes would record under {prefix!r}; give one of them another name=...")
    return made
