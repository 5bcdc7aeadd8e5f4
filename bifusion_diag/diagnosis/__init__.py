"""From records to answers: measures, criteria, findings, comparison. Reads records only, knows no torch."""

from bifusion_diag.diagnosis.assess import RunAssessment, assess_run
from bifusion_diag.diagnosis.comparing.gates import GateResult, check_gates, check_run_gates, parse_gates
from bifusion_diag.diagnosis.comparing.groups import GroupComparison, compare_groups
from bifusion_diag.diagnosis.comparing.pair import MeasurePair, RunComparison, compare_runs
from bifusion_diag.diagnosis.comparing.parting import Parting
from bifusion_diag.diagnosis.comparing.sides import RunGroup, group_runs
from bifusion_diag.diagnosis.criteria import Criterion
from bifusion_diag.diagnosis.definitions import DEFINITIONS, Definition, definition_of
from bifusion_diag.diagnosis.findings import Evidence, Finding, Rule, Unmeasured
from bifusion_diag.diagnosis.full import load_measured, measure_record
from bifusion_diag.diagnosis.live import LiveFindings, findings_of
from bifusion_diag.diagnosis.measures import Measures, measure, measures_from_dict, measures_to_dict
from bifusion_diag.diagnosis.modules import ModuleGradient, ModulePair
from bifusion_diag.diagnosis.origins import Origin
from bifusion_diag.diagnosis.plain import to_plain
from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity, Reading
from bifusion_diag.diagnosis.rules import RULES
from bifusion_diag.diagnosis.settings_diff import SettingGroup, SettingRow
from bifusion_diag.diagnosis.spikes import SpikeDetector, find_spikes
from bifusion_diag.diagnosis.thresholds import Thresholds
from bifusion_diag.diagnosis.verdict import Verdict

__all__ = [
    "DEFINITIONS",
    "RULES",
    "Criterion",
    "Definition",
    "Evidence",
    "Finding",
    "GateResult",
    "GroupComparison",
    "LiveFindings",
    "MeasurePair",
    "Measures",
    "ModuleGradient",
    "ModulePair",
    "NotMeasured",
    "Origin",
    "Parting",
    "Quantity",
    "Reading",
    "Rule",
    "RunAssessment",
    "RunComparison",
    "RunGroup",
    "SettingGroup",
    "SettingRow",
    "SpikeDetector",
    "Thresholds",
    "Unmeasured",
    "Verdict",
    "assess_run",
    "check_gates",
    "check_run_gates",
    "compare_groups",
    "compare_runs",
    "definition_of",
    "find_spikes",
    "findings_of",
    "group_runs",
    "load_measured",
    "measure",
    "measure_record",
    "measures_from_dict",
    "measures_to_dict",
    "parse_gates",
    "to_plain",
]
