"""Watching molecular dynamics and relaxations while they run."""

from ase_uq.dynamics.actions import Action, Call, Event, Flag, Halt, Log
from ase_uq.dynamics.checks import Bonds, Check, EnergySpike, Finite, MaxTemperature, Snapshot
from ase_uq.dynamics.cusum import Cusum
from ase_uq.dynamics.monitor import UncertaintyMonitor
from ase_uq.dynamics.policy import WatchPolicy
from ase_uq.dynamics.relaxation import Relaxation, relax
from ase_uq.dynamics.rules import AllOf, AnyOf, Criterion, Patience, Refractory, Rule, Threshold
from ase_uq.dynamics.watched import WatchedCalculator

__all__ = [
    "Action",
    "AllOf",
    "AnyOf",
    "Bonds",
    "Call",
    "Check",
    "Criterion",
    "Cusum",
    "EnergySpike",
    "Event",
    "Finite",
    "Flag",
    "Halt",
    "Log",
    "MaxTemperature",
    "Patience",
    "Refractory",
    "Relaxation",
    "Rule",
    "Snapshot",
    "Threshold",
    "UncertaintyMonitor",
    "WatchPolicy",
    "WatchedCalculator",
    "relax",
]
