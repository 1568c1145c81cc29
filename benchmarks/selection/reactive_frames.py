"""Frames and potentials of benchmarks/selection/reactive.py, all at one level of theory: GFN2-xTB.

The pretraining set is other molecules: geometries of uracil, toluene, benzene and aspirin of DATA/rmd17_crossmol, whose
labels are of another level and are made anew. The pool and the test frames are malonaldehyde that reacts: runs at 600
to 1500 K, and its proton carried from one oxygen to the other in frames of such runs. Pool and test come from runs of
their own. Everything that is made is kept in FOLDER, and nothing of it is in the repository.
"""

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.calculator import CalculationFailed
from ase.io import write
from tblite.ase import TBLite
from tqdm import tqdm

from ase_uq import read_frames
from benchmarks.train_committee import ARCHITECTURE, ISOLATED_ATOMS

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "potentials"))
from label import labelled_copy, sample  # not part of the package

# Molecule: file, frames. Malonaldehyde, which rmd17_crossmol has as well, is left out: it is what comes next.
OTHERS = {
    "uracil": ("train_malonaldehyde_uracil_toluene.xyz", 150),
    "toluene": ("train_malonaldehyde_uracil_toluene.xyz", 150),
    "benzene": ("ood_benzene.xyz", 100),
    "aspirin": ("ood_aspirin.xyz", 100),
}
NITROGEN = -70.90808716403144  # GFN2-xTB energy of the quartet, eV
KELVINS = (600, 900, 1200, 1500)
POOL, TEST = (4, 25), (1, 25)  # runs at each temperature, frames a run
POOL_TRANSFERS, TEST_TRANSFERS = 100, 25
HELD_OUT = {"calibration": "calib_malonaldehyde_uracil_toluene.xyz", "test": "test_id_malonaldehyde_uracil_toluene.xyz"}
N_HELD_OUT = 30  # frames of uracil and as many of toluene in each
OXYGENS, PROTON = (0, 4), 5  # of malonaldehyde, as potentials/label.py numbers its atoms
LARGEST_FORCE = 30.0  # eV/Å; geometries beyond are no reaction but a collision, and are left out
# What one core trains in seven minutes.
RECIPE = ARCHITECTURE | {
    "hidden_irreps": "16x0e + 16x1o",
    "radial_MLP": "[32, 32, 32]",
    "batch_size": 8,
    "max_num_epochs": 24,
    "start_swa": 18,
    "scheduler_patience": 15,
    "eval_interval": 6,
    "default_dtype": "float32",
    "E0s": ISOLATED_ATOMS | {7: NITROGEN},
}


def relabelled(frames: Sequence[Atoms], **info: object) -> list[Atoms]:
    """Frames with GFN2-xTB labels; those whose self-consistency does not converge are left out."""
    reference, found = TBLite(method="GFN2-xTB", verbosity=0), []
    for atoms in tqdm(frames, desc="labels", unit="frame", disable=len(frames) < 2):
        bare = Atoms(atoms.numbers, atoms.positions - atoms.positions.mean(0), calculator=reference)
        try:
            found.append(labelled_copy(bare, **info))
        except CalculationFailed:
            continue
    return found


def others(data: Path, folder: Path) -> list[Atoms]:
    """The pretraining frames, labelled anew."""
    return of_molecules(folder / "others.xyz", data, OTHERS)


def others_held_out(data: Path, folder: Path, name: str) -> list[Atoms]:
    """Frames of two of these molecules that nothing is trained on, for `calibration` or `test`."""
    wanted = {molecule: (HELD_OUT[name], N_HELD_OUT) for molecule in ("uracil", "toluene")}
    return of_molecules(folder / f"others_{name}.xyz", data, wanted)


def of_molecules(path: Path, data: Path, wanted: Mapping[str, tuple[str, int]]) -> list[Atoms]:
    if not path.exists():
        frames = []
        for molecule, (file, number) in wanted.items():
            every = read_frames(data / "rmd17_crossmol" / file)
            of_one = [atoms for atoms in every if atoms.info["config_type"] == molecule]
            frames += relabelled(of_one[:: len(of_one) // number][:number], config_type=molecule)
        write(path, frames)
    return read_frames(path)


def reactive(folder: Path, name: str) -> list[Atoms]:
    """The frames of `pool` or of `test`."""
    path = folder / f"{name}.xyz"
    if not path.exists():
        n_runs, n_frames = POOL if name == "pool" else TEST
        first = 100 if name == "pool" else 200  # seeds
        heated = [
            atoms
            for seed, kelvin in enumerate(KELVINS, first)
            for atoms in sample(f"{name}_{kelvin}K", kelvin, n_runs, n_frames, seed)
        ]
        number = POOL_TRANSFERS if name == "pool" else TEST_TRANSFERS
        write(path, heated + transfers(heated, number, np.random.default_rng(first)))
    return read_frames(path)


def transfers(heated: Sequence[Atoms], number: int, rng: np.random.Generator) -> list[Atoms]:
    """The proton between the oxygens of heated frames, at a random share of the way and up to 0.3 Å beside it.

    The oxygens are first moved to a distance of 2.3 to 2.7 Å, each by half of what is missing, as far as the molecule
    would bend them: at the distances that most heated frames have the proton would be nowhere near either.
    """
    found: list[Atoms] = []
    while len(found) < number:
        atoms = heated[rng.integers(len(heated))]
        bare = Atoms(atoms.numbers, atoms.positions)
        first, second = (bare.positions[i] for i in OXYGENS)
        along = (second - first) / np.linalg.norm(second - first)
        if not 2.2 < np.linalg.norm(second - first) < 3.0:
            continue  # the chelate ring is open
        missing = rng.uniform(2.3, 2.7) - np.linalg.norm(second - first)
        bare.positions[OXYGENS[0]] -= along * missing / 2
        bare.positions[OXYGENS[1]] += along * missing / 2
        first, second = (bare.positions[i] for i in OXYGENS)
        beside = rng.normal(size=3)
        beside -= along * (beside @ along)
        beside *= rng.uniform(0, 0.3) / np.linalg.norm(beside)
        bare.positions[PROTON] = first + rng.uniform(0.35, 0.65) * (second - first) + beside
        found += [
            frame
            for frame in relabelled([bare], config_type="transfer")
            if np.abs(frame.arrays["REF_forces"]).max() < LARGEST_FORCE
        ]
    return found


def pretrained(data: Path, folder: Path) -> Path:
    """A MACE that was trained on the other molecules alone."""
    target = folder / "pretrained.model"
    if not target.exists():
        others(data, folder)
        working = folder / "pretrained.training"
        working.mkdir(parents=True, exist_ok=True)
        here = {"name": "member", "train_file": (folder / "others.xyz").resolve(), "seed": 1, "device": "cpu"}
        options = [f"--{key}={value}" for key, value in (RECIPE | here).items()]
        subprocess.run(["mace_run_train", *options, "--ema", "--swa", "--restart_latest"], cwd=working, check=True)
        (working / "member_stagetwo.model").rename(target)
        shutil.rmtree(working)
    return target
