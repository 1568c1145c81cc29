"""Frames that a potential knows nothing of, made from training frames: where calibrated uncertainties must end.

Training frames are rattled, every atom by a share of its distance to its nearest neighbour. Real forces grow with the
displacement, so where the median predicted force stops growing, the potential has left what it knows. No labels are
needed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ase import Atoms
from ase.data import covalent_radii
from ase.neighborlist import neighbor_list

from ase_uq.backends.base import Backend
from ase_uq.calibration.base import SMALLEST_SCORE
from ase_uq.communicator import Communicator, gather
from ase_uq.display.progress import progress_bar
from ase_uq.errors import InputError
from ase_uq.forward_pass import ForwardPass
from ase_uq.io.labels import keep_structure
from ase_uq.io.source import Source
from ase_uq.methods.base import Head
from ase_uq.stream.passes import LeftOut, Pass, passes
from ase_uq.uncertainty_model.far_field import FarField

# Gaussian displacement of a component, as a share of the distance to the nearest neighbour.
FRACTIONS = (0.04, 0.06, 0.08, 0.10, 0.12, 0.15)
_SMALLEST_FRACTION = 0.06
# Numbers of frames, smallest numbers of them, and numbers of atoms: a share of the fit that even few frames can pay.
_SEARCH = (6, 3, 192)
_FRAMES = (12, 4, 384)
_FRAMES_OF_MANY = (60, 60, 0)  # with many elements few frames would leave out most of them
_MANY_ELEMENTS = 6
_FEWEST_ATOMS = 16  # a smaller periodic cell is repeated: its atoms would move with their own images
_SMALLEST_FORCE = 1e-3  # eV/Å; training frames that are all in equilibrium have next to no forces
_SEED = 0
_QUANTITIES = ("forces", "energy", "energies", "stress")


class ShortestDistances:
    """Collects the shortest distance of every pair of elements from the neighbour lists of evaluated frames."""

    def __init__(self) -> None:
        self._table = torch.full((119 * 119,), torch.inf, dtype=torch.float64)

    def add(self, forward_pass: ForwardPass) -> None:
        """Takes the distances of a batch."""
        edges, numbers = forward_pass.edges, forward_pass.numbers.long()
        pair = numbers[edges.target] * 119 + numbers[edges.source]
        self._table.scatter_reduce_(0, pair.cpu(), edges.distance.double().cpu(), "amin")

    def finish(self, elements: Sequence[int], communicator: Communicator) -> torch.Tensor:
        """(n_elements, n_elements) shortest distances over all ranks, Å; `nan` for elements that never meet."""
        known = torch.tensor(elements)
        table = self._table.reshape(119, 119)[known[:, None], known[None, :]]
        ranks = gather(table.reshape(1, -1), communicator)
        assert ranks is not None
        table = ranks.amin(0).reshape(len(elements), len(elements))
        return torch.where(table.isinf(), torch.nan, torch.minimum(table, table.T))


@dataclass(frozen=True)
class KnowNothing:
    """The far field of a potential, and the scores that its frames have.

    Args:
        far_field: The know-nothing end of uncertainties.
        scores: By method and quantity, `forces`, `energy`, `energies` or `stress`: (n_scores,) median of the logarithm
            of each score over the frames; of `energies` that of the mean distance of their atoms.
    """

    far_field: FarField
    scores: dict[str, dict[str, np.ndarray]]


@dataclass(frozen=True)
class Parent:
    """A training frame with displacements that rattle each atom by its whole distance to its nearest neighbour, Å."""

    atoms: Atoms
    displacements: np.ndarray

    def rattled(self, fraction: float) -> Atoms:
        """The frame with every atom displaced by a share of its nearest distance, Gaussian a component."""
        atoms = self.atoms.copy()
        atoms.positions += fraction * self.displacements
        return atoms


def know_nothing(
    backend: Backend,
    heads: Mapping[str, Head],
    train: Sequence[Atoms],
    shortest: torch.Tensor,
    *,
    batch_atoms: int | None,
    title: str = "",
) -> KnowNothing | None:
    """Rattles training frames until the potential knows nothing of them; None if no frame has neighbours.

    Args:
        backend: The potential.
        heads: Fitted heads by name; those whose scores grow are read.
        train: Training frames.
        shortest: Shortest distances of the pairs of the training frames' elements, as of `ShortestDistances`.
        batch_atoms: Largest number of atoms evaluated together; None for the default of the device.
        title: Title of the progress bar; empty for none.

    Raises:
        InputError: The potential can evaluate none of the frames.
    """
    elements = tuple(sorted({int(z) for atoms in train for z in atoms.numbers}))
    parents = parents_of(train, backend.cutoff)
    if not parents:
        return None

    growing = {name: head for name, head in heads.items() if head.grows}
    gradients = any(head.gradients for head in growing.values())

    def scores(forward_pass: ForwardPass) -> dict[str, dict[str, torch.Tensor]]:
        with torch.no_grad():
            raws = {name: head(forward_pass) for name, head in growing.items()}
        return {
            name: {
                "forces": raw.forces.flatten(0, 1).cpu(),
                "energy": raw.energy.cpu(),
                "energies": raw.mean_distance(forward_pass).cpu(),
                "stress": raw.stress.cpu(),
            }
            for name, raw in raws.items()
        }

    def forces_and_scores(forward_pass: ForwardPass) -> tuple[torch.Tensor, dict[str, dict[str, torch.Tensor]]]:
        return _forces(forward_pass), {} if gradients else scores(forward_pass)

    searched = parents[: _number(parents, _SEARCH)]
    medians: list[float] = []
    scored: dict[float, list[dict[str, dict[str, torch.Tensor]]]] = {}  # by fraction
    for fraction in progress_bar(FRACTIONS, desc=title, unit="step", show=bool(title), leave=False):
        frames = [parent.rattled(fraction) for parent in searched]
        found = _evaluated(backend, frames, forces_and_scores, batch_atoms)
        scored[fraction] = [of_batch for _, of_batch in found]
        medians.append(float(np.median(torch.cat([forces for forces, _ in found]).norm(dim=1))))
        if len(medians) > 1 and medians[-1] < medians[-2]:
            break
    chosen = max(FRACTIONS[int(np.argmax(medians))], _SMALLEST_FRACTION)
    trained = torch.cat(_evaluated(backend, [parent.atoms for parent in parents], _forces, batch_atoms))
    force = float(trained.square().mean().sqrt())
    # Gradients cost more than the forces that were searched with, so where they are needed all frames are left to do.
    batches = [] if gradients else list(scored[chosen])
    if left := parents if gradients else parents[len(searched) :]:
        frames = [parent.rattled(chosen) for parent in left]
        batches += _evaluated(backend, frames, scores, batch_atoms, gradients=gradients, needed=not batches)
    size = float(np.sqrt(np.mean(np.concatenate([parent.displacements for parent in parents]) ** 2)))
    far_field = FarField(
        elements=elements,
        shortest=shortest,
        force=max(force, _SMALLEST_FORCE),
        fractions=FRACTIONS[: len(medians)],
        median_forces=tuple(medians),
        fraction=chosen,
        length=chosen * size,
    )
    return KnowNothing(
        far_field,
        {
            name: {quantity: _median_log([batch[name][quantity] for batch in batches]) for quantity in _QUANTITIES}
            for name in growing
        },
    )


def _median_log(scores: Sequence[torch.Tensor]) -> np.ndarray:
    """(n_scores,) median over all rows of the logarithm of each score."""
    return torch.cat(list(scores)).clamp(min=SMALLEST_SCORE).log().median(0).values.numpy()


def _forces(forward_pass: ForwardPass) -> torch.Tensor:
    assert forward_pass.forces is not None
    return forward_pass.forces.double().cpu()


def _evaluated[T](
    backend: Backend,
    frames: Sequence[Atoms],
    use: Callable[[ForwardPass], T],
    batch_atoms: int | None,
    *,
    gradients: bool = False,
    needed: bool = True,
) -> list[T]:
    """What `use` takes of the frames that the potential can evaluate: a rattled frame may be too far out for it.

    Raises:
        InputError: It can evaluate none, and one is needed.
    """
    events = list(passes(backend, Source(frames), use, batch_atoms=batch_atoms, gradients=gradients))
    batches = [event.value for event in events if isinstance(event, Pass)]
    if needed and not batches:
        reasons = "; ".join(event.reason for event in events[:1] if isinstance(event, LeftOut))
        raise InputError(
            f"none of {len(frames)} rattled training frames can be evaluated, so uncertainties have no far end: "
            f"{reasons}"
        )
    return batches


def parents_of(train: Sequence[Atoms], cutoff: float) -> list[Parent]:
    """Training frames, drawn at random, with the displacements that rattle them."""
    n_elements = len({int(z) for atoms in train for z in atoms.numbers})
    wanted = _FRAMES if n_elements < _MANY_ELEMENTS else _FRAMES_OF_MANY
    rng = np.random.default_rng(_SEED)
    parents: list[Parent] = []
    for index in rng.permutation(len(train)):
        atoms = _without_labels(train[index])
        owner, distance = neighbor_list("id", atoms, cutoff)
        if not len(owner):
            continue
        nearest = 2 * covalent_radii[atoms.numbers]
        # Of several neighbours the last to be written counts, hence the nearest.
        order = np.argsort(-distance, kind="stable")
        nearest[owner[order]] = distance[order]
        parents.append(Parent(atoms, rng.normal(size=(len(atoms), 3)) * nearest[:, None]))
        if _number(parents, wanted) < len(parents) or len(parents) == wanted[0]:
            break
    return parents[: _number(parents, wanted)]


def _number(parents: Sequence[Parent], wanted: tuple[int, int, int]) -> int:
    """How many of the parents are taken: at most and at least so many frames, and in between so many atoms."""
    most, fewest, n_atoms = wanted
    within = int(np.searchsorted(np.cumsum([len(parent.atoms) for parent in parents]), n_atoms, side="right"))
    return min(most, max(fewest, within))


def _without_labels(atoms: Atoms) -> Atoms:
    """A structure alone, a small periodic cell repeated to a few atoms along each direction."""
    atoms = atoms.copy()
    atoms.calc = None
    atoms.set_constraint()
    keep_structure(atoms)
    repeats = np.ones(3, int)
    lengths = np.where(atoms.pbc, atoms.cell.lengths(), np.inf)
    while np.isfinite(lengths).any() and len(atoms) * repeats.prod() < _FEWEST_ATOMS:
        repeats[np.argmin(lengths * repeats)] += 1
    return atoms.repeat(repeats.tolist())
