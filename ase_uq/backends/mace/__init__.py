"""MACE potentials (mace-torch 0.3).

Importing this package imports mace and leaves the process unchanged, but for torch's safe loading: mace switches that
off when it is first imported, and only then. Were it put back, a `MACECalculator("x.model")` that the user makes later
would be refused by torch.
"""

from ase_uq.backends._process import preserved_process

with preserved_process(loading=False):
    # Everything that the modules here import from mace: later imports of it no longer change the process.
    import mace
    import mace.calculators
    import mace.tools.scripts_utils  # noqa: F401

from ase_uq.backends.mace.backend import MACEBackend, accepts, wrap
from ase_uq.backends.mace.loading import load, load_potential, save_potential

__all__ = ["MACEBackend", "accepts", "load", "load_potential", "save_potential", "wrap"]
