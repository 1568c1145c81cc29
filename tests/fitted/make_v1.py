"""Makes the uncertainty model of file format 1 that `test_uncertainty_model.py` reads for ever. Run once, then kept.

    python tests/fitted/make_v1.py

`v1.uq.safetensors` is the model, `v1_expected.safetensors` one evaluated batch (`in/...`) and what the model said of
it on the day it was written (`out/...`), so that the test needs no potential.
"""

from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule
from safetensors.torch import save_file

from ase_uq import fit
from ase_uq.backends import load_backend
from ase_uq.backends.toy import ToyCalculator

FOLDER = Path(__file__).parent


def frames(seed: int, count: int) -> list[Atoms]:
    """Distorted water and hydrogen peroxide, labelled by a toy potential of other weights; errors grow with them."""
    random = np.random.default_rng(seed)
    reference = ToyCalculator(("H", "O"), seed=1)
    made = []
    for _ in range(count):
        atoms = molecule(str(random.choice(["H2O", "H2O2"])))
        scale = random.uniform(0.02, 0.15)
        atoms.positions += random.normal(scale=scale, size=(len(atoms), 3))
        energy = reference.get_property("energy", atoms) + random.normal(scale=scale * len(atoms))
        forces = reference.get_property("forces", atoms) + random.normal(scale=5 * scale, size=(len(atoms), 3))
        atoms.info["REF_energy"] = energy
        atoms.set_array("REF_forces", forces)
        made.append(atoms)
    return made


def main() -> None:
    calculator = ToyCalculator(("H", "O"), direct=True)
    model = fit(calculator, frames(0, 80), frames(1, 80), methods=["bll"], progress=False)
    model.save(FOLDER / "v1.uq.safetensors")
    backend = load_backend(calculator)
    evaluation = backend.evaluate(backend.collate([*frames(2, 2), molecule("H2O", cell=[3.5] * 3, pbc=True)]))
    layer = evaluation.force_layer
    assert layer is not None
    inputs = {
        "numbers": evaluation.numbers,
        "positions": evaluation.positions,
        "frame_of_atom": evaluation.frame_of_atom,
        "n_atoms_of_frame": evaluation.n_atoms_of_frame,
        "energy": evaluation.energy,
        "features": evaluation.features,
        **{f"edges.{name}": value for name, value in vars(evaluation.edges).items() if torch.is_tensor(value)},
        **{f"energy_layer.{name}": value for name, value in vars(evaluation.energy_layer).items()},
        **{f"force_layer.{name}": value for name, value in vars(layer).items() if torch.is_tensor(value)},
    }
    outputs = model.apply(evaluation)
    tensors = {f"in/{name}": value.contiguous() for name, value in inputs.items()}
    tensors |= {f"out/{name}": value.contiguous() for name, value in outputs.items()}
    save_file(tensors, FOLDER / "v1_expected.safetensors", metadata={"fingerprint": model.identity.fingerprint})


if __name__ == "__main__":
    main()
