"""MACE potentials (mace-torch 0.3). Importing it imports mace."""

from ase_uq.backends.mace.backend import MACEBackend, accepts, load, wrap

__all__ = ["MACEBackend", "accepts", "load", "wrap"]
