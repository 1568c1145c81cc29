"""Perturbed frames: deliberately bad variants of a user's frames, to be labelled with the user's reference.

Whether dangerous frames are caught can only be calibrated with such frames, and held-out frames of the kind that a
potential was trained on contain hardly any. The kinds of perturbed frames are:

    rattled      Gaussian displacements, 0.05 to 0.3 Å per component
    strained     symmetric strain in random directions, principal values up to 10 %
    compressed   everything closer together, by 3 to 15 % in length
    hot          end of a short Langevin run with the user's potential, at 25 to 100 % of the highest temperature
    swapped      atoms of different elements with their places exchanged, from one pair up to a tenth of the atoms
    substituted  atoms turned into another element of the frame, up to a tenth of the atoms (only on request, since this
                 changes the composition)
"""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import BaseCalculator
from ase.data import atomic_masses, atomic_numbers, covalent_radii
from ase.neighborlist import neighbor_list

from ase_uq.display.progress import progress_bar
from ase_uq.errors import InputError, UQWarning
from ase_uq.io.frames import Frames, read_frames
from ase_uq.io.labels import keep_structure
from ase_uq.sampling.ensembles import langevin

KINDS = ("rattled", "strained", "compressed", "hot", "swapped")

# All else in info may be a label by an unknown name.
_KEPT_INFO = {"charge", "spin", "total_charge", "total_spin", "external_field", "elec_temp", "head"}

_TRIES, _WEAKER = 15, 0.9  # the last try has 0.23 of the amplitude of the first
_SMALLEST_SHARE_OF_RUN = 0.1
_LONGEST_MOVE = 0.5  # Å per step; a hydrogen atom at 3000 K moves 0.05 Å
_STEP_OF_HYDROGEN, _LONGEST_STEP = 0.5, 2.0  # fs
_FRICTION = 0.02  # 1/fs


@dataclass(frozen=True)
class _Settings:
    calculator: BaseCalculator | None
    steps: int
    elements: tuple[int, ...]
    shortest: float


@dataclass(frozen=True)
class _Kind:
    """How one kind of perturbed frames is made.

    Args:
        make: Makes a variant of a frame with an amplitude; None if that failed.
        possible: Whether a frame can have such variants.
        wanted: What a frame must have for this kind, for messages.
        amplitudes: Smallest and largest amplitude.
    """

    make: Callable[[Atoms, float, np.random.Generator, _Settings], Atoms | None]
    possible: Callable[[Atoms, _Settings], bool]
    wanted: str
    amplitudes: tuple[float, float]


