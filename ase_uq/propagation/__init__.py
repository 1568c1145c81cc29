"""Error bars of what is computed from energies of several structures, from members that all of them share.

Frames come from a calculator or a `Predictor` with `ensemble=M`, or from a file that one of them wrote.
"""

from ase_uq.propagation.averages import Average, average
from ase_uq.propagation.differences import Propagated, barrier, difference

__all__ = ["Average", "Propagated", "average", "barrier", "difference"]
