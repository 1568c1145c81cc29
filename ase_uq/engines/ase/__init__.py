"""ASE calculators whose results carry uncertainties."""