def perturb_frames(
    frames: Frames,
    *,
    kinds: Sequence[str] = KINDS,
    per_kind: int = 20,
    calculator: BaseCalculator | None = None,
    temperature_max: float = 2000.0,
    steps: int = 200,
    elements: Sequence[str] = (),
    shortest: float = 0.6,
    seed: int = 0,
    progress: bool = False,
) -> list[Atoms]:
    """Makes deliberately bad variants of frames, to be labelled and then used for calibrating thresholds.

    The exchangeable unit is the parent: variants of one frame share what makes that frame easy or hard, variants of
    different frames do not. The variants are therefore spread over as many parents as there are. Those of one parent
    stand together and have its name in `info["run"]`: calibration then never takes two parents for one unit, and tests
    whether neighbours within one are alike. With more frames than variants, each variant is a unit by itself.

    Args:
        frames: The user's frames, of the kind that the potential is to be used on; a path or a list. Not changed.
        kinds: Any of `rattled`, `strained`, `compressed`, `hot`, `swapped` and `substituted`.
        per_kind: Number of variants of each kind; amplitudes are spread evenly over the range of the kind.
        calculator: The user's potential, for `hot`.
        temperature_max: Highest temperature of `hot`, K; the runs have temperatures from a quarter of it up to it.
        steps: Number of steps of each run of `hot`, of 0.5 fs with hydrogen and up to 2 fs without. From a run that
            explodes, the last whole structure before that is taken.
        elements: Further elements for `substituted`; by default only those that the frame has.
        shortest: Smallest distance of two atoms, as a share of the sum of their covalent radii: at shorter distances
            the reference would fail, and no uncertainty is needed to recognise such frames. If a pair is closer, the
            variant is drawn again with a smaller amplitude.
        seed: Seed of the random draws; it gives the same frames if the potential gives the same forces.
        progress: Whether to show a progress bar.

    Returns:
        Frames without labels, results, momenta and constraints. `info` has `perturbed` (the kind), `parent` (index
        among `frames`), `run` (name of the exchangeable unit, made from the parent's structure), and the amplitude:
        `displacement` (Å), `strain` (largest principal value), `scale` (of lengths), `temperature_K` and
        `md_steps`, or `n_exchanged` (atoms).

    Raises:
        LabelError: There are no frames.
        ValueError: A kind is unknown, `hot` is asked for without a calculator, or a number is out of range.
        InputError: No variant of any kind could be made.
    """
    parents = read_frames(frames)
    names = _checked(kinds, per_kind, calculator, temperature_max, steps, shortest)
    settings = _Settings(calculator, steps, _numbers(elements, names), shortest)
    table = _kinds(temperature_max)
    eligible = _eligible(parents, {name: table[name] for name in names}, settings)
    slots = [(name, i) for i in range(per_kind) for name in eligible]
    order = {name: _order(per_kind, seed, list(table).index(name)) for name in eligible}
    made: list[tuple[int, Atoms]] = []
    failed = dict.fromkeys(eligible, 0)
    for slot, (name, i) in enumerate(progress_bar(slots, desc="perturb", unit="frame", show=progress)):
        candidates = eligible[name]
        parent = candidates[int((slot + 0.5) / len(slots) * len(candidates))]
        rng = np.random.default_rng([seed, list(table).index(name), i])
        share = float(order[name][i] + rng.random()) / per_kind
        variant = _drawn(table[name], parents[parent], share, rng, settings)
        if variant is None:
            failed[name] += 1
            continue
        variant.info |= {"perturbed": name, "parent": parent, "run": _unit(parents[parent])}
        made.append((parent, variant))
    _report(failed, per_kind, shortest, bool(made))
    return [variant for _, variant in sorted(made, key=lambda pair: pair[0])]


def shortest_distance(atoms: Atoms) -> float:
    """Distance of the two closest atoms, Å, including periodic images; `inf` if no two are within twice their bond."""
    distances = neighbor_list("d", atoms, 2 * covalent_radii[atoms.numbers])
    return float(distances.min()) if len(distances) else np.inf


def _kinds(temperature_max: float) -> dict[str, _Kind]:
    # The order matters: the place of a kind is part of its seed.
    return {
        "rattled": _Kind(_rattled, _has_several, "two atoms", (0.05, 0.3)),
        "strained": _Kind(_strained, _has_distances, "two atoms or a periodic cell", (0.02, 0.1)),
        "compressed": _Kind(_compressed, _has_distances, "two atoms or a periodic cell", (0.03, 0.15)),
        "hot": _Kind(_hot, _has_several, "two atoms", (temperature_max / 4, temperature_max)),
        "swapped": _Kind(_swapped, _has_elements, "two elements", (0.0, 0.1)),
        "substituted": _Kind(_substituted, _can_change, "two elements (or give `elements`)", (0.0, 0.1)),
    }


def _has_several(atoms: Atoms, settings: _Settings) -> bool:
    return len(atoms) > 1


def _has_distances(atoms: Atoms, settings: _Settings) -> bool:
    return len(atoms) > 1 or (len(atoms) == 1 and bool(atoms.pbc.any()))


def _has_elements(atoms: Atoms, settings: _Settings) -> bool:
    return len(set(atoms.numbers.tolist())) > 1


def _can_change(atoms: Atoms, settings: _Settings) -> bool:
    return len({*atoms.numbers.tolist(), *settings.elements}) > 1 and len(atoms) > 0


