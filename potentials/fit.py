"""Fits the uncertainty models of the embedded potentials.

python potentials/fit.py [NAME ...]        (default: mace orb_direct orb_conservative; two minutes)
"""

import sys
from pathlib import Path

from ase_uq import fit

FOLDER = Path("ase_uq/embedded")
NAMES = ("mace", "orb_direct", "orb_conservative")


def main(names: tuple[str, ...]) -> None:
    for name in names:
        spec = f"embedded:{name.replace('_', '-')}"
        model = fit(spec, FOLDER / "train_300K.xyz", FOLDER / "calibration_300K.xyz")
        model.save(FOLDER / f"{name}.uq.safetensors")
        print(model.summary())


if __name__ == "__main__":
    main(tuple(sys.argv[1:]) or NAMES)
