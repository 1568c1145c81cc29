"""Trains the embedded MACE on the 300 K training frames and stores it as safetensors (no pickle).

    python potentials/train_mace.py [OUT]      (default: ase_uq/embedded/mace.safetensors)

MACE's own command does the training, half an hour on one core; this script fixes its arguments.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

FRAMES = Path("ase_uq/embedded/train_300K.xyz").resolve()
# GFN2-xTB energies of the isolated atoms in their ground states (doublet, triplet, triplet), eV.
ISOLATED_ATOMS = {1: -10.707211383283003, 6: -48.79807984748428, 8: -102.5218071447532}
ARGUMENTS = {
    "name": "mace",
    "model": "MACE",
    "train_file": FRAMES,
    "valid_fraction": 0.1,
    "energy_key": "REF_energy",
    "forces_key": "REF_forces",
    "E0s": ISOLATED_ATOMS,
    "hidden_irreps": "16x0e + 16x1o",
    "num_interactions": 2,
    "correlation": 3,
    "max_ell": 3,
    "r_max": 5.0,
    "num_radial_basis": 8,
    "radial_MLP": "[32, 32, 32]",
    "batch_size": 8,
    "lr": 0.01,
    "forces_weight": 100.0,
    "energy_weight": 1.0,
    "ema_decay": 0.99,
    "max_num_epochs": 160,
    "start_swa": 120,
    "swa_energy_weight": 1000.0,
    "scheduler_patience": 15,
    "eval_interval": 5,
    "default_dtype": "float64",
    "device": "cpu",
    "seed": 1,
    "plot": False,
}
SWITCHES = ("--ema", "--swa")


def main(out: Path) -> None:
    out = out.resolve()
    with tempfile.TemporaryDirectory() as folder:
        options = [f"--{name}={value}" for name, value in ARGUMENTS.items()]
        subprocess.run(["mace_run_train", *options, *SWITCHES], cwd=folder, check=True)
        from mace.calculators import MACECalculator  # importing mace takes seconds: only once it is needed

        from ase_uq.backends.mace.loading import save_potential

        calculator = MACECalculator(model_paths=str(Path(folder) / "mace_stagetwo.model"), device="cpu")
        save_potential(calculator.models[0], out)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "ase_uq/embedded/mace.safetensors"))
