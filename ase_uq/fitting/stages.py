"""The two stages of a fit: heads from training frames, then calibrators and their combination from held-out frames."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from ase import Atoms
from torch import Tensor

from ase_uq.backends.base import Backend
from ase_uq.calibration import fit_edges
from ase_uq.communicator import Communicator
from ase_uq.fitting.calibrate import Observed, calibrated_method, observe, with_perturbed
from ase_uq.fitting.checks import tell_zero_forces
from ase_uq.fitting.combination import KeptBatches, combine, inputs_of
from ase_uq.fitting.energy_combination import combine_energies
from ase_uq.fitting.know_nothing import ShortestDistances, know_nothing
from ase_uq.fitting.provenance import provenance_of, runs_of
from ase_uq.forward_pass import ForwardPass, Targets
from ase_uq.methods.base import Head, Method
from ase_uq.stream.labelled import LabelledStream
from ase_uq.uncertainty_model.model import UncertaintyModel


@dataclass(frozen=True)
class Work:
    """How frames are evaluated.

    Args:
        backend: The potential.
        keys: Names of the labels, as in `labels_of`.
        batch_atoms: Largest number of atoms evaluated together; None for the default of the device.
        communicator: Ranks that share the work.
        progress: Whether this one shows progress bars.
    """

    backend: Backend
    keys: tuple[str, str, str] | None
    batch_atoms: int | None
    communicator: Communicator
    progress: bool

    def title(self, text: str) -> str:
        """Title of a progress bar; empty for none."""
        return text if self.progress else ""

    def stream(
        self, frames: Sequence[Atoms], kind: str, title: str, *, forces: bool = True, gradients: bool = False
    ) -> LabelledStream:
        """Forward passes of labelled frames, of this rank's part of them."""
        return LabelledStream(
            self.backend,
            frames,
            self.communicator,
            batch_atoms=self.batch_atoms,
            keys=self.keys,
            forces=forces,
            gradients=gradients,
            title=self.title(title),
            name=f"{kind} frame",
        )

    def with_perturbed(self, model: UncertaintyModel, frames: list[Atoms]) -> UncertaintyModel:
        """The model with a record of its uncertainties and errors on deliberately bad frames."""
        options = {"batch_atoms": self.batch_atoms, "keys": self.keys}
        return with_perturbed(model, self.backend, frames, self.progress, options)


@dataclass(frozen=True)
class Trained:
    """Heads, and what else is known of the frames that they were fitted on.

    Args:
        heads: Heads by method; the first gives what no combination gives.
        elements: Atomic numbers of the training frames.
        shortest: (n_elements, n_elements) shortest distances of their pairs, Å, as of `ShortestDistances`.
        frames: Frames that are rattled until the potential knows nothing of them.
        batches: Evaluated training frames for the networks of the combination, as of `KeptBatches`.
    """

    heads: dict[str, Head]
    elements: frozenset[int]
    shortest: Tensor
    frames: list[Atoms]
    batches: Sequence[tuple[ForwardPass, Targets]]


@dataclass(frozen=True)
class Calibrated:
    """An uncertainty model, and what was seen while it was calibrated.

    Args:
        model: The model.
        observed: Raw scores and residuals of the calibration frames.
        of_folds: (n_folds,) negative log-likelihood of a force component in each fold of the calibration frames, which
            are of consecutive frames, by the primary estimator, fitted on the others.
    """

    model: UncertaintyModel
    observed: Observed
    of_folds: np.ndarray

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of a force component on left-out calibration frames."""
        return float(self.of_folds.mean())


def trained(makers: Sequence[Method], frames: list[Atoms], work: Work, *, keep: bool) -> Trained:
    """Fits methods on training frames, in one pass over them.

    Args:
        makers: The methods.
        frames: Training frames.
        work: How they are evaluated.
        keep: Whether to keep evaluated frames for a combination.
    """
    stream = work.stream(
        frames,
        "training",
        "fit",
        forces=keep or any(method.forces for method in makers),
        gradients=any(method.gradients for method in makers),
    )
    # All methods share one pass, so that the potential is evaluated only once.
    accumulators = {method.name: method.start() for method in makers}
    for accumulator in accumulators.values():
        accumulator.progress = work.progress
    kept = KeptBatches(list(map(len, frames)))
    shortest = ShortestDistances()
    for forward_pass, targets in tell_zero_forces("training", stream, work.communicator):
        for accumulator in accumulators.values():
            accumulator.add(forward_pass, targets)
        shortest.add(forward_pass)
        if keep:
            kept.add(forward_pass, targets)
    elements = frozenset(int(z) for atoms in frames for z in atoms.numbers)
    return Trained(
        heads={name: a.finish(work.communicator).to(work.backend.device) for name, a in accumulators.items()},
        elements=elements,
        shortest=shortest.finish(sorted(elements), work.communicator),
        frames=frames,
        batches=kept.batches,
    )


def calibrated(origin: Trained, train: dict[str, Any], calibration: list[Atoms], work: Work) -> Calibrated:
    """Makes an uncertainty model of heads.

    Args:
        origin: The heads.
        train: What the model remembers of the frames that they were fitted on, as of `described`.
        calibration: Calibration frames.
        work: How they are evaluated.
    """
    backend, heads = work.backend, origin.heads
    combines = len(heads) > 1
    nothing = know_nothing(
        backend, heads, origin.frames, origin.shortest, batch_atoms=work.batch_atoms, title=work.title("rattle")
    )
    far_field = None
    if nothing is not None:
        # The rattled frames may be others than the training frames, and have fewer elements.
        far_field = replace(nothing.far_field, elements=tuple(sorted(origin.elements))).to(backend.device)
    gradients = any(head.gradients for head in heads.values())
    held_out = work.stream(calibration, "calibration", "calibrate", gradients=gradients)
    observed, batches = observe(heads, far_field, held_out, work.communicator, keep=combines)
    far = {} if nothing is None else nothing.scores
    both = {name: calibrated_method(name, head, observed, far.get(name)) for name, head in heads.items()}
    fitted = {name: method for name, (method, _) in both.items()}
    primary = leading = next(iter(heads))
    variance, of_folds, combination = observed.variance(leading, fitted[leading]), both[leading][1], None
    if combines and (inputs := inputs_of(fitted, origin.elements)) is not None:
        primary, leading = "combined", inputs.anchor
        found = combine(inputs, far_field, heads, origin.batches, batches, work.communicator, work.progress)
        variance, of_folds, combination = found.variance, found.of_folds, found.combination.to(backend.device)
        combination.energy = combine_energies(inputs, observed)
    model = UncertaintyModel(
        identity=backend.identity,
        methods=fitted,
        primary=primary,
        edges=fit_edges(observed.raw[leading].distance, observed.numbers, origin.elements),
        record=observed.record(variance, runs_of(calibration)),
        provenance=provenance_of(train, calibration, observed.energy_shift),
        combination=combination,
        far_field=far_field,
    )
    return Calibrated(model, observed, of_folds)
