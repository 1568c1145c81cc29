"""Error bars of whatever is computed from energies, forces or stresses of several structures: once for each member.

    value = f(E_1, E_2, ...),    σ² = mean over m of (f(E_1^(m), E_2^(m), ...) - value)²

Nothing is linearised, and f may be anybody's: phonopy, a fit, an integral.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from ase import Atoms
from ase.eos import EquationOfState as FitOfASE
from ase.eos import eos_names
from numpy.typing import ArrayLike

from ase_uq.errors import InputError
from ase_uq.propagation.members import arrays_of, energies_of

_FEWEST_VOLUMES = 5


@dataclass(frozen=True)
class Derived:
    """Numbers computed from several structures, and their error bars.

    Args:
        value: (...) from the potential's own energies, forces or stresses.
        std: (...) standard deviation over the members, about the value.
        members: (n_members, ...) from each member.
    """

    value: np.ndarray
    std: np.ndarray
    members: np.ndarray


def propagate(
    frames: Sequence[Atoms], function: Callable[[Any], ArrayLike], of: Literal["energy", "forces", "stress"] = "energy"
) -> Derived:
    """A function of the energies, forces or stresses of several structures, with error bars.

        propagate(displaced, frequencies, of="forces")
        propagate(strained, lambda stresses: np.polyfit(strains, stresses[:, 0], 1)[0], of="stress")

    Args:
        frames: Calculated structures.
        function: Of (n_frames,) energies in eV, of a list of n_frames arrays (n_atoms, 3) of forces in eV/Å, or of
            (n_frames, 6) stresses in eV/Å³, Voigt; gives a number or an array. It is called once for the potential and
            once for each member.
        of: `"energy"`, with `energy_ensemble`, `"forces"`, with `forces_ensemble`, or `"stress"`, with
            `stress_ensemble`.

    Raises:
        ValueError: There are no frames, `of` is none of the three, or the function gives something that is not finite,
            or of another shape for another member.
        InputError: A frame has no members, or not as many as the first.
    """
    if of not in ("energy", "forces", "stress"):
        raise ValueError(f"of is 'energy', 'forces' or 'stress', not {of!r}.")
    if not len(frames):
        raise ValueError("there are no frames to compute anything from.")
    if of == "energy":
        energies, members = energies_of(frames)
        inputs: list[Any] = [energies, *members.T]
    else:
        own, of_members = arrays_of(frames, of)
        inputs = [own, *([part[..., m].copy() for part in of_members] for m in range(of_members[0].shape[-1]))]
        if of == "stress":
            inputs = [np.array(each) for each in inputs]
    found: list[np.ndarray] = []
    for number, each in enumerate(inputs):
        found.append(_numbers(function(each), "the potential" if number == 0 else f"member {number - 1}"))
        if found[-1].shape != found[0].shape:
            raise ValueError(
                f"the function gave shape {found[-1].shape} for member {number - 1}, and {found[0].shape} for the "
                "potential: numbers of one shape were expected."
            )
    value, members = found[0], np.stack(found[1:])
    return Derived(value, np.sqrt(np.square(members - value).mean(0)), members)


def _numbers(given: ArrayLike, who: str) -> np.ndarray:
    try:
        values = np.asarray(given)
    except ValueError:  # rows of different lengths
        values = np.array(None)
    if values.dtype.kind not in "fiub" or not np.isfinite(values).all():
        raise ValueError(
            f"the function gave {given!r} for {who}: finite real numbers were expected, one or an array of them."
        )
    return values.astype(float)


@dataclass(frozen=True)
class EquationOfState:
    """An equilibrium volume and a bulk modulus, with error bars.

    Args:
        volume: Å³.
        volume_std: Å³.
        bulk_modulus: eV/Å³; divide by `ase.units.GPa` for GPa.
        bulk_modulus_std: eV/Å³.
        energy: eV.
        energy_std: eV.
        members: (n_members, 3) volume, energy and bulk modulus of each member.
    """

    volume: float
    volume_std: float
    bulk_modulus: float
    bulk_modulus_std: float
    energy: float
    energy_std: float
    members: np.ndarray


def equation_of_state(frames: Sequence[Atoms], eos: str = "birchmurnaghan") -> EquationOfState:
    """The equation of state of a crystal at several volumes, with error bars; `ase.eos` fits it, to each member too.

    Args:
        frames: Calculated crystals of one composition at five volumes or more, about the smallest energy.
        eos: A form that `ase.eos.EquationOfState` knows.

    Raises:
        ValueError: There are fewer than five different volumes, or `eos` is no form of `ase.eos`.
        InputError: A frame has no `energy_ensemble`, no cell or another composition, or the energies of the potential
            or of a member have no minimum among the volumes.
    """
    volumes = np.array([atoms.cell.volume for atoms in frames])
    if not (volumes > 0).all():
        raise InputError(f"frame {int(np.argmin(volumes))} has no cell, so no volume.")
    if len(np.unique(volumes)) < _FEWEST_VOLUMES:
        raise ValueError(
            f"an equation of state is fitted to {_FEWEST_VOLUMES} different volumes or more, and "
            f"{len(np.unique(volumes))} were given."
        )

    formulas = {atoms.get_chemical_formula() for atoms in frames}
    if len(formulas) > 1:
        raise InputError(f"an equation of state is of one crystal, and these are {', '.join(sorted(formulas))}.")
    if not isinstance(eos, str) or eos not in (*eos_names, "birch", "sj"):
        raise ValueError(f"ase.eos has no form {eos!r}. It has sj, {', '.join(sorted(eos_names))}.")

    def fit(energies: np.ndarray) -> np.ndarray:
        try:
            with np.errstate(all="ignore"):  # on its way to a volume that is none
                found = np.array(FitOfASE(volumes, energies, eos).fit(warn=False))
        except (ValueError, RuntimeError) as error:
            raise InputError(_no_minimum(error)) from error
        if not np.isfinite(found).all() or not found[2] > 0:
            raise InputError(_no_minimum(f"a fit gave {found.tolist()}"))
        return found

    found = propagate(frames, fit)
    outside = (found.members[:, 0] < volumes.min()) | (found.members[:, 0] > volumes.max())
    if outside.any() or not volumes.min() <= found.value[0] <= volumes.max():
        raise InputError(_no_minimum(f"{outside.sum()} members have theirs elsewhere"))
    (volume, energy, modulus), (volume_std, energy_std, modulus_std) = found.value, found.std
    return EquationOfState(
        float(volume),
        float(volume_std),
        float(modulus),
        float(modulus_std),
        float(energy),
        float(energy_std),
        found.members,
    )


def _no_minimum(reason: object) -> str:
    return (
        f"the energies have no minimum among these volumes, or the members differ too much to have one ({reason}): "
        "take volumes farther apart, about the minimum, or a potential that knows the crystal."
    )
