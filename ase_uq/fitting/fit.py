"""From labelled frames to an uncertainty model: fit on training frames, calibrate on held-out frames."""

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
    refuse_overlap,
    tell_zero_forces,
    without_isolated_atoms,
)
from ase_uq.fitting.combination import KeptBatches, combine, inputs_of
from ase_uq.fitting.provenance import provenance_of, runs_of
from ase_uq.io.frames import Frames, read_frames
from ase_uq.methods import available_methods, make_method
from ase_uq.methods.base import Method
from ase_uq.stream.labelled import LabelledStream
from ase_uq.uncertainty_model.model import UncertaintyModel


def fit(
    calculator: BaseCalculator | Backend | str,
    train: Frames,
    calibration: Frames,
    *,
    perturbed: Frames | None = None,
    methods: Sequence[str | Method] = ("bll", "pdrum", "kernel"),
    label_keys: tuple[str, str, str] | None = None,
    batch_atoms: int = 1000,
    communicator: Communicator | None = None,
    progress: bool = True,
) -> UncertaintyModel:
    """Fits an uncertainty model to a potential.

    Args:
        calculator: The potential: an ASE calculator of MACE, orb or SevenNet, or a SPEC string.
        train: Path or list of frames the potential was trained on, or of frames like them. Each needs a reference
            energy or forces; direct force heads need forces.
        calibration: Path or list of frames the potential was *not* trained on, with forces. They set the scale of the
            uncertainties. Keep the frames of a trajectory in their order; if there are several runs,
            `info["run"]` names the run of each frame.
        perturbed: Deliberately bad frames with forces, such as those of `perturb_frames`. Nothing is fitted to them or
            calibrated on them, but thresholds such as `MissRate` need frames with large errors.
        methods: Names or `Method` instances. Several methods are combined into the primary estimator; a single method
            is itself the primary estimator.
        label_keys: Names of energy, forces and stress in info and arrays; by default `REF_energy`,
            `REF_forces`, `REF_stress`, else the results of a calculator attached to the frames.
        batch_atoms: Largest number of atoms evaluated together.
        communicator: Ranks to share the fit with; a single process by default.
        progress: Whether to show progress bars.

    Returns:
        The uncertainty model; `.save(path)` writes it, `.summary()` describes it.

    Raises:
        LabelError: A file is missing, empty or unreadable, there are too few frames, labels are missing or not finite,
            they are the potential's own forces, or calibration frames are training frames.
        ValueError: No method was given, a method is not known, or two have the same name.
        InputError: The potential cannot evaluate a frame, or its results for one are not finite.
    """
    communicator = communicator or Serial()
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
    check_labelled("training", train_frames, label_keys, forces=False)
    check_labelled("calibration", calibration_frames, label_keys, forces=True)
    refuse_overlap(train_frames, calibration_frames)
    if perturbed_frames is not None:
        check_labelled("perturbed", perturbed_frames, label_keys, forces=True)
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
    for forward_pass, targets in tell_zero_forces("training", stream):
        for accumulator in accumulators.values():
            accumulator.add(forward_pass, targets)
        if combines:
            kept.add(forward_pass, targets)
    heads = {name: a.finish(communicator).to(backend.device) for name, a in accumulators.items()}
    held_out = LabelledStream(
        backend,
        calibration_frames,
        Serial(),
        forces=True,
        gradients=any(head.gradients for head in heads.values()),
        title="calibrate" if progress else "",
        name="calibration frame",
        **options,
    )
    observed, batches = observe(heads, held_out, keep=combines)
    calibrated = {name: calibrated_method(name, head, observed) for name, head in heads.items()}
    fitted = {name: method for name, (method, _) in calibrated.items()}
    elements = frozenset(int(z) for atoms in train_frames for z in atoms.numbers)
    primary = leading = makers[0].name
    variance, combination = observed.variance(leading, fitted[leading]), None
    if combines and (inputs := inputs_of(calibrated, elements)) is not None:
        primary, leading = "combined", inputs.anchor
        combined = combine(inputs, heads, kept.batches, batches, communicator, progress)
        variance, combination = combined.variance, combined.combination.to(backend.device)
    model = UncertaintyModel(
        identity=backend.identity,
        methods=fitted,
        primary=primary,
        edges=fit_edges(observed.raw[leading].distance, observed.numbers, elements),
        record=observed.record(variance, runs_of(calibration_frames)),
        provenance=provenance_of(train_frames, calibration_frames),
        combination=combination,
    )
    return model if perturbed_frames is None else with_perturbed(model, backend, perturbed_frames, progress, options)
