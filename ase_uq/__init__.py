"""Molecular dynamics that knows when it is wrong: calibrated uncertainties for MACE and orb, in one forward pass.

    from ase_uq import UncertainCalculator, UncertaintyMonitor

Importing this package imports neither mace nor orb_models and changes nothing in the process.
"""

from ase_uq import metrics
from ase_uq.backends import available_backends, load_backend
from ase_uq.calculator import UncertainCalculator
from ase_uq.dynamics import (
    Call,
    Flag,
    Halt,
    Log,
    Patience,
    Threshold,
    UncertaintyMonitor,
)
from ase_uq.errors import UncertaintyHalt, UQError, UQWarning
from ase_uq.fitting import fit
from ase_uq.frames import read_frames, write_frames
from ase_uq.methods import available_methods
from ase_uq.prediction import Prediction
from ase_uq.predictor import Predictor
from ase_uq.readings import Reduction
from ase_uq.scoring import evaluate
from ase_uq.thresholds import Quantile
from ase_uq.uncertainty_model import UncertaintyModel

__all__ = [
    "Call",
    "Flag",
    "Halt",
    "Log",
    "Patience",
    "Prediction",
    "Predictor",
    "Quantile",
    "Reduction",
    "Threshold",
    "UQError",
    "UQWarning",
    "UncertainCalculator",
    "UncertaintyHalt",
    "UncertaintyModel",
    "UncertaintyMonitor",
    "available_backends",
    "available_methods",
    "evaluate",
    "fit",
    "load_backend",
    "metrics",
    "read_frames",
    "write_frames",
]

__version__ = "0.1.0"
