"""Uncertainty models in files: one safetensors file each, with a JSON header.

Schema 2 added the combination of several methods. Schema 3 added the runs of the calibration frames, the perturbed
frames and the reference runs. Schema 4 renamed `stressed` to `perturbed`, and `layer` of the kernel to `features`.
Schema 5 added the far field of forces and energies, schema 6 that of atomic energies and stresses, schema 7 the
combination of energies. Older files can still be read.
"""

import os
import re
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ase_uq.backends.identity import Identity
from ase_uq.calibration import EdgeTable, load_calibrator
from ase_uq.errors import ArtefactError
from ase_uq.io.entries import Entries
from ase_uq.io.tensor_file import read_tensor_file, write_tensor_file
from ase_uq.methods.base import Head, Method
from ase_uq.thresholds.data import ReferenceRuns
from ase_uq.thresholds.reduction import Reduction
from ase_uq.uncertainty_model.combination import Combination
from ase_uq.uncertainty_model.contents import check_contents
from ase_uq.uncertainty_model.far_field import FarField
from ase_uq.uncertainty_model.fitted_method import FittedMethod
from ase_uq.uncertainty_model.gated import GatedCombination
from ase_uq.uncertainty_model.record import CalibrationRecord

if TYPE_CHECKING:
    from ase_uq.uncertainty_model.model import UncertaintyModel


_KIND = "uncertainty model"
_SCHEMA = 7


def write_model(path: str | os.PathLike[str], model: "UncertaintyModel") -> None:
    """Writes an `UncertaintyModel`, whole or not at all.

    Raises:
        ArtefactError: The file cannot be written.
    """
    tensors = {
        "identity/probe": model.identity.probe,
        "edges": model.edges.edges,
        **_record_tensors("record", model.record),
    }
    methods = {}
    for name, fitted in model.methods.items():
        tensors |= {f"head/{name}/{key}": value for key, value in fitted.head.state_dict().items()}
        methods[name] = {
            "settings": fitted.head.settings,
            "calibrators": {quantity: c.settings for quantity, c in fitted.calibrators.items()},
            "likelihoods": fitted.likelihoods,
        }
    if model.combination is not None:
        tensors |= {f"combination/{key}": value for key, value in model.combination.state_dict().items()}
    if model.perturbed is not None:
        tensors |= _record_tensors("perturbed", model.perturbed)
    if model.reference is not None:
        runs = model.reference.readings
        tensors["reference/readings"] = torch.from_numpy(np.concatenate(runs).astype(np.float32))
        tensors["reference/lengths"] = torch.tensor([len(run) for run in runs])
    if model.far_field is not None:
        tensors["far_field/shortest"] = model.far_field.shortest
    header = {
        "identity": {"settings": model.identity.settings, "weights": model.identity.weights},
        "methods": methods,
        "primary": model.primary,
        "combination": None if model.combination is None else model.combination.settings,
        "edges": {"counts": model.edges.counts, "inherited": list(model.edges.inherited)},
        "provenance": model.provenance,
        "reference": None if model.reference is None else _settings_of(model.reference),
        "far_field": None if model.far_field is None else model.far_field.settings,
    }
    write_tensor_file(path, _KIND, _SCHEMA, header, tensors)


def read_model(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of the `UncertaintyModel` in a file; nothing in it is executed.

    Raises:
        ArtefactError: There is no such file, or it is not an uncertainty model, or it is newer than this package,
            truncated or altered, or something in it is not what the rest of it implies.
    """
    header, tensors = read_tensor_file(path, _KIND, _SCHEMA)
    try:
        header, tensors = _upgraded(header, tensors)
        return _fields(header, tensors, check_contents(header, tensors))
    except ValueError as error:
        raise ArtefactError(
            f"{path} is not an uncertainty model that can be used: {str(error).rstrip('.')}. Another tool has changed "
            "it, or it comes from another installation: take it from a backup, or fit again."
        ) from error


def _fields(header: dict[str, Any], tensors: dict[str, Tensor], classes: dict[str, type[Method]]) -> dict[str, Any]:
    """The fields of the model with these checked contents.

    Raises:
        ValueError: A method of a plugin cannot be made again, or a reduction is not known.
    """
    methods = {}
    for name, stored in header["methods"].items():
        methods[name] = FittedMethod(
            head=_head(classes[name], stored["settings"], _under(f"head/{name}/", tensors)),
            calibrators={quantity: load_calibrator(c) for quantity, c in stored["calibrators"].items()},
            likelihoods=stored["likelihoods"],
        )
    combination = None
    if header.get("combination") is not None:
        load = Combination.load if "kind" in header["combination"] else GatedCombination
        combination = load(header["combination"], _under("combination/", tensors), methods)
    identity = header["identity"]
    reference, far_field = header.get("reference"), header.get("far_field")
    return dict(
        identity=Identity(identity["settings"], identity["weights"], tensors["identity/probe"]),
        methods=methods,
        primary=header["primary"],
        edges=EdgeTable(
            tensors["edges"],
            {int(z): count for z, count in header["edges"]["counts"].items()},
            tuple(header["edges"]["inherited"]),
        ),
        record=_record("record", tensors),
        provenance=header["provenance"],
        combination=combination,
        perturbed=_record("perturbed", tensors) if _under("perturbed/", tensors) else None,
        reference=None if reference is None else _reference(reference, tensors),
        far_field=None if far_field is None else FarField.load(far_field, tensors["far_field/shortest"]),
    )


def _head(method: type[Method], settings: dict[str, Any], tensors: dict[str, Tensor]) -> Head:
    try:
        return method.load(settings, tensors)
    except Exception as error:  # of a plugin, whose settings only it can judge
        raise ValueError(f"the method {method.name} cannot be made from its settings and tensors: {error}") from error


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _record_tensors(name: str, record: CalibrationRecord) -> dict[str, Tensor]:
    return {f"{name}/{field.name}": torch.from_numpy(getattr(record, field.name)) for field in fields(record)}


def _record(name: str, tensors: dict[str, Tensor]) -> CalibrationRecord:
    stored = {key: tensor.numpy() for key, tensor in _under(f"{name}/", tensors).items()}
    # Before schema 3 files did not say which run a frame came from.
    stored.setdefault("run", np.zeros(len(stored["n_atoms_of_frame"]), np.int32))
    return CalibrationRecord(**stored)


def _settings_of(runs: ReferenceRuns) -> dict[str, Any]:
    return {"interval": runs.interval, "reduction": asdict(runs.reduction), "conditions": runs.conditions}


def _reference(settings: dict[str, Any], tensors: dict[str, Tensor]) -> ReferenceRuns:
    readings = tensors["reference/readings"].numpy()
    lengths = tensors["reference/lengths"].numpy()
    stored = settings["reduction"]
    scope = (None if stored[key] is None else tuple(stored[key]) for key in ("elements", "indices"))
    return ReferenceRuns(
        tuple(np.split(readings, np.cumsum(lengths)[:-1])),
        settings["interval"],
        Reduction(stored["kind"], *scope),
        settings["conditions"],
    )


def _upgraded(header: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The contents of a file of an older schema, under the names of today."""
    tensors = {re.sub("^stressed/", "perturbed/", name): tensor for name, tensor in tensors.items()}
    methods = Entries(header, "header").under("methods")
    if "kernel" in methods and "layer" in (kernel := methods.under("kernel").under("settings")):
        kernel.value["features"] = kernel.value.pop("layer")
    return header, tensors
