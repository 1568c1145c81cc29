"""Watching molecular dynamics and relaxations while they run."""

from ase_uq.dynamics.actions import Action, Call, Event, Flag, Halt, Log
from ase_uq.dynamics.monitor import UncertaintyMonitor
from ase_uq.dynamics.rules import Meaning, Patience, Rule, Threshold

__all__ = [
    "Action",
    "Call",
    "Event",
    "Flag",
    "Halt",
    "Log",
    "Meaning",
    "Patience",
    "Rule",
    "Threshold",
    "UncertaintyMonitor",
]
