"""Training of stochastic weights: a potential is fine-tuned while noise on its weights learns how large it may be.

    train_blip("mace:my.model", "train.xyz", "validation.xyz", out="my.blip.safetensors")
    backend = load_backend("mace:my.model?blip=my.blip.safetensors")

The loss of a structure with N atoms, averaged over draws of the noise, is minus its evidence lower bound,

    Σ -ln N(F_ref - F; σ_F²) - ln N((E_ref - E) / N; σ_E²) + λ/M Σ_g n_g KL(α_g(G) | α₀),

with M training frames, n_g weights in group g and noise levels σ that are trained too, or, for `loss="crps"`, the
continuous ranked probability scores of its forces and of its energy per atom, in units of the potential's errors at the
start.
Frames become batches as in MACE's own training, and the likelihood of one draw is MACE's weighted loss of energies and
forces with weights 1/2σ². Sources: BLIP (Coscia, de Haan and Welling 2025); for the CRPS, Ferro (2014).
"""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from torch import Tensor

from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.backends.stochastic import LARGEST_SEED, Blip, StochasticModel, check_members
from ase_uq.communicator import Serial
from ase_uq.display.progress import progress_bar
from ase_uq.errors import ArtefactError, LabelError
from ase_uq.fitting.blip_loss import losses
from ase_uq.fitting.checks import Files, check_labelled, refuse_overlap, without_isolated_atoms
from ase_uq.fitting.provenance import digest_of
from ase_uq.forward_pass import Targets, residuals_of
from ase_uq.io.files import check_distinct, check_replaceable, paths_of
from ase_uq.io.frames import read_frames
from ase_uq.io.labels import labels_of
from ase_uq.io.tensor_file import read_tensor_file, write_tensor_file
from ase_uq.numerics.hashing import substream
from ase_uq.numerics.variational import (
    LARGEST_RATE,
    SMALLEST_RATE,
    Rates,
    prior_rate,
    relative_entropy,
)
from ase_uq.stream.labelled import LabelledStream

_KIND, _SCHEMA = "training of stochastic weights", 1
_RATE_OF_RATES = 100.0  # learning rate of α and σ, which start far from where they end, beside that of the weights
_VALIDATION_DRAWS = 4
_VALIDATION_SEED = LARGEST_SEED + 1  # nobody's, so that no member is drawn with the noise that picked the epoch


@dataclass(frozen=True)
class BlipTraining:
    """How stochastic weights are trained.

    Args:
        loss: `elbo` or `crps`.
        dropout: Dropout rate p of the prior, α₀ = p / (1 - p), and of α at the start.
        kl_weight: λ.
        draws: Number of draws of the noise in each step.
        learning_rate: Learning rate of the weights; that of rates and noise levels is a hundred times as large.
        batch: Structures in a step.
        max_epochs: Largest number of epochs.
        patience: Number of epochs without a better validation loss after which training ends.
        seed: Seed of noise, batches and the network of the rates.
    """

    loss: Literal["elbo", "crps"] = "elbo"
    dropout: float = 1e-4
    kl_weight: float = 1.0
    draws: int = 2
    learning_rate: float = 1e-4
    batch: int = 5
    max_epochs: int = 30
    patience: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in ("elbo", "crps"):
            raise ValueError(f"loss is {self.loss!r}; elbo or crps was expected.")
        if not (0 <= self.dropout < 1 and SMALLEST_RATE < prior_rate(self.dropout) < LARGEST_RATE):
            raise ValueError(
                f"dropout is {self.dropout!r}; a number above {SMALLEST_RATE:g} and below 0.5 was expected."
            )
        counts = {"draws": self.draws, "batch": self.batch, "max_epochs": self.max_epochs, "patience": self.patience}
        if wrong := [name for name, count in counts.items() if not (isinstance(count, int) and count >= 1)]:
            raise ValueError(f"{wrong[0]} is {counts[wrong[0]]}; a whole number, 1 or more, was expected.")
        if not (isinstance(self.seed, int) and abs(self.seed) <= LARGEST_SEED):
            raise ValueError(f"seed is {self.seed!r}; a whole number of at most {LARGEST_SEED} was expected.")
        if self.loss == "crps" and self.draws < 2:
            raise ValueError("draws is 1, which has no spread; the CRPS needs 2 or more.")
        if not 0 < self.learning_rate < np.inf or not 0 <= self.kl_weight < np.inf:
            raise ValueError(
                f"learning_rate is {self.learning_rate!r} and kl_weight {self.kl_weight!r}; a positive number, and one "
                "that is not negative, were expected."
            )


