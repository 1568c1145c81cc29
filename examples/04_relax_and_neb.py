# /// script
# requires-python = ">=3.12"
# dependencies = ["ase-uq[mace]"]
# ///
"""A relaxation and an NEB that stop where their potential no longer knows, by thresholds that state what they
achieve."""

# %% A potential that has only seen 300 K, and thresholds from its calibration data
import numpy as np
from ase import Atoms
from ase.io import read
from ase.mep import NEB
from ase.optimize import FIRE

from ase_uq import (
    FalseAlarms,
    MissRate,
    UncertainCalculator,
    UncertaintyHalt,
    UncertaintyMonitor,
    embedded,
    relax,
)

frame = read(embedded.path("malonaldehyde.xyz"))
calc = UncertainCalculator("embedded:mace", embedded.path("mace.uq.safetensors"))
missed = MissRate(error=0.3, at_most=0.1)
for criterion in (missed, FalseAlarms(per_run=0.05, ps=0.25)):
    print(calc.threshold(criterion).describe())

# %% A start far from the known structures: the relaxation stops instead of ending in a structure nobody could trust
atoms = Atoms(frame.numbers, frame.positions, calculator=calc)
atoms.rattle(0.15, rng=np.random.default_rng(0))
print(relax(atoms, fmax=0.02, halt=missed, progress=False))

# %% A start close to them is relaxed, and the result says how far to trust it
atoms = Atoms(frame.numbers, frame.positions, calculator=calc)
atoms.rattle(0.01, rng=np.random.default_rng(0))
print(relax(atoms, fmax=0.02, halt=missed, progress=False))

# %% Two paths from the relaxed structure: the proton moves to the other oxygen, or the O-H group turns away from it
relaxed = Atoms(frame.numbers, atoms.positions)
mirrored = relaxed.copy()
# Mirrored, each atom is where its partner was; only the proton, atom 5, has moved.
mirrored.positions = (relaxed.positions * [-1, 1, 1])[[4, 3, 2, 1, 0, 5, 8, 7, 6]]
turned = relaxed.copy()
turned.rotate(180, relaxed.positions[0] - relaxed.positions[1], center=relaxed.positions[0])
turned.positions[:5], turned.positions[6:] = relaxed.positions[:5], relaxed.positions[6:]

for name, end in (("proton transfer", mirrored), ("turning O-H", turned)):
    images = [relaxed.copy(), *(relaxed.copy() for _ in range(5)), end.copy()]
    for image in images:
        image.calc = calc  # shared: the calculator remembers each image, so none is calculated twice
    band = NEB(images, method="improvedtangent", allow_shared_calculator=True)
    band.interpolate("idpp")
    optimizer = FIRE(band, logfile=None)
    monitor = UncertaintyMonitor(optimizer, halt=missed, frames="path.xyz")
    optimizer.attach(monitor)
    try:
        done = optimizer.run(fmax=0.1, steps=100)
        barrier = max(image.get_potential_energy() for image in images) - images[0].get_potential_energy()
        state = "converged" if done else "unfinished"
        print(f"{name}: {state}, barrier {barrier:.2f} eV, largest uncertainty {monitor.last.reading:.3f} eV/Å")
    except UncertaintyHalt as stop:
        print(f"{name}: {stop}")