def _checked(
    kinds: Sequence[str],
    per_kind: int,
    calculator: BaseCalculator | None,
    temperature_max: float,
    steps: int,
    shortest: float,
) -> list[str]:
    """The kinds asked for, each once."""
    names = list(dict.fromkeys([kinds] if isinstance(kinds, str) else kinds))
    known = list(_kinds(temperature_max))
    if not names:
        raise ValueError(f"no kind of perturbed frames was given. There are {', '.join(known)}.")
    for name in names:
        if name not in known:
            raise ValueError(f"there is no kind of perturbed frames {name!r}. There are {', '.join(known)}.")
    if "hot" in names and calculator is None:
        raise ValueError("hot frames come from dynamics with your potential: give a calculator, or leave out 'hot'.")
    for what, value in (("per_kind", per_kind), ("steps", steps)):
        if value < 1:
            raise ValueError(f"{what} must be 1 or more, not {value!r}.")
    if not 0 < temperature_max < np.inf:
        raise ValueError(f"temperature_max must be a positive temperature in K, not {temperature_max!r}.")
    if not 0 < shortest < 1:
        raise ValueError(f"shortest must be a share of the bond length between 0 and 1, not {shortest!r}.")
    return names


def _numbers(elements: Sequence[str], names: Sequence[str]) -> tuple[int, ...]:
    if elements and "substituted" not in names:
        raise ValueError(f"elements are for the kind 'substituted', which is not among {', '.join(names)}.")
    unknown = [symbol for symbol in elements if symbol not in atomic_numbers]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not the symbol of an element.")
    return tuple(atomic_numbers[symbol] for symbol in elements)


def _eligible(parents: Sequence[Atoms], kinds: dict[str, _Kind], settings: _Settings) -> dict[str, list[int]]:
    """Numbers of the frames that each kind can be made from; kinds without any such frame are left out."""
    for number, atoms in enumerate(parents):
        if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.cell.array).all()):
            raise InputError(f"positions or cell of frame {number} are not finite. Leave it out.")
    possible = {
        name: [number for number, atoms in enumerate(parents) if kind.possible(atoms, settings)]
        for name, kind in kinds.items()
    }
    without = {name: kinds[name].wanted for name, numbers in possible.items() if not numbers}
    reasons = "; ".join(f"{name} needs {wanted} in a frame" for name, wanted in without.items())
    if len(without) == len(possible):
        raise InputError(f"none of the {len(parents)} frames can be perturbed: {reasons}.")
    if without:
        warnings.warn(f"kinds left out, since no frame allows them: {reasons}.", UQWarning, stacklevel=3)
    return {name: numbers for name, numbers in possible.items() if numbers}


def _order(per_kind: int, seed: int, place: int) -> np.ndarray:
    """Which part of the range of amplitudes each variant of a kind takes."""
    # The variants' own seeds end below `per_kind`.
    return np.random.default_rng([seed, place, per_kind]).permutation(per_kind)


def _drawn(kind: _Kind, parent: Atoms, share: float, rng: np.random.Generator, settings: _Settings) -> Atoms | None:
    """A variant without atoms too close; None if there is none even with a small amplitude."""
    low, high = kind.amplitudes
    amplitude = low + share * (high - low)
    for _ in range(_TRIES):
        variant = kind.make(_bare(parent), amplitude, rng, settings)
        if variant is not None and not _too_close(variant, settings.shortest):
            return variant
        amplitude *= _WEAKER
    return None


def _report(failed: dict[str, int], per_kind: int, shortest: float, some: bool) -> None:
    short = [f"{count} of {per_kind} {name}" for name, count in failed.items() if count]
    if not short:
        return
    why = (
        f"even with smaller amplitudes, atoms stayed closer than {shortest:g} of their bond length, or runs exploded "
        "at once"
    )
    if not some:
        raise InputError(f"no perturbed frame could be made: {why}. Check the frames themselves.")
    warnings.warn(f"{', '.join(short)} frames were left out: {why}.", UQWarning, stacklevel=3)


def _bare(atoms: Atoms) -> Atoms:
    """A copy with only the structure and the entries that a calculation needs."""
    copy = atoms.copy()
    copy.set_constraint()
    keep_structure(copy)
    copy.info = {key: value for key, value in copy.info.items() if key in _KEPT_INFO}
    return copy


def _unit(parent: Atoms) -> str:
    """Name of the exchangeable unit, made from the parent's structure, so that two calls on one frame give one unit."""
    digest = hashlib.sha256(parent.numbers.astype(np.int64).tobytes())
    for values in (parent.positions, parent.cell.array):
        digest.update((np.round(values, 4) + 0.0).tobytes())  # -0.0 is 0.0
    return f"perturbed-{digest.hexdigest()[:12]}"


def _too_close(atoms: Atoms, shortest: float) -> bool:
    return len(neighbor_list("i", atoms, shortest * covalent_radii[atoms.numbers])) > 0


