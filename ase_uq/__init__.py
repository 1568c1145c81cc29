"""Molecular dynamics that knows when it is wrong: calibrated uncertainties from one forward pass.

    from ase_uq import UncertainCalculator, UncertaintyMonitor

Importing this package loads nothing but this file: each name brings its module when it is first used (PEP 562). No
potential's package is imported before a potential is loaded, and nothing in the process is changed.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ase_uq import embedded, metrics, propagation
    from ase_uq.backends import load_backend
    from ase_uq.backends.registry import available_backends
    from ase_uq.communicator import Distributed
    from ase_uq.diagnostics.evaluate import evaluate
    from ase_uq.dynamics.actions import Call, Flag, Halt, Log
    from ase_uq.dynamics.checks import Bonds, EnergySpike, Finite, MaxTemperature
    from ase_uq.dynamics.cusum import Cusum
    from ase_uq.dynamics.monitor import UncertaintyMonitor
    from ase_uq.dynamics.policy import WatchPolicy
    from ase_uq.dynamics.relaxation import Relaxation, relax
    from ase_uq.dynamics.rules import AllOf, AnyOf, Patience, Refractory, Threshold
    from ase_uq.dynamics.watched import WatchedCalculator
    from ase_uq.engines.ase.bias import UncertaintyBias
    from ase_uq.engines.ase.calculator import UncertainCalculator
    from ase_uq.errors import UncertaintyHalt, UQError, UQWarning
    from ase_uq.fitting.fit import fit
    from ase_uq.io.frames import read_frames, write_frames
    from ase_uq.io.split import split_as_mace, split_frames
    from ase_uq.methods import available_methods
    from ase_uq.prediction import Prediction
    from ase_uq.predictor import Predictor
    from ase_uq.sampling.perturbed import perturb_frames
    from ase_uq.sampling.reference_runs import reference_runs
    from ase_uq.scoring.score import score
    from ase_uq.selection.select import Selection, select
    from ase_uq.thresholds.criteria import ErrorBound, FalseAlarms, MissRate, PerElement, Quantile
    from ase_uq.thresholds.data import ReferenceRuns
    from ase_uq.thresholds.reduction import Reduction
    from ase_uq.uncertainty_model.model import UncertaintyModel

__version__ = "0.1.0"

# Public name: the module of this package that defines it, or None for a module itself.
_HOMES: dict[str, str | None] = {
    "AllOf": "dynamics.rules",
    "AnyOf": "dynamics.rules",
    "Bonds": "dynamics.checks",
    "Call": "dynamics.actions",
    "Cusum": "dynamics.cusum",
    "Distributed": "communicator",
    "EnergySpike": "dynamics.checks",
    "ErrorBound": "thresholds.criteria",
    "FalseAlarms": "thresholds.criteria",
    "Finite": "dynamics.checks",
    "Flag": "dynamics.actions",
    "Halt": "dynamics.actions",
    "Log": "dynamics.actions",
    "MaxTemperature": "dynamics.checks",
    "MissRate": "thresholds.criteria",
    "Patience": "dynamics.rules",
    "PerElement": "thresholds.criteria",
    "Prediction": "prediction",
    "Predictor": "predictor",
    "Quantile": "thresholds.criteria",
    "Reduction": "thresholds.reduction",
    "ReferenceRuns": "thresholds.data",
    "Refractory": "dynamics.rules",
    "Relaxation": "dynamics.relaxation",
    "Selection": "selection.select",
    "Threshold": "dynamics.rules",
    "UQError": "errors",
    "UQWarning": "errors",
    "UncertainCalculator": "engines.ase.calculator",
    "UncertaintyBias": "engines.ase.bias",
    "UncertaintyHalt": "errors",
    "UncertaintyModel": "uncertainty_model.model",
    "UncertaintyMonitor": "dynamics.monitor",
    "WatchPolicy": "dynamics.policy",
    "WatchedCalculator": "dynamics.watched",
    "available_backends": "backends.registry",
    "available_methods": "methods",
    "evaluate": "diagnostics.evaluate",
    "fit": "fitting.fit",
    "load_backend": "backends",
    "perturb_frames": "sampling.perturbed",
    "read_frames": "io.frames",
    "reference_runs": "sampling.reference_runs",
    "relax": "dynamics.relaxation",
    "score": "scoring.score",
    "select": "selection.select",
    "split_as_mace": "io.split",
    "split_frames": "io.split",
    "write_frames": "io.frames",
    "embedded": None,
    "metrics": None,
    "propagation": None,
}

__all__ = [
    "AllOf",
    "AnyOf",
    "Bonds",
    "Call",
    "Cusum",
    "Distributed",
    "EnergySpike",
    "ErrorBound",
    "FalseAlarms",
    "Finite",
    "Flag",
    "Halt",
    "Log",
    "MaxTemperature",
    "MissRate",
    "Patience",
    "PerElement",
    "Prediction",
    "Predictor",
    "Quantile",
    "Reduction",
    "ReferenceRuns",
    "Refractory",
    "Relaxation",
    "Selection",
    "Threshold",
    "UQError",
    "UQWarning",
    "UncertainCalculator",
    "UncertaintyBias",
    "UncertaintyHalt",
    "UncertaintyModel",
    "UncertaintyMonitor",
    "WatchPolicy",
    "WatchedCalculator",
    "available_backends",
    "available_methods",
    "embedded",
    "evaluate",
    "fit",
    "load_backend",
    "metrics",
    "perturb_frames",
    "propagation",
    "read_frames",
    "reference_runs",
    "relax",
    "score",
    "select",
    "split_as_mace",
    "split_frames",
    "write_frames",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    if home is None:
        return importlib.import_module(f"{__name__}.{name}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value  # found directly from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