def train_blip(
    potential: BaseCalculator | str | os.PathLike[str] | Backend,
    train: Files,
    validation: Files,
    *,
    out: str | os.PathLike[str],
    training: BlipTraining | None = None,
    n_members: int = 8,
    label_keys: tuple[str, str, str] | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Blip:
    """Trains stochastic weights from a potential and writes them; the potential itself is not changed.

    After each epoch all that is needed to go on is written to `OUT.training`, which is removed at the end: the same
    call takes up a training that was killed, and ends with the same weights as one that was not.

    Args:
        potential: MACE, or the toy, as for `load_backend`.
        train: Labelled frames to train on, as a rule those of the potential.
        validation: Labelled frames, not among them, that decide when to stop and which epoch is kept.
        out: File for the weights.
        training: How to train.
        n_members: Number of members that the file asks for; it can be changed later.
        label_keys: Names of the labels, as for `fit`.
        overwrite: Whether `out` may be replaced.
        progress: Whether to show a progress bar.

    Returns:
        What was written to `out`.

    Raises:
        FileExistsError: `out` exists.
        ArtefactError: `out` cannot be written, or `OUT.training` is of another training.
        LabelError: Frames are too few or have no, wrong or non-finite labels, or are in both sets.
        InputError: Weights of this potential cannot be drawn, or it cannot evaluate a frame.
        ValueError: The loss became infinite or not a number.
    """
    check_members(n_members)
    check_distinct([*paths_of(train), *paths_of(validation)], out)
    check_replaceable(out, overwrite)
    backend = load_backend(potential)
    model = backend.stochastic()
    frames = {
        what: without_isolated_atoms(read_frames(given, name=f"{what} frames"))
        for what, given in (("training", train), ("validation", validation))
    }
    for what, some in frames.items():
        check_labelled(backend, what, some, label_keys, forces=True)
        backend.check(some, name=f"{what} structure")
    refuse_overlap(frames["training"], frames["validation"], "validation")
    how = training or BlipTraining()
    run = _Run.started(backend, model, how, frames, label_keys)
    path = Path(f"{os.fspath(out)}.training")
    if path.exists():
        run.resume(path)
    else:
        run.best_loss = run.validated()
    with progress_bar(total=how.max_epochs, desc="training", unit="epoch", show=progress, leave=False) as bar:
        bar.update(run.epoch)
        while run.epoch < how.max_epochs and run.waited < how.patience:
            run.next_epoch()
            run.save(path)
            bar.set_postfix(loss=f"{run.best_loss:.4g}", refresh=False)
            bar.update()
    blip = replace(run.blip(), n_members=n_members)
    blip.save(out)
    path.unlink(missing_ok=True)
    return blip


def mc_dropout(
    potential: BaseCalculator | str | os.PathLike[str] | Backend, dropout: float, *, n_members: int = 8, seed: int = 0
) -> Blip:
    """Weights of Gaussian dropout: α is p / (1 - p) for all structures, and nothing is trained.

    Args:
        potential: As for `train_blip`.
        dropout: p; 0 for members that are all the potential itself.
        n_members: Number of members.
        seed: Seed of their noise.
    """
    backend = load_backend(potential)
    model = backend.stochastic()
    rates = Rates.constant(list(model.groups), prior_rate(dropout))
    weights = {name: weight.detach().clone() for name, weight in model.parameters.items()}
    return Blip(backend.identity, weights, rates, n_members, seed, {"dropout": dropout})


class _Run:
    """A training: all that changes, and what is needed to go on.

    Attributes:
        epoch: Number of finished epochs.
        waited: Number of epochs since the best one.
        best_loss: Validation loss of the best epoch, or of the beginning if none was better, per label.
        history: Training and validation loss of each epoch.
    """

    def __init__(
        self, backend: Backend, model: StochasticModel, how: BlipTraining, rates: Rates, log_std: Tensor, digest: str
    ) -> None:
        self.backend, self.model, self.how, self.rates, self.digest = backend, model, how, rates, digest
        self.weights = dict(model.parameters)
        others = [*rates.trainable, log_std]
        for tensor in (*self.weights.values(), *others):
            tensor.requires_grad_(True)
        self.log_std = log_std
        rate = how.learning_rate
        self.descent = torch.optim.Adam(
            [{"params": list(self.weights.values()), "lr": rate}, {"params": others, "lr": _RATE_OF_RATES * rate}]
        )
        self.trained = [*self.weights.values(), *others]
        self.best = [tensor.detach().clone() for tensor in self.trained]
        self.epoch, self.waited, self.best_loss = 0, 0, float("inf")
        self.history: list[list[float]] = []
        self.frames: dict[str, list[Atoms]] = {}
        self.keys: tuple[str, str, str] | None = None

    @classmethod
    def started(
        cls,
        backend: Backend,
        model: StochasticModel,
        how: BlipTraining,
        frames: dict[str, list[Atoms]],
        keys: tuple[str, str, str] | None,
    ) -> "_Run":
        """A training before its first epoch, with the errors of the potential as noise levels."""
        rows, squares = [], np.zeros((2, 2))
        stream = LabelledStream(
            backend, frames["training"], Serial(), batch_atoms=None, forces=True, keys=keys, name="training frame"
        )
        first = 0
        for forward_pass, targets in stream:
            count = forward_pass.n_frames
            rows.append(model.invariants(backend.collate(frames["training"][first : first + count])))
            first += count
            assert forward_pass.forces is not None
            energy = residuals_of(targets.energy, forward_pass.energy) / forward_pass.n_atoms_of_frame
            for place, found in enumerate((residuals_of(targets.forces, forward_pass.forces), energy)):
                known = found[torch.isfinite(found)]
                squares[place] += float(known.square().sum()), known.numel()
        rmse = np.sqrt(squares[:, 0] / np.maximum(squares[:, 1], 1))
        if not rmse[0] > 0:
            raise LabelError("the training labels are the potential's own forces: there are no errors to learn from.")
        log_std = torch.from_numpy(np.log(np.where(rmse > 0, rmse, rmse[0])))
        rates = Rates.network(list(model.groups), torch.cat(rows), prior_rate(how.dropout), substream(how.seed, 0))
        told = asdict(replace(how, max_epochs=1, patience=1))  # how long may be said anew: nothing before depends on it
        digest = hashlib.sha256(repr((backend.identity.fingerprint, told)).encode())
        for atoms in (*frames["training"], *frames["validation"]):
            labels = labels_of(atoms, keys)
            digest.update(f"{digest_of(atoms)}{labels.energy}".encode() + np.asarray(labels.forces, float).tobytes())
        run = cls(backend, model, how, rates.to(backend.device), log_std.to(backend.device), digest.hexdigest())
        run.frames, run.keys = frames, keys
        return run

    def next_epoch(self) -> None:
        """Trains on all frames once, in an order of the epoch, and judges what came of it."""
        frames = self.frames["training"]
        generator = torch.Generator().manual_seed(substream(self.how.seed, self.epoch + 1) % 2**63)
        order = torch.randperm(len(frames), generator=generator).tolist()
        total = []
        for step, first in enumerate(range(0, len(order), self.how.batch)):
            chosen = [frames[place] for place in order[first : first + self.how.batch]]
            noise = substream(substream(self.how.seed, self.epoch + 1), step)
            loss = self._loss(chosen, noise, self.how.draws, training=True)
            self._check(float(loss.detach()), "loss")
            slopes = torch.autograd.grad(loss, self.trained, allow_unused=True)
            for tensor, slope in zip(self.trained, slopes, strict=True):
                tensor.grad = slope
            self.descent.step()
            total.append(float(loss.detach()))
        held_out = self.validated()
        self._check(held_out, "validation loss")
        self.epoch += 1
        self.waited += 1
        self.history.append([float(np.mean(total)), held_out])
        if held_out < self.best_loss:
            self.best_loss, self.waited = held_out, 0
            self.best = [tensor.detach().clone() for tensor in self.trained]

    def _check(self, loss: float, what: str) -> None:
        if not math.isfinite(loss):
            raise ValueError(
                f"the {what} became {loss} in epoch {self.epoch}. Train with a lower learning rate "
                f"({self.how.learning_rate:g} now) or dropout ({self.how.dropout:g} now)."
            )

    def validated(self) -> float:
        """Loss of the validation frames, per label, with the same noise in all epochs."""
        frames, size = self.frames["validation"], self.how.batch
        parts = [frames[first : first + size] for first in range(0, len(frames), size)]
        total = [
            (float(self._loss(part, _VALIDATION_SEED, _VALIDATION_DRAWS).detach()), _n_labels(part)) for part in parts
        ]
        return sum(loss * count for loss, count in total) / sum(count for _, count in total)

    def _loss(self, frames: Sequence[Atoms], seed: int, draws: int, training: bool = False) -> Tensor:
        batch = self.backend.collate(frames)
        drawn = self.model.draw(batch, self.rates, self.model.noise(draws, seed), training=training)
        counts = torch.tensor([len(atoms) for atoms in frames], device=self.backend.device)
        targets = _targets(frames, self.keys, self.backend.device)
        found = losses(drawn, targets, counts, self.log_std, self.how.loss, self._relative)
        return found.sum() / _n_labels(frames)

    def _relative(self, rates: Tensor) -> Tensor:
        sizes = torch.tensor(list(self.model.groups.values()), dtype=torch.float64, device=rates.device)
        weight = self.how.kl_weight / len(self.frames["training"])
        return weight * relative_entropy(rates, prior_rate(self.how.dropout)) @ sizes

    def save(self, path: Path) -> None:
        """Writes all that is needed to go on."""
        tensors = {f"now.{place}": tensor.detach() for place, tensor in enumerate(self.trained)}
        tensors |= {f"best.{place}": tensor for place, tensor in enumerate(self.best)}
        for place, state in self.descent.state_dict()["state"].items():
            tensors |= {f"adam.{place}.{name}": torch.as_tensor(value) for name, value in state.items()}
        header = {"digest": self.digest, "waited": self.waited, "best_loss": self.best_loss, "history": self.history}
        write_tensor_file(path, _KIND, _SCHEMA, header, tensors)

    def resume(self, path: Path) -> None:
        """Takes up what `save` wrote.

        Raises:
            ArtefactError: It is of another training.
        """
        header, tensors = read_tensor_file(path, _KIND, _SCHEMA)
        if header.get("digest") != self.digest:
            raise ArtefactError(
                f"{path} is what another training left, of other frames, settings or another potential. Remove it to "
                "begin anew, or give another name for the output."
            )
        states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "adam":
                place, _, entry = rest.partition(".")
                states.setdefault(int(place), {})[entry] = tensor
        with torch.no_grad():
            for place, tensor in enumerate(self.trained):
                tensor.copy_(tensors[f"now.{place}"])
                self.best[place].copy_(tensors[f"best.{place}"])
        self.descent.load_state_dict({**self.descent.state_dict(), "state": states})
        self.waited, self.best_loss, self.history = header["waited"], header["best_loss"], header["history"]
        self.epoch = len(self.history)

    def blip(self) -> Blip:
        """The best epoch, as a file holds it."""
        count = len(self.weights)
        weights = dict(zip(self.weights, self.best[:count], strict=True))
        names = [
            name for name, tensor in self.rates.named_buffers() if any(tensor is one for one in self.rates.trainable)
        ]
        held = {name: tensor.detach() for name, tensor in self.rates.named_buffers()}
        held |= dict(zip(names, self.best[count:-1], strict=True))
        told = {**asdict(self.how), "epochs": self.epoch, "best_loss": self.best_loss, "history": self.history}
        told |= {"noise_levels": self.best[-1].exp().tolist()}
        return Blip(self.backend.identity, weights, Rates(self.rates.settings, held), seed=self.how.seed, training=told)


def _targets(frames: Sequence[Atoms], keys: tuple[str, str, str] | None, device: torch.device) -> Targets:
    labels = [labels_of(atoms, keys) for atoms in frames]
    energy = [np.nan if label.energy is None else label.energy for label in labels]
    forces = np.concatenate([np.asarray(label.forces, float) for label in labels])
    return Targets(
        frames=torch.arange(len(frames), device=device),
        energy=torch.tensor(energy, dtype=torch.float64, device=device),
        forces=torch.as_tensor(forces, device=device),
    )


def _n_labels(frames: Sequence[Atoms]) -> int:
    return sum(3 * len(atoms) + 1 for atoms in frames)
