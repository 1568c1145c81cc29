"""The contents of an uncertainty model's file, checked before anything is made from them.

A tool that edits a file and writes its digest again can leave anything there. Every setting has a type and a range, and
every tensor the name, shape, dtype and finite values that the settings imply; the classes that read them say which.
What only people read, such as versions, needs the right type alone.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ase_uq.calibration import Calibrator, FarFieldCalibrator, checked_calibrator
from ase_uq.calibration.energy_shift import EnergyShift
from ase_uq.io.entries import LARGEST, LARGEST_NUMBER, SMALLEST, Entries, StoredTensors, WrongEntry
from ase_uq.methods import method_class
from ase_uq.methods.base import Implied, Method
from ase_uq.uncertainty_model.combination import Combination, KnownParts
from ase_uq.uncertainty_model.far_field import FarField
from ase_uq.uncertainty_model.gated import GatedCombination

_QUANTITIES = ("forces", "energy", "energies", "stress")


def check_contents(header: dict[str, Any], stored: Mapping[str, Tensor]) -> dict[str, type[Method]]:
    """Refuses a header and tensors that are not those of an uncertainty model; returns its methods by name.

    Raises:
        ValueError: A method is not installed, or an entry is missing or wrong; the message names it and its value.
    """
    settings, tensors = Entries(header, "header"), StoredTensors(stored)
    _check_identity(settings.under("identity"), tensors)
    elements = _checked_edges(settings.under("edges"), tensors)
    methods = settings.under("methods")
    classes = {name: method_class(name) for name in methods.value}
    known = _checked_methods(methods, classes, tensors, elements)
    if combined := header.get("combination") is not None:
        _check_combination(settings.under("combination"), tensors.under("combination/"), known)
    settings.text("primary", ("combined",) if combined else tuple(known.calibrators))
    _check_far_field(settings, tensors, known)
    _check_provenance(settings.under("provenance"))
    # Before schema 3 files did not say which run a frame came from; the far field came with schema 5.
    _check_record(tensors.under("record/"), LARGEST, with_run="far_field" in header)
    if any(name.startswith("perturbed/") for name in stored):
        # The potential may know so little of a perturbed frame that a power law leaves float32.
        _check_record(tensors.under("perturbed/"), torch.inf, with_run=True)
    if header.get("reference") is not None:
        _check_reference(settings.under("reference"), tensors.under("reference/"))
    tensors.nothing_else()
    return classes


def _check_identity(identity: Entries, tensors: StoredTensors) -> None:
    settings = identity.under("settings")
    settings.text("package")
    if "elements" in settings:
        settings.wholes("elements", 0, LARGEST_NUMBER)
    identity.text("weights")
    tensors.take("identity/probe", None, None, dtype=torch.float32)


def _checked_edges(edges: Entries, tensors: StoredTensors) -> list[int]:
    """The fitted elements, ascending."""
    counts = edges.under("counts")
    keys = counts.of_elements()
    for key in keys.values():
        counts.whole(key)
    elements = sorted(keys)
    inherited = edges["inherited"]
    if not isinstance(inherited, list) or not all(type(z) is int and z in elements for z in inherited):
        raise edges.wrong("inherited", f"a list of some of {elements}")
    table = tensors.take("edges", LARGEST_NUMBER + 1, low=0, nan=True)
    if torch.nonzero(~table.isnan()).flatten().tolist() != elements or not elements:
        raise edges.wrong("counts", "one number for each element that the tensor edges has an edge of")
    return elements


def _checked_methods(
    methods: Entries, classes: Mapping[str, type[Method]], tensors: StoredTensors, elements: list[int]
) -> KnownParts:
    """What the methods say of the rest of the file."""
    implied: dict[str, Implied] = {}
    calibrators: dict[str, dict[str, Calibrator]] = {}
    for name, method in classes.items():
        stored, of_head = methods.under(name), tensors.under(f"head/{name}/")
        settings = stored.under("settings")
        implied[name] = method.head.check(settings, of_head)
        of_head.nothing_else()
        if implied[name].elements not in (None, elements):
            raise WrongEntry(f"the tensor {of_head.prefix}elements is not {elements}, as in header.edges.counts")
        calibrators[name] = _checked_calibrators(stored, implied[name].scores)
    if not implied:
        raise WrongEntry("header.methods is empty, at least one method was expected")
    widths = {i.width for i in implied.values() if i.width is not None}
    if len(widths) > 1:
        raise WrongEntry(f"header.methods are made for {sorted(widths)} features of an atom, one number was expected")
    scores = {name: i.scores for name, i in implied.items()}
    return KnownParts(calibrators, scores, elements, next(iter(widths), None))


def _checked_calibrators(method: Entries, scores: Mapping[str, int] | None) -> dict[str, Calibrator]:
    settings, likelihoods = method.under("calibrators"), method.under("likelihoods")
    made = {}
    for quantity in settings.keys(_QUANTITIES):
        made[quantity] = calibrator = checked_calibrator(settings.under(quantity))
        # An atom has one score of its energy.
        n_scores = None if scores is None else {**scores, "energies": 1}[quantity]
        if n_scores is not None and not calibrator.combines(n_scores):
            raise settings.wrong(quantity, f"a calibrator of {n_scores} scores")
    if "forces" not in made:
        raise WrongEntry(f"{settings.name} has no 'forces'")
    for quantity in likelihoods.keys(tuple(made)):
        tried = likelihoods.under(quantity).any_numbers()
        if tried and ("constant" not in tried or len(tried) < 2):
            raise likelihoods.wrong(quantity, "numbers of 'constant' and of at least one form")
    return made


def _check_combination(settings: Entries, tensors: StoredTensors, known: KnownParts) -> None:
    if "kind" in settings:  # since schema 5
        settings.text("kind", ("fading",))
        Combination.check(settings, tensors, known)
    else:
        GatedCombination.check(settings, tensors, known)


def _check_far_field(settings: Entries, tensors: StoredTensors, known: KnownParts) -> None:
    if settings.value.get("far_field") is not None:
        of_far_field = tensors.under("far_field/")
        FarField.check(settings.under("far_field"), of_far_field, known.elements)
        of_far_field.nothing_else()
        return
    for name, calibrators in known.calibrators.items():
        for quantity, calibrator in calibrators.items():
            if isinstance(calibrator, FarFieldCalibrator):
                raise WrongEntry(f"header has no far_field, but the calibrator of {quantity} of {name} needs one")


def _check_provenance(provenance: Entries) -> None:
    for part in ("train", "calibration"):
        frames = provenance.under(part)
        frames.whole("frames")
        frames.whole("atoms")
    versions = provenance.under("versions")
    for package in versions.value:
        versions.text(package)
    if "energy_shift" in provenance:
        EnergyShift.check(provenance.under("energy_shift"))
    if "refit" in provenance:
        refit = provenance.under("refit")
        for key in ("from", "heads", "kept"):
            refit.text(key)
        if refit["way"] is not None:
            refit.number("way")
        refit.under("likelihoods").any_numbers()


def _check_record(tensors: StoredTensors, largest_uncertainty: float, *, with_run: bool) -> None:
    n_atoms_of_frame = tensors.take("n_atoms_of_frame", None, dtype=torch.int32, low=1)
    n_atoms = int(n_atoms_of_frame.sum())
    tensors.take("uncertainty", n_atoms, dtype=torch.float32, low=SMALLEST, high=largest_uncertainty)
    tensors.take("error", n_atoms, dtype=torch.float32, low=0)
    tensors.take("numbers", n_atoms, dtype=torch.uint8, high=LARGEST_NUMBER)
    if with_run or "run" in tensors:
        tensors.take("run", len(n_atoms_of_frame), dtype=torch.int32)
    tensors.nothing_else()


def _check_reference(settings: Entries, tensors: StoredTensors) -> None:
    settings.number("interval", 1e-9, 1e15)
    settings.text("conditions")
    reduction = settings.under("reduction")
    if not isinstance(reduction["kind"], str):
        reduction.number("kind", 1e-9, 1 - 1e-9)
    if reduction["elements"] is not None and not all(isinstance(e, str) for e in _list(reduction, "elements")):
        raise reduction.wrong("elements", "a list of chemical symbols")
    if reduction["indices"] is not None and _list(reduction, "indices"):
        reduction.wholes("indices", -(10**9), 10**9)
    readings = tensors.take("readings", None, dtype=torch.float32, low=SMALLEST)
    lengths = tensors.take("lengths", None, dtype=torch.int64, low=1, high=len(readings))
    if int(lengths.sum()) != len(readings):
        raise WrongEntry(f"the tensor {tensors.prefix}lengths adds up to {int(lengths.sum())}, not {len(readings)}")
    tensors.nothing_else()


def _list(settings: Entries, key: str) -> list[Any]:
    if not isinstance(settings[key], list):
        raise settings.wrong(key, "a list")
    return settings[key]
