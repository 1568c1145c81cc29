"""Bayesian last layer: how well the training frames determine the last layer's weights for each atom."""

from ase_uq.methods.bll.method import BLL

__all__ = ["BLL"]
