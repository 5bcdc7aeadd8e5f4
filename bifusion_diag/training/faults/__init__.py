"""Faults on purpose: what breaks trainings, put into one step of a run, so that instruments can be tried on it."""

from bifusion_diag.training.faults.catalogue import FAULTS, Fault, fault_table
from bifusion_diag.training.faults.inject import Faults, Injection, parse_injections

__all__ = ["FAULTS", "Fault", "Faults", "Injection", "fault_table", "parse_injections"]
