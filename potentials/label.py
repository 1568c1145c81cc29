"""Makes the labelled frames of the embedded default: malonaldehyde at 300 K, energies and forces by GFN2-xTB.

    python potentials/label.py [OUTDIR]        (default: ase_uq/embedded; about four minutes on one core)

Every split is drawn from Langevin runs of its own, so that no test or calibration frame is a neighbour in
time of a training frame. `info["run"]` numbers the runs: they are the exchangeable unit of the set.
The 900 K file is a test set only; nothing is fitted or calibrated on it. The perturbed file holds deliberately bad
variants of training frames: nothing is fitted to them either, but thresholds on missed frames need large errors.
"""

import sys
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import CalculationFailed
from ase.io import write
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary, ZeroRotation
from ase.optimize import BFGS
from tblite.ase import TBLite
from tqdm import tqdm

from ase_uq.io.frames import read_frames
from ase_uq.sampling.perturbed import perturb_frames

# name: (temperature in K, independent runs, frames a run)
SPLITS = {
    "train_300K": (300, 8, 75),
    "calibration_300K": (300, 8, 40),
    "test_300K": (300, 6, 50),
    "test_900K": (900, 6, 50),
}
TIMESTEP = 0.5 * units.fs  # the transferring proton wants a short step
EQUILIBRATION = 4000  # steps, 2 ps
STRIDE = 100  # steps between frames, 50 fs


def malonaldehyde() -> Atoms:
    """The planar cis-enol, relaxed with GFN2-xTB. Atom 5 is the proton between the oxygens 0 and 4."""
    positions = [
        (-1.28, -1.10, 0), (-1.20, 0.15, 0), (0, 0.85, 0), (1.20, 0.15, 0), (1.28, -1.10, 0),
        (-0.30, -1.35, 0), (-2.14, 0.70, 0), (0, 1.94, 0), (2.14, 0.70, 0),
    ]  # fmt: skip
    atoms = Atoms("OC3OH4", positions=positions, calculator=TBLite(method="GFN2-xTB", verbosity=0))
    BFGS(atoms, logfile=None).run(fmax=0.005)
    return atoms


def labelled_copy(atoms: Atoms, **info: object) -> Atoms:
    frame = atoms.copy()
    frame.info = {"REF_energy": atoms.get_potential_energy(), **info}
    frame.new_array("REF_forces", atoms.get_forces())
    frame.arrays.pop("momenta", None)
    return frame


def sample(name: str, temperature: float, n_runs: int, n_frames: int, seed: int) -> list[Atoms]:
    frames = []
    bar = tqdm(total=n_runs * n_frames, desc=name, unit="frame")
    for run in range(n_runs):
        rng = np.random.default_rng([seed, run])
        atoms = malonaldehyde()
        MaxwellBoltzmannDistribution(atoms, temperature_K=temperature, rng=rng)
        Stationary(atoms)
        ZeroRotation(atoms)
        dynamics = Langevin(atoms, TIMESTEP, temperature_K=temperature, friction=0.02 / units.fs, rng=rng)
        dynamics.run(EQUILIBRATION)
        for _ in range(n_frames):
            dynamics.run(STRIDE)
            info = {"config_type": name, "temperature_K": temperature, "run": f"{name}_{run}"}
            frames.append(labelled_copy(atoms, **info))
            bar.update()
    bar.close()
    return frames


def perturbed(parents: list[Atoms]) -> list[Atoms]:
    """Labelled bad variants; those whose self-consistency does not converge are left out."""
    reference = TBLite(method="GFN2-xTB", verbosity=0)
    kinds = ("rattled", "strained", "compressed", "hot")
    frames = []
    for variant in perturb_frames(parents, kinds=kinds, per_kind=50, calculator=reference, progress=True):
        variant.calc = reference
        try:
            frames.append(labelled_copy(variant, **variant.info))
        except CalculationFailed:
            continue
    return frames


def main(folder: Path) -> None:
    relaxed = malonaldehyde()
    write(folder / "malonaldehyde.xyz", labelled_copy(relaxed, config_type="relaxed"))
    for seed, (name, (temperature, n_runs, n_frames)) in enumerate(SPLITS.items()):
        write(folder / f"{name}.xyz", sample(name, temperature, n_runs, n_frames, seed))
    write(folder / "perturbed.xyz", perturbed(read_frames(folder / "train_300K.xyz")))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "ase_uq/embedded"))
