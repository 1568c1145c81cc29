"""Error bars of what is computed from energies, forces or stresses of several structures, from members they share.

Frames come from a calculator or a `Predictor` with `ensemble=M`, or from a file that one of them wrote.
"""

from ase_uq.propagation.averages import Average, average
from ase_uq.propagation.differences import Propagated, barrier, difference
from ase_uq.propagation.functions import Derived, EquationOfState, equation_of_state, propagate

__all__ = [
    "Average",
    "Derived",
    "EquationOfState",
    "Propagated",
    "average",
    "barrier",
    "difference",
    "equation_of_state",
    "propagate",
]
