"""P-DRUM: residual models on descriptors."""

from ase_uq.methods.pdrum.method import PDRUM

__all__ = ["PDRUM"]
