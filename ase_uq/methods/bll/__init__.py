"""Bayesian last layer: how far the last layer's weights are fixed by the training frames where an atom is."""

from ase_uq.methods.bll.method import BLL

__all__ = ["BLL"]
