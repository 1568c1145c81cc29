"""Trains the committees that benchmarks/quality_of_set.py compares with: equals but for their seed.

    python benchmarks/train_committee.py acac OUT_FOLDER [--data ../shared/data] [--seeds 1 2 3 4 5]
    python benchmarks/train_committee.py si_mlearn OUT_FOLDER
    python benchmarks/train_committee.py malonaldehyde OUT_FOLDER --data ase_uq --seeds 1 2 3 4
    python benchmarks/train_committee.py rmd17_uracil OUT_FOLDER --seeds 1

The last but one is for benchmarks/monitoring: the architecture and frames of the embedded MACE. `rmd17_MOLECULE` is for
benchmarks/published.py: one molecule of the frames of rmd17_crossmol.
Writes OUT_FOLDER/<name>_<seed>.model; a member that is there already is kept. A training that was stopped goes on from
its last checkpoint in OUT_FOLDER/<name>_<seed>.training when the same command is run again. The architecture is that of
the P-DRUM paper: 32 scalar and 32 vector channels, 2 layers, 5 Å. MACE's own command does the training; this script
fixes its arguments. Members differ in their seed, which is also that of the frames held out for validation.
"""

import argparse
import shutil
import subprocess
from pathlib import Path

from ase import Atoms
from ase.io import iread, write

ARCHITECTURE = {
    "model": "MACE",
    "hidden_irreps": "32x0e + 32x1o",
    "num_interactions": 2,
    "correlation": 3,
    "max_ell": 3,
    "r_max": 5.0,
    "lr": 0.01,
    "forces_weight": 100.0,
    "energy_weight": 1.0,
    "swa_energy_weight": 1000.0,
    "ema_decay": 0.99,
    "valid_fraction": 0.1,
    "energy_key": "REF_energy",
    "forces_key": "REF_forces",
    "default_dtype": "float64",
    "plot": False,
}
# GFN2-xTB energies of the isolated atoms, eV; see potentials/train_mace.py.
ISOLATED_ATOMS = {1: -10.707211383283003, 6: -48.79807984748428, 8: -102.5218071447532}
# Epochs are what two CPU cores train in an hour, and for rmd17_MOLECULE what one core trains in a quarter of an hour; a
# committee of better members would have smaller errors to rank.
RECIPES = {
    "acac": {
        "frames": ["train_300K.xyz", "isolated_atoms.xyz"],
        "batch_size": 8,
        "max_num_epochs": 64,
        "start_swa": 48,
        "scheduler_patience": 15,
        "eval_interval": 4,
    },
    "si_mlearn": {
        "frames": ["train.xyz"],
        "E0s": "average",
        "batch_size": 2,
        "max_num_epochs": 60,
        "start_swa": 45,
        "scheduler_patience": 15,
        "eval_interval": 4,
    },
    "malonaldehyde": {
        "folder": "embedded",
        "frames": ["train_300K.xyz"],
        "E0s": ISOLATED_ATOMS,
        "hidden_irreps": "16x0e + 16x1o",
        "radial_MLP": "[32, 32, 32]",
        "batch_size": 8,
        "max_num_epochs": 64,
        "start_swa": 48,
        "scheduler_patience": 15,
        "eval_interval": 4,
    },
    "rmd17_crossmol": {
        "frames": ["train_malonaldehyde_uracil_toluene.xyz", "isolated_atoms.xyz"],
        "batch_size": 8,
        "max_num_epochs": 24,
        "start_swa": 18,
        "scheduler_patience": 15,
        "eval_interval": 4,
    },
    "MoNbTaW": {
        "frames": ["train_MoNbTa.xyz"],
        "E0s": "average",
        "batch_size": 8,
        "max_num_epochs": 16,
        "start_swa": 12,
        "scheduler_patience": 15,
        "eval_interval": 4,
    },
}
OF_MOLECULE = RECIPES["rmd17_crossmol"] | {"folder": "rmd17_crossmol", "max_num_epochs": 64, "start_swa": 48}
RECIPES |= {f"rmd17_{name}": OF_MOLECULE | {"molecule": name} for name in ("malonaldehyde", "uracil", "toluene")}


def train(name: str, seed: int, data: Path, out: Path, device: str) -> None:
    target = out / f"{name}_{seed}.model"
    if target.exists():
        print(f"{target} is there already")
        return
    recipe = dict(RECIPES[name])
    sources = recipe.pop("frames")
    labelled = data / recipe.pop("folder", name)
    molecule = recipe.pop("molecule", "")
    folder = target.with_suffix(".training")
    folder.mkdir(parents=True, exist_ok=True)
    frames = folder / "train.xyz"
    frames.write_text("".join((labelled / source).read_text() for source in sources))
    if molecule:
        write(frames, only(list(iread(frames)), molecule))
    arguments = ARCHITECTURE | recipe | {"name": "member", "train_file": frames, "seed": seed, "device": device}
    options = [f"--{key}={value}" for key, value in arguments.items()]
    subprocess.run(["mace_run_train", *options, "--ema", "--swa", "--restart_latest"], cwd=folder, check=True)
    (folder / "member_stagetwo.model").rename(target)
    shutil.rmtree(folder)
    print(f"wrote {target}")


def only(frames: list[Atoms], molecule: str) -> list[Atoms]:
    """Frames of one molecule, and the isolated atoms of its elements."""
    of_one = [atoms for atoms in frames if atoms.info["config_type"] == molecule]
    elements = {number for atoms in of_one for number in atoms.numbers}
    return of_one + [atoms for atoms in frames if len(atoms) == 1 and atoms.numbers[0] in elements]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        train(arguments.name, seed, arguments.data.resolve(), arguments.out.resolve(), arguments.device)


if __name__ == "__main__":
    main()
