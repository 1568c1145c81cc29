"""Makes the uncertainty models that `test_uncertainty_model.py` reads for ever: one a file format, then kept.

    python tests/fitted/make_fitted.py v7

`v7.uq.safetensors` is the model, `v7_expected.safetensors` one evaluated batch (`in/...`) and what the model said of
it on the day it was written (`out/...`), so that the test needs no potential. Format 1 had one method, without the
share of the receptive field in its site sums; format 2 has several and their combination; format 3 the runs of its
calibration frames, perturbed frames and reference runs; format 4 other names; format 5 a far field; format 6 one of
atomic energies and of stresses; format 7 a combination of energies. Up to format 5 the potential had a direct head for
forces, and therefore no stress.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule
from safetensors.torch import save_file

from ase_uq import fit
from ase_uq.backends import load_backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.methods import make_method
from ase_uq.numerics.training import Training
from ase_uq.thresholds.data import ReferenceRuns
from ase_uq.uncertainty_model.combination import Combination

FOLDER = Path(__file__).parent


def frames(seed: int, count: int) -> list[Atoms]:
    """Distorted water and hydrogen peroxide in cells, labelled by a toy potential of other weights; errors grow."""
    random = np.random.default_rng(seed)
    reference = ToyCalculator(("H", "O"), seed=1)
    made = []
    for _ in range(count):
        atoms = molecule(str(random.choice(["H2O", "H2O2"])))
        scale = random.uniform(0.02, 0.15)
        atoms.positions += random.normal(scale=scale, size=(len(atoms), 3))
        atoms.set_cell([5.0] * 3)
        atoms.pbc = True
        energy = reference.get_property("energy", atoms) + random.normal(scale=scale * len(atoms))
        forces = reference.get_property("forces", atoms) + random.normal(scale=5 * scale, size=(len(atoms), 3))
        stress = reference.get_property("stress", atoms) + random.normal(scale=0.05 * scale, size=6)
        atoms.info |= {"REF_energy": energy, "REF_stress": stress}
        atoms.set_array("REF_forces", forces)
        made.append(atoms)
    return made


def main(version: str) -> None:
    calculator = ToyCalculator(("H", "O"))
    methods = [
        make_method("bll"),
        make_method("pdrum", folds=2, training=Training(hidden=(8,))),
        make_method("kernel", landmarks=16),
    ]
    model = fit(
        calculator, frames(0, 80), frames(1, 80), perturbed=frames(4, 20), methods=methods, progress=False
    ).with_reference(ReferenceRuns((np.linspace(1, 2, 20),) * 9, interval=0.5))
    # So few toy frames support no correction of energies, and the file is to have some.
    assert isinstance(model.combination, Combination)
    assert model.combination.energy is not None
    weights = {"pdrum": 0.5, "kernel": 0.3}
    model.combination.energy = replace(model.combination.energy, floor=-99.0, constant=0.1, weights=weights)
    print(model.summary())
    model.save(FOLDER / f"{version}.uq.safetensors")
    backend = load_backend(calculator)
    forward_pass = backend.forward(backend.collate([*frames(2, 2), molecule("H2O", cell=[3.5] * 3, pbc=True)]))
    assert forward_pass.stress is not None
    assert forward_pass.volumes is not None
    inputs = {
        "numbers": forward_pass.numbers,
        "positions": forward_pass.positions,
        "frame_of_atom": forward_pass.frame_of_atom,
        "n_atoms_of_frame": forward_pass.n_atoms_of_frame,
        "energy": forward_pass.energy,
        "features": forward_pass.features,
        "forces": forward_pass.forces,
        "stress": forward_pass.stress,
        "volumes": forward_pass.volumes,
        "edges.source": forward_pass.edges.source,
        "edges.target": forward_pass.edges.target,
        "edges.vector": forward_pass.edges.vector,
        "edges.cutoff": torch.tensor(forward_pass.edges.cutoff),
        **{f"energy_layer.{name}": value for name, value in vars(forward_pass.energy_layer).items()},
    }
    outputs = model.apply(forward_pass)
    tensors = {f"in/{name}": value.clone() for name, value in inputs.items()}
    tensors |= {f"out/{name}": value.clone() for name, value in outputs.items()}
    save_file(tensors, FOLDER / f"{version}_expected.safetensors", metadata={"fingerprint": model.identity.fingerprint})


if __name__ == "__main__":
    main(sys.argv[1])
