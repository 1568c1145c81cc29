"""From labelled frames to an uncertainty model: fit on training frames, calibrate on held-out frames."""

import os
from collections.abc import Sequence
from typing import Any

from ase.calculators.calculator import BaseCalculator

from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.calibration import fit_edges
from ase_uq.communicator import Communicator, Serial
from ase_uq.fitting.calibrate import calibrated_method, observe, with_perturbed
from ase_uq.fitting.checks import (
    check_first_frames,
    check_labelled,
    check_ranks_agree,
    refuse_overlap,
    tell_zero_forces,
    without_isolated_atoms,
)
from ase_uq.fitting.combination import KeptBatches, combine, inputs_of
from ase_uq.fitting.energy_combination import combine_energies
from ase_uq.fitting.know_nothing import ShortestDistances, know_nothing
from ase_uq.fitting.provenance import provenance_of, runs_of
from ase_uq.io.frames import Frames, read_frames
from ase_uq.io.labels import labels_of
from ase_uq.methods import available_methods, make_method
from ase_uq.methods.base import Method
from ase_uq.stream.labelled import LabelledStream
from ase_uq.uncertainty_model.model import UncertaintyModel


def fit(
    calculator: BaseCalculator | Backend | str | os.PathLike[str],
    train: Frames | Sequence[str | os.PathLike[str]],
    calibration: Frames | Sequence[str | os.PathLike[str]],
    *,
    perturbed: Frames | None = None,
    methods: Sequence[str | Method] = ("bll", "pdrum", "kernel"),
    label_keys: tuple[str, str, str] | None = None,
    batch_atoms: int | None = None,
    communicator: Communicator | None = None,
    progress: bool = True,
) -> UncertaintyModel:
    """Fits an uncertainty model to a potential.

    Args:
        calculator: The potential: an ASE calculator of MACE, orb or SevenNet, a SPEC, or the path of a `.model` file.
        train: Path (or several, or parts such as `run.xyz@:100`) or list of frames the potential was trained on, or of
            frames like them. Methods that learn from errors (`pdrum`, `pops`) need a reference energy or forces of
            each; direct force heads need forces.
        calibration: Likewise frames the potential was *not* trained on, with forces. They set the scale of the
            uncertainties. Keep the frames of a trajectory in their order; if there are several runs,
            `info["run"]` names the run of each frame.
        perturbed: Deliberately bad frames with forces, such as those of `perturb_frames`. Nothing is fitted to them or
            calibrated on them, but thresholds such as `MissRate` need frames with large errors.
        methods: Names or `Method` instances. Several methods are combined into the primary estimator; a single method
            is itself the primary estimator.
        label_keys: Names of energy, forces and stress in info and arrays; by default `REF_energy`,
            `REF_forces`, `REF_stress`, else the results of a calculator attached to the frames.
        batch_atoms: Largest number of atoms evaluated together; None for the default of the device.
        communicator: Ranks to share the fit with; a single process by default.
        progress: Whether to show progress bars; rank 0 alone shows them.

    Returns:
        The uncertainty model; `.save(path)` writes it, `.summary()` describes it.

    Raises:
        LabelError: A file is missing, empty or unreadable, there are too few frames, labels are missing or not finite,
            they are the potential's own forces, or calibration frames are training frames.
        ValueError: No method was given, a method is not known, or two have the same name.
        InputError: The potential cannot evaluate a frame, or its results for one are not finite.
    """
    communicator = communicator or Serial()
    progress = progress and communicator.rank == 0
    makers = [make_method(method) if isinstance(method, str) else method for method in methods]
    if not makers:
        raise ValueError(f"no method was given. There are: {', '.join(available_methods())}.")
    names = [method.name for method in makers]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"results are told apart by the name of their method, and there are several {twice[0]!r}: give each name "
            "once."
        )
    combines = len(makers) > 1
    backend = load_backend(calculator)
    train_frames = without_isolated_atoms(read_frames(train, name="training frames"))
    calibration_frames = without_isolated_atoms(read_frames(calibration, name="calibration frames"))
    perturbed_frames = (
        None if perturbed is None else without_isolated_atoms(read_frames(perturbed, name="perturbed frames"))
    )
    sets = {"training frames": train_frames, "calibration frames": calibration_frames}
    sets |= {} if perturbed_frames is None else {"perturbed frames": perturbed_frames}
    check_ranks_agree(communicator, backend, sets, label_keys)
    # Without labels in either set, their names are wrong.
    calibrates = bool(calibration_frames) and labels_of(calibration_frames[0], label_keys).forces is not None
    needed_by = [method.name for method in makers if method.labels] if calibrates else None
    check_labelled(backend, "training", train_frames, label_keys, forces=False, needed_by=needed_by)
    check_labelled(backend, "calibration", calibration_frames, label_keys, forces=True)
    refuse_overlap(train_frames, calibration_frames)
    if perturbed_frames is not None:
        check_labelled(backend, "perturbed", perturbed_frames, label_keys, forces=True)
        backend.check(perturbed_frames, name="perturbed structure")
    check_first_frames(backend, train_frames, calibration_frames, label_keys, batch_atoms)
    options: dict[str, Any] = {"batch_atoms": batch_atoms, "keys": label_keys}
    stream = LabelledStream(
        backend,
        train_frames,
        communicator,
        forces=combines or any(method.forces for method in makers),
        gradients=any(method.gradients for method in makers),
        title="fit" if progress else "",
        name="training frame",
        **options,
    )
    # All methods share one pass, so that the potential is evaluated only once.
    accumulators = {method.name: method.start() for method in makers}
    for accumulator in accumulators.values():
        accumulator.progress = progress
    kept = KeptBatches(list(map(len, train_frames)))
    shortest = ShortestDistances()
    for forward_pass, targets in tell_zero_forces("training", stream, communicator):
        for accumulator in accumulators.values():
            accumulator.add(forward_pass, targets)
        shortest.add(forward_pass)
        if combines:
            kept.add(forward_pass, targets)
    heads = {name: a.finish(communicator).to(backend.device) for name, a in accumulators.items()}
    elements = frozenset(int(z) for atoms in train_frames for z in atoms.numbers)
    nothing = know_nothing(
        backend,
        heads,
        train_frames,
        shortest.finish(sorted(elements), communicator),
        batch_atoms=batch_atoms,
        title="rattle" if progress else "",
    )
    far_field = None if nothing is None else nothing.far_field.to(backend.device)
    held_out = LabelledStream(
        backend,
        calibration_frames,
        communicator,
        forces=True,
        gradients=any(head.gradients for head in heads.values()),
        title="calibrate" if progress else "",
        name="calibration frame",
        **options,
    )
    observed, batches = observe(heads, far_field, held_out, communicator, keep=combines)
    far = {} if nothing is None else nothing.scores
    fitted = {name: calibrated_method(name, head, observed, far.get(name)) for name, head in heads.items()}
    primary = leading = makers[0].name
    variance, combination = observed.variance(leading, fitted[leading]), None
    if combines and (inputs := inputs_of(fitted, elements)) is not None:
        primary, leading = "combined", inputs.anchor
        combined = combine(inputs, far_field, heads, kept.batches, batches, communicator, progress)
        variance, combination = combined.variance, combined.combination.to(backend.device)
        combination.energy = combine_energies(inputs, observed)
    model = UncertaintyModel(
        identity=backend.identity,
        methods=fitted,
        primary=primary,
        edges=fit_edges(observed.raw[leading].distance, observed.numbers, elements),
        record=observed.record(variance, runs_of(calibration_frames)),
        provenance=provenance_of(train_frames, calibration_frames, observed.energy_shift),
        combination=combination,
        far_field=far_field,
    )
    return model if perturbed_frames is None else with_perturbed(model, backend, perturbed_frames, progress, options)
