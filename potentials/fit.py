"""Fits the uncertainty models of the embedded potentials.

python potentials/fit.py [NAME ...]        (default: mace orb_direct orb_conservative; a quarter of an hour)

The reference runs take most of it: twenty a potential at 300 K, on which thresholds count false alarms.
"""

import sys
from pathlib import Path

from ase_uq import UncertainCalculator, fit, read_frames
from ase_uq.methods import make_method
from ase_uq.numerics.training import Training
from ase_uq.sampling.reference_runs import reference_runs

FOLDER = Path("ase_uq/embedded")
NAMES = ("mace", "orb_direct", "orb_conservative")
# Smaller than the defaults, since they travel with the package: one molecule has not much to learn.
METHODS = (
    make_method("bll"),
    make_method("pdrum", training=Training(hidden=(32, 32))),
    make_method("kernel", landmarks=128),
)

REFERENCE = {"temperature": 300, "n_runs": 20, "ps": 0.25, "friction": 0.02, "equilibration": 0.2}


def main(names: tuple[str, ...]) -> None:
    for name in names:
        spec = f"embedded:{name.replace('_', '-')}"
        model = fit(
            spec,
            FOLDER / "train_300K.xyz",
            FOLDER / "calibration_300K.xyz",
            perturbed=FOLDER / "perturbed.xyz",
            methods=METHODS,
        )
        (atoms,) = read_frames(FOLDER / "malonaldehyde.xyz")
        atoms.calc = UncertainCalculator(spec, model)
        model = model.with_reference(reference_runs(atoms, **REFERENCE))
        model.save(FOLDER / f"{name}.uq.safetensors")
        print(model.summary())


if __name__ == "__main__":
    main(tuple(sys.argv[1:]) or NAMES)
