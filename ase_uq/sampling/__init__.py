"""Structures that a potential is made to visit: perturbed frames, reference runs, ensembles of dynamics."""
