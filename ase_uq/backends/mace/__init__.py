"""MACE potentials (mace-torch 0.3). Importing this package imports mace, and leaves the process as it was."""

from ase_uq.backends._process import preserved_process

with preserved_process():
    # All that the modules here import of mace: after this, their imports do nothing to the process.
    import mace
    import mace.calculators
    import mace.tools.scripts_utils  # noqa: F401

from ase_uq.backends.mace.backend import MACEBackend, accepts, wrap
from ase_uq.backends.mace.loading import load, load_potential, save_potential

__all__ = ["MACEBackend", "accepts", "load", "load_potential", "save_potential", "wrap"]
