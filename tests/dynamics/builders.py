"""A cheap potential with uncertainties, and structures for it."""

import numpy as np
from ase.build import add_adsorbate, bulk, fcc100
from ase.calculators.calculator import compare_atoms
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms

from ase_uq.thresholds.data import ThresholdData

EXTRA = ["energy_uncertainty", "forces_uncertainty", "gamma"]


class Uncertain(EMT):
    """EMT; σ of each force component is 1 eV/Å² times how far the atom is from where it began, or scripted.

    Args:
        atoms: Where σ is zero.
        script: Largest ε of each call, one after the other, in eV/Å; the last goes on for ever.
        skipped: Calls that give no uncertainty.
        readings: (n_frames,) readings of the calibration frames, eV/Å.
        runs: Reference runs.
    """

    implemented_properties = [*EMT.implemented_properties, *EXTRA]  # noqa: RUF012

    def __init__(self, atoms, script=None, skipped=(), readings=None, runs=None):
        super().__init__()
        self.origin = atoms.positions.copy()
        self.script = script
        self.skipped = skipped
        self.readings = np.linspace(0, 1, 101) if readings is None else readings
        self.runs = runs
        self.gamma = np.ones(len(atoms))
        self.n_calls = 0
        self.asked = []

    def calculate(self, atoms=None, properties=("energy",), system_changes=("positions",)):
        super().calculate(atoms, properties, list(system_changes))
        sigma = np.abs(atoms.positions - self.origin)
        if self.script is not None:
            sigma = np.zeros_like(sigma)
            sigma[1, 2] = self.script[min(self.n_calls, len(self.script) - 1)]
        if self.n_calls not in self.skipped:
            self.results |= {"energy_uncertainty": 0.1, "forces_uncertainty": sigma, "gamma": self.gamma}
        self.n_calls += 1

    def threshold_data(self, reduction):
        self.asked.append(reduction)
        # Errors as large as the readings, and the lighter the element the larger both.
        scale = {("Al",): 0.5, ("Cu",): 1.0}.get(reduction.elements, 1.0)
        readings = scale * self.readings
        return ThresholdData(readings, readings, np.arange(len(readings)), reduction, self.runs)


class Remembering(Uncertain):
    """One that remembers all structures, as `UncertainCalculator` does; σ is never scripted by the call."""

    def __init__(self, atoms, **options):
        super().__init__(atoms, **options)
        self.memory = []

    def calculate(self, atoms=None, properties=("energy",), system_changes=("positions",)):
        known = self._known(atoms)
        if known is not None:
            self.atoms, self.results = atoms.copy(), dict(known)
            return
        super().calculate(atoms, properties, system_changes)
        # EMT writes the next forces into the same array.
        self.memory.append((atoms.copy(), {key: np.copy(value)[()] for key, value in self.results.items()}))

    def calculation_required(self, atoms, properties):
        known = self._known(atoms)
        return known is None or not set(properties) <= set(known)

    def _known(self, atoms):
        return next((results for other, results in self.memory if not compare_atoms(other, atoms)), None)


def crystal(script=None, **options):
    """Four atoms in a periodic cell, one of them aluminium, that begin at 224 K."""
    atoms = bulk("Cu", cubic=True)
    atoms.symbols[1] = "Al"
    atoms.set_momenta(np.random.default_rng(0).normal(scale=1.5, size=(4, 3)))
    atoms.calc = Uncertain(atoms, script, **options)
    return atoms


def hop(n_images=5):
    """Images of an Au atom that hops on Al(100), between two hollow sites, without calculators."""
    first = fcc100("Al", (2, 2, 2), vacuum=6)
    add_adsorbate(first, "Au", 1.7, "hollow")
    del first.info["adsorbate_info"]  # ASE's own writers cannot keep it
    first.set_constraint(FixAtoms(mask=[atom.tag > 1 for atom in first]))
    images = [first.copy() for _ in range(n_images)]
    step = first.cell[0] / 2
    for number, image in enumerate(images):
        share = number / (n_images - 1)
        image.positions[-1] += share * step + [0, 0, 1.6 * share * (1 - share)]
    return images
