# /// script
# requires-python = ">=3.12"
# dependencies = ["ase-uq[mace]"]
# ///
"""Fit, save, load and use an uncertainty model from Python, with your own potential and files. Takes half a minute."""

# %% The potential, frames it was trained on, and frames that it has never seen
import numpy as np

from ase_uq import Predictor, UncertaintyModel, embedded, fit, load_backend, metrics, read_frames

backend = load_backend("embedded:mace")  # or your MACECalculator or ORBCalculator
train = embedded.path("train_300K.xyz")
calibration = embedded.path("calibration_300K.xyz")

# %% Once: fit the uncertainty model, look at its summary, save it
fitted = fit(backend, train, calibration)
print(fitted.summary())
fitted.save("my.uq.safetensors")

# %% From then on: every prediction comes with its standard deviations, a whole batch at a time
predictor = Predictor(backend, UncertaintyModel.load("my.uq.safetensors"))
for name in ("test_300K.xyz", "test_900K.xyz"):
    frames = read_frames(embedded.path(name))[::5]
    predictions = predictor.predict(frames)
    true = np.concatenate([atoms.arrays["REF_forces"] for atoms in frames])
    forces, std = (np.concatenate([p[key] for p in predictions]) for key in ("forces", "forces_uncertainty"))
    print(
        f"{name}: force MAE {1000 * metrics.mae(true, forces):.0f} meV/Å, mean z² "
        f"{metrics.mean_squared_z(true, forces, std):.2f}, within one σ {metrics.coverage(true, forces, std):.0%}, "
        f"Spearman {metrics.spearman(np.linalg.norm(true - forces, axis=1), std[:, 0]):.2f}"
    )

# %% One structure in detail: which atom is the potential least sure of?
worst = max(predictions, key=lambda prediction: prediction.atom_uncertainty.max())
for atom, epsilon, gamma in zip(frames[predictions.index(worst)], worst.atom_uncertainty, worst["gamma"], strict=True):
    print(f"  atom {atom.index} {atom.symbol:2s} force uncertainty {epsilon:.3f} eV/Å, gamma {gamma:.1f}")
