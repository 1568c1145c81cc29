"""The structures that a run moves, and the results that their calculators have without another calculation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.mep.dimer import MinModeAtoms
from ase.optimize.optimize import BaseDynamics


@dataclass(frozen=True, eq=False)
class Structure:
    """One structure that a run moves.

    Args:
        atoms: The running structure.
        image: Number of the image on a path, from 1 on; None for the only structure of a run.
        alone: Whether its calculator sees no other structure between two steps.
    """

    atoms: Atoms
    image: int | None = None
    alone: bool = True


def structures_of(dynamics: BaseDynamics) -> tuple[Structure, ...]:
    """The structures that a run moves: one, also under filters and in a dimer, or the images between two ends.

    Raises:
        TypeError: `dynamics` is not a run.
        ValueError: It moves neither a structure nor a path.
    """
    if not isinstance(dynamics, BaseDynamics):
        raise TypeError(
            f"a monitor watches a run, such as Langevin(atoms, ...) or BFGS(atoms), not {type(dynamics).__name__}."
        )
    moved: Any = dynamics.atoms
    alone = True
    while not isinstance(moved, Atoms):
        if isinstance(moved, MinModeAtoms):
            alone = False  # the ends of the dimer come after its centre
        elif len(images := getattr(moved, "images", ())) > 2:
            return tuple(Structure(image, number, alone=False) for number, image in enumerate(images[1:-1], 1))
        if not hasattr(moved, "atoms"):
            raise ValueError(
                f"{type(dynamics).__name__} moves a {type(moved).__name__}, which is neither a structure nor a path "
                "of at least three images. Score its frames afterwards."
            )
        moved = moved.atoms
    return (Structure(moved, alone=alone),)


def results_of(structure: Structure) -> Mapping[str, Any] | None:
    """Results of a structure that cost no model call; None if its calculator has forgotten them.

    They have no uncertainty if the calculator skipped it.
    """
    atoms, calculator = structure.atoms, structure.atoms.calc
    assert calculator is not None
    if not np.isfinite(atoms.positions).all():
        # NaN differs from itself, so no cache would hold and the model would be called for nothing.
        return {}
    if not calculator.check_state(atoms):
        return calculator.results
    # A single structure was moved since its forces were computed, as by `atoms.wrap`: computing them here costs
    # nothing, since the run needs them next and gets them from the cache. Other structures must be remembered.
    if structure.alone or not calculator.calculation_required(atoms, ["forces"]):
        calculator.get_property("forces", atoms)
        return calculator.results
    return None


def too_close(atoms: Atoms, contact: np.ndarray | None) -> str:
    """The pair that is closest compared with the training frames, in words; empty if none is closer than there.

    Args:
        atoms: The structure.
        contact: (n_atoms,) distance of each atom's closest neighbour, as a share of the shortest distance of the two
            elements in the training frames; None if unknown.
    """
    if contact is None or not (contact < 1).any():
        return ""
    atom = int(np.nanargmin(contact))
    # The share is the smallest of all, so it is that of both atoms of the pair.
    partners = np.nonzero(np.isclose(contact, contact[atom], rtol=1e-4))[0]
    partners = partners[partners != atom]
    if not len(partners):
        return (
            f"{atoms.symbols[atom]} is at {contact[atom]:.2f} of the shortest distance of training from its own image"
        )
    distances = atoms.get_distances(atom, partners, mic=bool(atoms.pbc.any()))
    partner, distance = partners[np.argmin(distances)], float(distances.min())
    symbols = atoms.get_chemical_symbols()
    pair = "-".join(sorted((symbols[atom], symbols[partner])))
    return f"{pair} {distance:.2f} A, training never below {distance / contact[atom]:.2f}"