def _rattled(atoms: Atoms, amplitude: float, rng: np.random.Generator, settings: _Settings) -> Atoms:
    atoms.positions += amplitude * rng.standard_normal((len(atoms), 3))
    atoms.info["displacement"] = amplitude
    return atoms


def _strained(atoms: Atoms, amplitude: float, rng: np.random.Generator, settings: _Settings) -> Atoms:
    values = rng.uniform(-1, 1, (3, 3))
    strain = (values + values.T) / 2
    # Principal values below 1 in size: the cell keeps its handedness.
    strain *= amplitude / np.abs(np.linalg.eigvalsh(strain)).max()
    atoms.info["strain"] = amplitude
    return _deformed(atoms, np.eye(3) + strain)


def _compressed(atoms: Atoms, amplitude: float, rng: np.random.Generator, settings: _Settings) -> Atoms:
    atoms.info["scale"] = 1 - amplitude
    return _deformed(atoms, (1 - amplitude) * np.eye(3))


def _deformed(atoms: Atoms, deformation: np.ndarray) -> Atoms:
    """Applies a linear map to positions and cell; in a box without periodicity, to positions about their mean."""
    periodic = bool(atoms.pbc.any())
    centre = np.zeros(3) if periodic else atoms.positions.mean(0)
    atoms.positions = (atoms.positions - centre) @ deformation.T + centre
    if periodic:
        atoms.set_cell(atoms.cell.array @ deformation.T)
    return atoms


def _hot(atoms: Atoms, amplitude: float, rng: np.random.Generator, settings: _Settings) -> Atoms | None:
    """The end of a run, or the last whole structure before it exploded; None if it exploded at the start."""
    moving = atoms.copy()
    moving.calc = settings.calculator
    masses = moving.get_masses()
    moving.set_momenta(np.sqrt(masses * units.kB * amplitude)[:, None] * rng.standard_normal((len(moving), 3)))
    # The fastest vibration is that of the lightest atom; its period grows with the square root of the mass.
    timestep = min(_STEP_OF_HYDROGEN * np.sqrt(masses.min() / atomic_masses[1]), _LONGEST_STEP)
    dynamics: Any = langevin(moving, timestep=timestep, temperature=amplitude, friction=_FRICTION, rng=rng)
    before, last = moving.get_positions(), 0
    for _ in dynamics.irun(settings.steps):
        moves = np.linalg.norm(moving.positions - before, axis=1)
        whole = (moves < _LONGEST_MOVE).all() and np.isfinite(moving.get_forces()).all()
        if not whole or _too_close(moving, settings.shortest):
            break
        before, last = moving.get_positions(), dynamics.nsteps
    if last < _SMALLEST_SHARE_OF_RUN * settings.steps:
        return None
    atoms.positions = before
    atoms.info |= {"temperature_K": amplitude, "md_steps": last}
    return atoms


def _swapped(atoms: Atoms, amplitude: float, rng: np.random.Generator, settings: _Settings) -> Atoms:
    """Exchanges positions, so that the other properties of an atom move with it."""
    free, moved = list(range(len(atoms))), 0
    for _ in range(max(1, round(amplitude * len(atoms) / 2))):
        first = _picked(free, rng)
        others = [j for j in free if atoms.numbers[j] != atoms.numbers[first]]
        if not others:
            continue  # only one element is left among the atoms that were not moved
        second = _picked(others, rng)
        atoms.positions[[first, second]] = atoms.positions[[second, first]]
        free = [j for j in free if j not in (first, second)]
        moved += 2
    atoms.info["n_exchanged"] = moved
    return atoms


def _substituted(atoms: Atoms, amplitude: float, rng: np.random.Generator, settings: _Settings) -> Atoms:
    known = sorted({*atoms.numbers.tolist(), *settings.elements})
    chosen = rng.permutation(len(atoms))[: max(1, round(amplitude * len(atoms)))]
    for index in chosen:
        atoms.numbers[index] = _picked([z for z in known if z != atoms.numbers[index]], rng)
    atoms.arrays.pop("masses", None)  # they belong to the former elements
    atoms.info["n_exchanged"] = len(chosen)
    return atoms


def _picked(values: Iterable[int], rng: np.random.Generator) -> int:
    return int(rng.choice(list(values)))
