"""How good the uncertainties are on frames with reference labels: every metric, for every method, side by side."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from ase.data import chemical_symbols

from ase_uq import metrics
from ase_uq.backends.base import Backend
from ase_uq.diagnostics.assessment import Assessment
from ase_uq.diagnostics.samples import Sample, largest_of_frames, without_energy_shift
from ase_uq.diagnostics.table import UNITS, MetricValue
from ase_uq.display.progress import progress_bar
from ase_uq.errors import LabelError, UQWarning
from ase_uq.io.frames import Frames, read_frames
from ase_uq.io.labels import LABEL_KEYS, Labels, check_labels, labels_of, refuse_other_heads, refuse_own_forces
from ase_uq.io.results import scored_results
from ase_uq.io.source import Source
from ase_uq.predictor import Predictor, as_predictor
from ase_uq.properties import find_property
from ase_uq.stream.labelled import predicted_forces
from ase_uq.stream.passes import complete, passes
from ase_uq.uncertainty_model.model import UncertaintyModel

# Name of the labels and results of each quantity. `forces_max` is derived from `forces`: it ranks frames by their
# largest force error, because runs are stopped by their largest uncertainty.
_STORED = {"forces": "forces", "energy_per_atom": "energy", "stress": "stress"}
_LEVELS = (0.68, 0.90, 0.95)  # of the coverage
_ROOTS = ("rmse", "sharpness")  # of means
# Metrics of residuals, zeros and standard deviations, component by component, that are no means.
_OF_COMPONENTS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], float]] = {
    "rll": metrics.rll,
    "miscalibration_area": metrics.miscalibration_area,
    "ence": lambda residuals, zeros, std: metrics.ence(residuals, zeros, std, n_bins=min(10, residuals.size)),
}


def evaluate(
    calculator: BaseCalculator | Predictor | Backend | str | os.PathLike[str],
    frames: Frames,
    uncertainty_model: UncertaintyModel | str | os.PathLike[str] | None = None,
    *,
    label_keys: tuple[str, str, str] | None = None,
    batch_atoms: int | None = None,
    tolerance: float = 0.3,
    block: int = 1,
    n_bootstrap: int = 200,
    seed: int = 0,
    progress: bool = True,
) -> Assessment:
    """Scores the uncertainties of a potential on test frames with reference labels.

    The frames should be neither training nor calibration frames. Forces are judged over all atoms and for each element:
    component by component where the size of σ matters, by their norms where errors are ranked. The largest force error
    of each frame is ranked as well. Energies are judged per atom of a frame.

    Args:
        calculator: An `UncertainCalculator` or `Predictor`; or, with an uncertainty model, a bare potential: an ASE
            calculator of MACE, orb or SevenNet, a SPEC, or the path of a `.model` file.
        frames: Path or list of test frames. Frames without forces are judged by their other labels.
        uncertainty_model: Uncertainty model from `fit`, or the path of its file, for a bare potential.
        label_keys: Names of energy, forces and stress in info and arrays; by default `REF_energy`, `REF_forces`,
            `REF_stress`, else the results of a calculator attached to the frames.
        batch_atoms: Largest number of atoms evaluated together; None for the default of the device.
        tolerance: Force errors above it are bad, eV/Å.
        block: Number of consecutive frames that are resampled together for the intervals: about as many as are
            correlated.
        n_bootstrap: Number of resamples for the 95 % intervals; 0 for no intervals.
        seed: Seed of the random resamples.
        progress: Whether to show progress bars.

    Raises:
        LabelError: No frame has labels, a label is not finite, the shape of a label does not fit its frame, or the
            labels are the potential's own forces or those of another head.
        InputError: The potential cannot evaluate a frame, or its results for one are not finite.
        TypeError: A bare potential was given without an uncertainty model, or a calculator that has one with another.
        PotentialMismatch: The uncertainty model was fitted on another potential.
        ValueError: The tolerance is not positive, `block` is below 1, or `n_bootstrap` is negative.
    """
    options = _options(tolerance, block, n_bootstrap, seed, progress)
    predictor = as_predictor(calculator, uncertainty_model)
    backend = predictor.backend
    labelled, labels = _labelled(read_frames(frames, name="test frames"), label_keys, backend.heads, backend.head)
    backend.check(labelled, name="labelled test frame")
    _refuse_own_labels(predictor, labelled, labels, batch_atoms)
    predictions = _predictions(predictor, labelled, batch_atoms, progress)
    return _assessed(predictor.uncertainty_model, labelled, labels, predictions, options)


def evaluate_scored(
    frames: Frames | Sequence[str | os.PathLike[str]],
    uncertainty_model: UncertaintyModel | str | os.PathLike[str],
    *,
    label_keys: tuple[str, str, str] | None = None,
    tolerance: float = 0.3,
    block: int = 1,
    n_bootstrap: int = 200,
    seed: int = 0,
    progress: bool = True,
) -> Assessment:
    """Scores the uncertainties that stand in the frames already, as `score` wrote them; nothing is evaluated.

    Args:
        frames: Path, paths (such as the shards of a trajectory) or list of scored frames with labels.
        uncertainty_model: The uncertainty model that they were scored with, or the path of its file. It says which
            method is the primary one, and which offset the energies of the calibration frames had.
        label_keys: Names of energy, forces and stress in info and arrays; by default `REF_energy`, `REF_forces` and
            `REF_stress`. Results of a calculator are the scored potential's.
        tolerance: As in `evaluate`.
        block: As in `evaluate`.
        n_bootstrap: As in `evaluate`.
        seed: As in `evaluate`.
        progress: As in `evaluate`.

    Raises:
        LabelError: No frame has labels, or one is not finite or does not fit its frame.
        InputError: A frame has not the results of this uncertainty model, or was scored with another one.
        ValueError: The tolerance is not positive, `block` is below 1, or `n_bootstrap` is negative.
    """
    options = _options(tolerance, block, n_bootstrap, seed, progress)
    model = uncertainty_model
    model = model if isinstance(model, UncertaintyModel) else UncertaintyModel.load(model)
    labelled, labels = _labelled(read_frames(frames, name="test frames"), label_keys or LABEL_KEYS[0])
    keys = [key for (_, quantity), key in _keys(model).items() if quantity != "stress"]  # not in vacuum
    results = [scored_results(atoms, keys, model.name, f"labelled test frame {i}") for i, atoms in enumerate(labelled)]
    return _assessed(model, labelled, labels, results, options)


def _options(tolerance: float, block: int, n_bootstrap: int, seed: int, progress: bool) -> dict[str, Any]:
    """Those of `assess`, checked before minutes are spent on what is assessed."""
    if not tolerance > 0:
        raise ValueError(f"the tolerance is {tolerance!r} eV/Å; a positive force error was expected.")
    if block < 1 or n_bootstrap < 0:
        raise ValueError(f"block is {block}, at least 1 was expected; n_bootstrap is {n_bootstrap}, at least 0.")
    return {"tolerance": tolerance, "block": block, "n_bootstrap": n_bootstrap, "seed": seed, "progress": progress}


def _assessed(
    model: UncertaintyModel,
    frames: Sequence[Atoms],
    labels: Sequence[Labels],
    results: Iterable[Mapping[str, Any]],
    options: Mapping[str, Any],
) -> Assessment:
    observed = _samples(_keys(model), frames, labels, results)
    energies = {of: sample for of, sample in observed.items() if of[1] == "energy_per_atom"}
    shift = model.energy_shift
    energies = without_energy_shift(energies, {i: atoms.numbers for i, atoms in enumerate(frames)}, shift)
    assessment = assess(observed | energies, len(frames), **options)
    return replace(assessment, energy_offset="" if shift is None else shift.describe())


def assess(
    observed: Mapping[tuple[str, str], Sample],
    n_frames: int,
    *,
    tolerance: float = 0.3,
    block: int = 1,
    n_bootstrap: int = 200,
    seed: int = 0,
    progress: bool = True,
) -> Assessment:
    """Scores residuals and standard deviations from any source, such as a committee to compare with our methods.

    Args:
        observed: Samples by (method, quantity). Rows without finite residuals and finite, positive standard deviations
            are left out and counted.
        n_frames: Number of frames that the samples come from.
        tolerance: As in `evaluate`.
        block: As in `evaluate`.
        n_bootstrap: As in `evaluate`.
        seed: As in `evaluate`.
        progress: Whether to show a progress bar.
    """
    scores: list[MetricValue] = []
    samples: dict[tuple[str, str], Sample] = {}
    for (method, quantity), sample in progress_bar(observed.items(), desc="score", show=progress, leave=False):
        usable = np.isfinite(sample.residuals).all(1) & (np.isfinite(sample.std) & (sample.std > 0)).all(1)
        samples[method, quantity] = kept = sample.only(usable)
        judge = _Judge(quantity, tolerance, block, n_bootstrap, seed)
        for element, among in _elements(sample):
            n = int((usable & among).sum())
            if n:
                of_element = kept.only(among[usable])
                by_metric = judge.scores(of_element)
                ceiling = _ceiling(of_element, samples[method, "forces"] if quantity == "forces_max" else None)
                by_metric["attainable_spearman"] = (ceiling, np.nan, np.nan)
                scores += [
                    MetricValue(method, quantity, element, metric, *values, n) for metric, values in by_metric.items()
                ]
            n_all = int(among.sum())
            scores.append(MetricValue(method, quantity, element, "left_out", float(n_all - n), np.nan, np.nan, n_all))
    return Assessment(tuple(scores), samples, n_frames, tolerance)


@dataclass(frozen=True)
class _Judge:
    """Computes all metrics of a quantity together, so that each resample is gathered only once."""

    quantity: str
    tolerance: float
    block: int
    n_bootstrap: int
    seed: int

    def scores(self, sample: Sample) -> dict[str, tuple[float, float, float]]:
        """By metric: its value and the two ends of its 95 % interval."""
        means: dict[str, np.ndarray] = {}
        if self.quantity != "forces_max":  # largest errors are not components of a vector: they can only be ranked
            means = metrics.summands(sample.residuals, sample.std, levels=_LEVELS)
        # (n, n_means): what each row adds to metrics that are means is computed once, not in every resample.
        table = np.array([of_component.mean(1) for of_component in means.values()]).T

        def values_of(rows: np.ndarray | slice) -> dict[str, float]:
            values = dict(zip(means, table[rows].mean(0).tolist() if means else [], strict=True))
            values |= {metric: value**0.5 for metric, value in values.items() if metric in _ROOTS}
            return values | self._others(sample.only(rows))

        values = values_of(slice(None))
        intervals = np.full((2, len(values)), np.nan)
        # With a single block there is nothing to resample.
        if self.n_bootstrap and len(np.unique(sample.frame)) > self.block:
            intervals = metrics.bootstrap(
                lambda rows: list(values_of(rows).values()),
                sample.frame,
                block=self.block,
                n_resamples=self.n_bootstrap,
                seed=self.seed,
            )
        return {
            metric: (value, float(low), float(high))
            for (metric, value), low, high in zip(values.items(), *intervals, strict=True)
        }

    def _others(self, sample: Sample) -> dict[str, float]:
        """The metrics that are no means."""
        values = {}
        if self.quantity != "forces_max":
            zeros = np.zeros_like(sample.residuals)
            values = {metric: judge(sample.residuals, zeros, sample.std) for metric, judge in _OF_COMPONENTS.items()}
        errors, uncertainties = sample.errors, sample.uncertainties
        values["spearman"] = metrics.spearman(errors, uncertainties)
        values["ause"] = metrics.ause(errors, uncertainties)
        if UNITS[self.quantity] == "eV/Å":  # the unit of the tolerance
            values["auroc"] = metrics.auroc(errors, uncertainties, tolerance=self.tolerance)
            values["auprc"] = metrics.auprc(errors, uncertainties, tolerance=self.tolerance)
        return values


def _ceiling(sample: Sample, atoms: Sample | None) -> float:
    """The Spearman correlation that these uncertainties could attain.

    Args:
        sample: Sample of the quantity.
        atoms: For `forces_max`, the force sample of the same method: largest errors are simulated from those of all
            atoms.
    """
    if atoms is None:
        return metrics.attainable_spearman(sample.std)
    atoms = atoms.only(np.isin(atoms.frame, sample.frame))
    return metrics.attainable_spearman(atoms.std, frames=atoms.frame)


def _elements(sample: Sample) -> Iterable[tuple[str, np.ndarray]]:
    """The groups that are reported, as a name and a mask of rows: all rows, then those of each element."""
    yield "all", np.full(len(sample.frame), True)
    if sample.numbers is not None:
        for number in np.unique(sample.numbers):
            yield chemical_symbols[number], sample.numbers == number


def _labelled(
    frames: Sequence[Atoms], keys: tuple[str, str, str] | None, heads: Sequence[str] = (), head: str = ""
) -> tuple[list[Atoms], list[Labels]]:
    """The frames that have labels, and their labels; one warning counts the other frames."""
    pairs = [(atoms, labels_of(atoms, keys, f"test frame {index}")) for index, atoms in enumerate(frames)]
    for index, (atoms, labels) in enumerate(pairs):
        check_labels(f"test frame {index}", atoms, labels)
    has_labels = [labels.energy is not None or labels.forces is not None for _, labels in pairs]
    numbered = {index: frames[index] for index in np.flatnonzero(has_labels).tolist()}
    refuse_other_heads("test", numbered, heads, head)
    kept = [pairs[index] for index in numbered]
    if not kept:
        names = ", ".join(keys) if keys else ", ".join(dict.fromkeys(key for row in LABEL_KEYS for key in row[:2]))
        raise LabelError(
            f"none of the {len(frames)} test frames has reference energies or forces, so there is nothing to judge "
            f"by. Looked for {names}; the info of the first frame has {sorted(frames[0].info)}, its arrays have "
            f"{sorted(frames[0].arrays)}. Label the frames with the reference that the potential was trained on, or "
            "name the labels (label_keys)."
        )
    unlabelled = len(frames) - len(kept)
    without_forces = sum(labels.forces is None for _, labels in kept)
    if unlabelled or without_forces:
        warnings.warn(
            f"of {len(frames)} test frames {unlabelled} have no labels and were left out, {without_forces} have no "
            "reference forces and are judged by their other labels.",
            UQWarning,
            stacklevel=3,
        )
    return [atoms for atoms, _ in kept], [labels for _, labels in kept]


def _refuse_own_labels(
    predictor: Predictor, frames: Sequence[Atoms], labels: Sequence[Labels], batch_atoms: int | None
) -> None:
    """Refuses frames that were scored, not labelled: files written by `ase-uq score` contain forces as well."""
    with_forces = [
        (atoms, label.forces) for atoms, label in zip(frames, labels, strict=True) if label.forces is not None
    ]
    if not with_forces:
        return
    first = [atoms for atoms, _ in with_forces[:4]]
    reference = np.concatenate([forces for _, forces in with_forces[:4]])
    residuals = reference - predicted_forces(predictor.backend, first, batch_atoms, "labelled test frame")
    error, size = (float(np.sqrt(np.mean(values**2))) for values in (residuals, reference))
    refuse_own_forces("the labels", error, size, purpose="to judge by")


def _predictions(
    predictor: Predictor, frames: Sequence[Atoms], batch_atoms: int | None, progress: bool
) -> Iterator[Mapping[str, Any]]:
    events = passes(
        predictor.backend,
        Source(frames),
        predictor.predictions,
        batch_atoms=batch_atoms,
        gradients=predictor.gradients,
        title="evaluate" if progress else "",
    )
    for batch in complete(events, "labelled test frame"):
        yield from (prediction.results for prediction in batch.value)


def _samples(
    keys: Mapping[tuple[str, str], str],
    frames: Sequence[Atoms],
    labels: Sequence[Labels],
    results: Iterable[Mapping[str, Any]],
) -> dict[tuple[str, str], Sample]:
    """Residuals and standard deviations of all frames, by (method, quantity)."""
    residuals: dict[str, list[np.ndarray]] = {quantity: [] for quantity in _STORED}
    owners: dict[str, list[int]] = {quantity: [] for quantity in _STORED}
    std: dict[tuple[str, str], list[np.ndarray]] = {of: [] for of in keys}
    for number, of_frame in enumerate(results):
        for quantity, key in _STORED.items():
            label = getattr(labels[number], key)
            wanted = {of: result for of, result in keys.items() if of[1] == quantity}
            if label is None or not of_frame.keys() >= {key, *wanted.values()}:
                continue
            n_atoms = len(frames[number])
            residuals[quantity].append(_rows(quantity, label - of_frame[key], n_atoms))
            owners[quantity].append(number)
            for of, result in wanted.items():
                std[of].append(_rows(quantity, of_frame[result], n_atoms))
    samples = {}
    for of in keys:
        quantity = of[1]
        if not owners[quantity]:
            continue
        frame = np.repeat(owners[quantity], [len(rows) for rows in residuals[quantity]])
        numbers = np.concatenate([frames[i].numbers for i in owners[quantity]]) if quantity == "forces" else None
        samples[of] = Sample(np.concatenate(residuals[quantity]), np.concatenate(std[of]), frame, numbers)
    if not samples:
        raise LabelError(
            "the test frames have no reference forces, and the uncertainty model has no energy uncertainty: there is "
            "nothing to judge. Give frames with forces, or fit again with calibration frames that have energies."
        )
    largest = {(m, "forces_max"): largest_of_frames(s) for (m, quantity), s in samples.items() if quantity == "forces"}
    return dict(sorted((samples | largest).items(), key=lambda item: list(UNITS).index(item[0][1])))


def _keys(model: UncertaintyModel) -> dict[tuple[str, str], str]:
    """Results key of every (method, quantity), in the order of the model's results: the primary method first."""
    keys: dict[tuple[str, str], str] = {}
    for result in model.results:
        entry = find_property(result)
        for quantity, key in _STORED.items():
            plain = f"{key}_uncertainty"
            if entry is not None and entry.name == plain:
                method = result.removeprefix(plain).removeprefix("_") or model.primary
                keys.setdefault((method, quantity), result)
    return keys


def _rows(quantity: str, values: np.ndarray | float, n_atoms: int) -> np.ndarray:
    """(n_rows, n_components) values of one frame; energies are divided by the number of atoms."""
    if quantity == "energy_per_atom":
        return np.array([[values / n_atoms]])
    return np.atleast_2d(np.asarray(values, float))
