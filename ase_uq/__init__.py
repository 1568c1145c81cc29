"""Molecular dynamics that knows when it is wrong: calibrated uncertainties for MACE and orb, in one forward pass.

    from ase_uq import UncertainCalculator, UncertaintyMonitor

Importing this package imports neither mace nor orb_models and changes nothing in the process.
"""

from ase_uq import metrics
from ase_uq.backends import load_backend
from ase_uq.backends.registry import available_backends
from ase_uq.diagnostics.evaluate import evaluate
from ase_uq.dynamics import (
    AllOf,
    AnyOf,
    Bonds,
    Call,
    Cusum,
    EnergySpike,
    Finite,
    Flag,
    Halt,
    Log,
    MaxTemperature,
    Patience,
    Refractory,
    Relaxation,
    Threshold,
    UncertaintyMonitor,
    WatchedCalculator,
    reference_runs,
    relax,
)
from ase_uq.engines.ase.bias import UncertaintyBias
from ase_uq.engines.ase.calculator import UncertainCalculator
from ase_uq.errors import UncertaintyHalt, UQError, UQWarning
from ase_uq.fitting.fit import fit
from ase_uq.io.frames import read_frames, write_frames
from ase_uq.methods import available_methods
from ase_uq.prediction import Prediction
from ase_uq.predictor import Predictor
from ase_uq.sampling.perturbed import perturb_frames
from ase_uq.scoring.score import score
from ase_uq.selection.select import Selection, select
from ase_uq.thresholds.criteria import ErrorBound, FalseAlarms, MissRate, PerElement, Quantile
from ase_uq.thresholds.data import ReferenceRuns
from ase_uq.thresholds.reduction import Reduction
from ase_uq.uncertainty_model.model import UncertaintyModel

__all__ = [
    "AllOf",
    "AnyOf",
    "Bonds",
    "Call",
    "Cusum",
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
    "WatchedCalculator",
    "available_backends",
    "available_methods",
    "evaluate",
    "fit",
    "load_backend",
    "metrics",
    "perturb_frames",
    "read_frames",
    "reference_runs",
    "relax",
    "score",
    "select",
    "write_frames",
]

__version__ = "0.1.0"
