"""Numerics that know nothing of potentials: linear algebra, moments, sketches, site sums, networks."""
