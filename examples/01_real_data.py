# /// script
# requires-python = ">=3.12"
# dependencies = ["ase-uq[mace]"]
# ///
"""Real DFT data: what the uncertainties of a MACE are worth before and after calibration, near its data and far away.

    python examples/01_real_data.py                    acetylacetone; about two minutes on a laptop
    python examples/01_real_data.py MODEL --train FILE --calibration FILE NAME=FILE [NAME=FILE ...]

"Before" is the textbook predictive variance of the Bayesian last layer, σ² = σ_e²·(1 + u), with σ_e² the mean squared
residual on the training frames and u the leverage of the atom. It accounts only for noise and uncertain weights.
"After" is calibrated on frames that the potential was not trained on; the test frames are in neither set.
"""

# %% What to look at
import argparse
from pathlib import Path

import numpy as np

from ase_uq import fit, load_backend, metrics, read_frames
from ase_uq.io.labels import labels_of
from ase_uq.io.source import Source
from ase_uq.stream.passes import complete, passes

SHARED = Path(__file__).resolve().parents[2] / "shared"
ACAC = SHARED / "data" / "acac"
TESTS = (f"300 K={ACAC / 'test_id_300K.xyz'}", f"600 K={ACAC / 'ood_md_600K.xyz'}")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", default=SHARED / "models" / "mace_acac.model", help="a MACE .model file")
parser.add_argument("tests", nargs="*", default=TESTS, metavar="NAME=FILE", help="labelled test frames")
parser.add_argument("--train", default=ACAC / "train_300K.xyz")
parser.add_argument("--calibration", default=ACAC / "calib_300K.xyz")
parser.add_argument("--every", type=int, default=1, help="take every n-th frame only")
arguments = parser.parse_intermixed_args()


def frames_of(path):
    return [a for a in read_frames(path) if a.info.get("config_type") != "IsolatedAtom"][:: arguments.every]


# %% Fit and calibrate: one pass over each file
backend = load_backend(f"mace:{arguments.model}")
train = frames_of(arguments.train)
fitted = fit(backend, train, frames_of(arguments.calibration), methods=["bll"])
print(fitted.summary(), "\n")
head = fitted.methods["bll"].head


def evaluated(frames):
    """Residuals, leverages and calibrated standard deviations, first of forces and then of energies per atom."""
    columns = []
    events = passes(backend, Source(frames), lambda e: (e.forces, e.energy, head(e), fitted.apply(e)), batch_atoms=1000)
    for batch in complete(events):
        forces, energies, raw, after = batch.value
        labels = [labels_of(atoms) for atoms in batch.frames]
        counts = np.array([len(atoms) for atoms in batch.frames])
        columns.append(
            (
                np.concatenate([label.forces for label in labels]) - forces.numpy(),
                leverage("atoms", raw.distance.numpy()),
                after["forces_uncertainty"].numpy(),
                (np.array([label.energy for label in labels]) - energies.numpy()) / counts,
                leverage("energy", raw.energy[:, 0].numpy()),
                after["energy_uncertainty"].numpy() / counts,
                counts,
            )
        )
    return [np.concatenate(column) for column in zip(*columns, strict=True)]


def leverage(part, scale_free):
    """u = ũ·γ/N, since heads keep the scale-free ũ, whose mean over the training rows is 1."""
    settings = head.settings[part]
    return scale_free * settings["effective"] / settings["rows"]


# %% Judge the uncertainties on frames that neither step has seen
JUDGES = (
    metrics.nll,
    lambda *sample: metrics.coverage(*sample, level=0.68),
    lambda *sample: metrics.coverage(*sample, level=0.95),
    metrics.mean_squared_z,
)


def row(name, residuals, before, after, ranks):
    zeros = np.zeros_like(residuals)
    error = f"{1000 * metrics.mae(residuals, zeros):9.1f}"
    judged = [f"{judge(residuals, zeros, before):9.2f} →{judge(residuals, zeros, after):6.2f}" for judge in JUDGES]
    return "".join([f"{name:22s}", error, *(f"{rank:>9}" for rank in ranks), *judged])


def rank(errors, std):
    return f"{metrics.spearman(errors, std):.2f}"


train_force, *_, train_energy, _, _, _ = evaluated(train)
force_noise, energy_noise = np.mean(train_force**2), np.mean(train_energy**2)
tables = {"forces, eV/Å": [], "energies per atom, eV": []}
for test in arguments.tests:
    name, _, path = str(test).partition("=")
    force, u_force, std_force, energy, u_energy, std_energy, counts = evaluated(frames_of(path))
    before = np.broadcast_to(np.sqrt(force_noise * (1 + u_force))[:, None], force.shape)
    errors, epsilon = np.linalg.norm(force, axis=1), np.linalg.norm(std_force, axis=1)
    ends = np.cumsum(counts)[:-1]
    largest = [np.array([part.max() for part in np.split(values, ends)]) for values in (errors, epsilon)]
    ranks = (rank(errors, epsilon), rank(*largest))
    tables["forces, eV/Å"].append(row(name, force, before, std_force, ranks))
    before = np.sqrt(energy_noise * (1 + u_energy))
    ranks = ("", rank(energy, std_energy))
    tables["energies per atom, eV"].append(row(name, energy, before, std_energy, ranks))

print(
    f"{'before → after':22s}  MAE/meV    Spearman         NLL             in 68 %           in 95 %           mean z²"
)
print(f"{'calibration':22s}             atoms   frames")
for title, rows in tables.items():
    print(title, *rows, sep="\n")
