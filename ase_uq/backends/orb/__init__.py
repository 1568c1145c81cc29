"""orb-v3 potentials (orb-models 0.7). Importing this package imports orb_models."""

from ase_uq.backends.orb.backend import OrbBackend, accepts, wrap
from ase_uq.backends.orb.loading import load, load_potential, save_potential

__all__ = ["OrbBackend", "accepts", "load", "load_potential", "save_potential", "wrap"]
