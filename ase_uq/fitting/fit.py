"""From labelled frames to an uncertainty model: fit on training frames, calibrate on held-out frames."""

import os
from collections.abc import Sequence

from ase.calculators.calculator import BaseCalculator

from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.communicator import Communicator, Serial
from ase_uq.fitting.checks import Sets
from ase_uq.fitting.provenance import described
from ase_uq.fitting.stages import Work, calibrated, trained
from ase_uq.io.frames import Frames
from ase_uq.methods import available_methods, make_method
from ase_uq.methods.base import Method
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
    makers = made(methods)
    backend = load_backend(calculator)
    sets = Sets.read(train, calibration, perturbed)
    sets.check(backend, makers, label_keys, batch_atoms, communicator)
    assert sets.train is not None
    work = Work(backend, label_keys, batch_atoms, communicator, progress and communicator.rank == 0)
    heads = trained(makers, sets.train, work, keep=len(makers) > 1)
    model = calibrated(heads, described(sets.train), sets.calibration, work).model
    return model if sets.perturbed is None else work.with_perturbed(model, sets.perturbed)


def made(methods: Sequence[str | Method]) -> list[Method]:
    """The methods that were given, by name or as they are.

    Raises:
        ValueError: As in `fit`.
    """
    makers = [make_method(method) if isinstance(method, str) else method for method in methods]
    if not makers:
        raise ValueError(f"no method was given. There are: {', '.join(available_methods())}.")
    names = [method.name for method in makers]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"results are told apart by the name of their method, and there are several {twice[0]!r}: give each name "
            "once."
        )
    return makers
