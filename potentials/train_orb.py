"""Trains the embedded orb-v3-architecture potentials on the 300 K training frames, from scratch.

    python potentials/train_orb.py direct        (about half an hour on one core)
    python potentials/train_orb.py conservative  (about a quarter of an hour)

Three things differ from fine-tuning a pretrained orb: the reference energies are fitted by least squares, the
normalisers are replaced (the defaults are statistics of another data set, weighted as a thousand batches), and
every batch is turned and mirrored at random, because the architecture is not equivariant.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.io import read
from orb_models.common.atoms.batch.graph_batch import AtomGraphs
from orb_models.common.models.nn_util import ScalarNormalizer
from orb_models.forcefield import pretrained
from orb_models.forcefield.forcefield_adapter import ForcefieldAtomsAdapter
from tqdm import tqdm

FRAMES = Path("ase_uq/embedded/train_300K.xyz")
ARCHITECTURE = {
    "latent_dim": 64,
    "base_mlp_hidden_dim": 128,
    "head_mlp_hidden_dim": 64,
    "num_message_passing_steps": 3,
    "has_stress": False,
}
ADAPTER = {"radius": 6.0, "max_num_neighbors": 20}
EPOCHS = {"direct": 900, "conservative": 300}
BATCH_SIZE = 8
LEARNING_RATE = 2e-3


def build(kind: str, frames: list[Atoms]) -> torch.nn.Module:
    """An untrained model whose reference energies and normalisers fit the frames."""
    model = getattr(pretrained, f"orb_v3_{kind}_architecture")(device="cpu", **ARCHITECTURE)
    counts = np.stack([np.bincount(atoms.numbers, minlength=118) for atoms in frames]).astype(float)
    energies = np.array([atoms.info["REF_energy"] for atoms in frames])
    force_std = float(np.concatenate([atoms.arrays["REF_forces"] for atoms in frames]).std())
    reference = np.linalg.lstsq(counts, energies, rcond=None)[0]
    residual = (energies - counts @ reference) / counts.sum(1)
    head = model.heads["energy"]
    head.reference.linear.weight.data = torch.tensor(reference, dtype=torch.float32)
    head.reference.linear.weight.requires_grad_(False)
    energy_std = float(residual.std())
    if kind == "conservative":
        # The energy scale sets the scale of -dE/dR too: the residual's alone would start it 100 times too small.
        energy_std = max(energy_std, force_std / np.sqrt(counts.sum(1).mean()))
        model.disable_stress()
        model.grad_forces_normalizer = ScalarNormalizer(init_mean=0.0, init_std=force_std, online=False)
    else:
        normalizer = ScalarNormalizer(init_mean=0.0, init_std=force_std, online=False)
        model.heads["forces"].normalizer = normalizer
    mean = float(residual.mean())
    head.normalizer = ScalarNormalizer(init_mean=mean, init_std=energy_std, online=False)
    forces = "forces" if kind == "direct" else "grad_forces"
    model.loss_weights = {"energy": 1.0, forces: 10.0, "confidence": 0.1}
    return model


def graph_of(atoms: Atoms, adapter: ForcefieldAtomsAdapter) -> AtomGraphs:
    bare = Atoms(atoms.numbers, atoms.positions)
    bare.info["graph_targets"] = {"energy": torch.tensor([atoms.info["REF_energy"]], dtype=torch.float64)}
    forces = torch.tensor(atoms.arrays["REF_forces"], dtype=torch.float32)
    bare.info["node_targets"] = {"forces": forces}
    return adapter.from_ase_atoms(bare, device="cpu")


def turned(batch: AtomGraphs, rng: np.random.Generator) -> AtomGraphs:
    """The batch under one random orthogonal map (rotation or reflection)."""
    matrix = torch.tensor(np.linalg.qr(rng.normal(size=(3, 3)))[0], dtype=torch.float32)
    batch = batch.clone()
    batch.node_features["positions"] = batch.node_features["positions"] @ matrix
    batch.edge_features["vectors"] = batch.edge_features["vectors"] @ matrix
    batch.node_targets["forces"] = batch.node_targets["forces"] @ matrix
    return batch


def force_mae(model: torch.nn.Module, kind: str, batch: AtomGraphs) -> float:
    model.eval()
    forces = model.predict(batch)["forces" if kind == "direct" else "grad_forces"]
    model.train()
    return float((forces.detach() - batch.node_targets["forces"]).abs().mean())


def train(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    frames = read(FRAMES, ":")
    model = build(kind, frames)
    adapter = ForcefieldAtomsAdapter(**ADAPTER)
    graphs = [graph_of(atoms, adapter) for atoms in frames]
    shuffled = rng.permutation(len(graphs))
    held_out, kept = shuffled[: len(graphs) // 12], shuffled[len(graphs) // 12 :]
    validation = AtomGraphs.batch([graphs[i] for i in held_out])
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=1e-5)
    steps = EPOCHS[kind] * (len(kept) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    model.train()
    bar = tqdm(range(EPOCHS[kind]), desc=f"orb {kind}", unit="epoch", mininterval=10)
    for epoch in bar:
        order = rng.permutation(kept)[: len(kept) // BATCH_SIZE * BATCH_SIZE]
        for chosen in order.reshape(-1, BATCH_SIZE):
            loss = model.loss(turned(AtomGraphs.batch([graphs[i] for i in chosen]), rng)).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 0.5)
            optimizer.step()
            schedule.step()
        if epoch % 10 == 9:
            bar.set_postfix_str(f"force MAE {1e3 * force_mae(model, kind, turned(validation, rng)):.1f} meV/Å")
    return model.eval()


def main(kind: str) -> None:
    torch.set_default_dtype(torch.float32)
    model = train(kind)
    from ase_uq.backends.orb.loading import save_potential

    description = {"architecture": f"orb_v3_{kind}_architecture", "arguments": ARCHITECTURE, "adapter": ADAPTER}
    save_potential(model, Path(f"ase_uq/embedded/orb_{kind}.safetensors"), description)


if __name__ == "__main__":
    main(sys.argv[1])
