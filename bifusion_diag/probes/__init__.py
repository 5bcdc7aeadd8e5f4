"""The instruments: the Monitor, the base of all probes, and one small file a probe. Knows PyTorch, knows no model."""

from bifusion_diag.probes.activations import ActivationsProbe
from bifusion_diag.probes.attention import AttentionProbe
from bifusion_diag.probes.base import ROOT, Call, Probe, Reading, Schedule, Subject
from bifusion_diag.probes.catalogue import PROBES, make_probes
from bifusion_diag.probes.clip import ClipProbe
from bifusion_diag.probes.data import DataProbe
from bifusion_diag.probes.fields import FieldProbe, Key
from bifusion_diag.probes.flow import FlowProbe
from bifusion_diag.probes.gate import GateProbe
from bifusion_diag.probes.grads import GradsProbe
from bifusion_diag.probes.loss_gradients import LossGradientsProbe
from bifusion_diag.probes.losses import LossesProbe
from bifusion_diag.probes.matching import MatchingProbe
from bifusion_diag.probes.monitor import Monitor
from bifusion_diag.probes.normalize import NormalizeProbe
from bifusion_diag.probes.presets import expose, probe_preset
from bifusion_diag.probes.projection import ProjectionProbe
from bifusion_diag.probes.throughput import ThroughputProbe
from bifusion_diag.probes.updates import UpdatesProbe
from bifusion_diag.probes.weights import WeightsProbe

__all__ = [
    "PROBES",
    "ROOT",
    "ActivationsProbe",
    "AttentionProbe",
    "Call",
    "ClipProbe",
    "DataProbe",
    "FieldProbe",
    "FlowProbe",
    "GateProbe",
    "GradsProbe",
    "Key",
    "LossGradientsProbe",
    "LossesProbe",
    "MatchingProbe",
    "Monitor",
    "NormalizeProbe",
    "Probe",
    "ProjectionProbe",
    "Reading",
    "Schedule",
    "Subject",
    "ThroughputProbe",
    "UpdatesProbe",
    "WeightsProbe",
    "expose",
    "make_probes",
    "probe_preset",
]
