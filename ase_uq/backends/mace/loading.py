"""Builds MACE calculators from a SPEC, and stores models without pickle."""

import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.calculators.calculator import Calculator
from mace import modules as mace_modules
from mace.calculators import MACECalculator, foundations_models
from mace.tools import torch_tools
from mace.tools.scripts_utils import extract_config_mace_model

from ase_uq.backends._process import preserved_process
from ase_uq.errors import ArtefactError, did_you_mean
from ase_uq.io.tensor_file import read_tensor_file, write_tensor_file

_KIND, _SCHEMA = "MACE potential", 1


def load(prefix: str, target: str, device: str, dtype: str, *, head: str = "") -> Calculator:
    """The calculator that a SPEC names: `mace:PATH`, `mace-mp:NAME`, `mace-off:NAME`, `mace-omol:NAME`.

    PATH is a `.model` file that MACE training writes, a pattern such as `committee_*.model` for several of them, or a
    `.safetensors` file from `save_potential`. A `.model` file is a pickle: loading it runs code, so load only files
    that you trust. NAME is a model name that MACE's loader knows, an `https:` address, or a `.model` file.
    `head` is one of a model that has several; without it MACE takes one named `default`.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: MACE has no pretrained model of this name, or the model has no such head, or several and none is
            named.
    """
    with preserved_process():
        # MACE calls torch.load without weights_only, since its files are pickled modules. The switch may be off again.
        os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
        if prefix == "mace":
            dtype = dtype or "float64"
            # Sorted, because the first member of a committee gives the features.
            paths = [target] if Path(target).is_file() else sorted(glob(target))
            if not paths:
                raise FileNotFoundError(f"there is no MACE model file {target}.")
            source: dict[str, Any] = {"model_paths": paths}
            if all(path.endswith(".safetensors") for path in paths):
                source = {"models": [load_potential(path).to(getattr(torch, dtype)) for path in paths]}
            calculator = _with_head(MACECalculator, head, **source, device=device, default_dtype=dtype)
        else:
            _check_pretrained(prefix, target)
            loader = getattr(foundations_models, prefix.replace("-", "_"))
            options = {"default_dtype": dtype} if dtype else {}
            # MACE prints its licences, which belong on stderr, not among our results.
            with redirect_stdout(sys.stderr):
                calculator = _with_head(loader, head, model=target or None, device=device, **options)
        # MACE appends to the list of ASE's base class, which is restored on leaving, so the calculator gets a copy.
        calculator.implemented_properties = list(dict.fromkeys(calculator.implemented_properties))
        return calculator


def _with_head(make: Callable[..., Any], head: str, **options: Any) -> Any:
    """The calculator with the head that a SPEC names; MACE takes another one, in silence, where there is none such."""
    if head and make is not foundations_models.mace_omol:  # which names its only head itself
        options["head"] = head
    try:
        calculator = make(**options)
    except ValueError as error:
        if "Head keyword" not in str(error):
            raise
        raise ValueError(
            f"the model has several heads, and the SPEC names none: add ?head=NAME to its end. MACE: {error}"
        ) from error
    if head and head not in calculator.available_heads:
        raise ValueError(
            f"the model has no head {head!r}.{did_you_mean(head, calculator.available_heads)} "
            f"It has {', '.join(calculator.available_heads)}."
        )
    return calculator


def _check_pretrained(prefix: str, target: str) -> None:
    names = {
        "mace-mp": [name for name in foundations_models.mace_mp_names if name],
        "mace-off": list(foundations_models.mace_off_urls),
        "mace-omol": ["extra_large"],
    }[prefix]
    if target and target not in names and not target.startswith("https:") and not Path(target).exists():
        raise ValueError(
            f"{prefix} has no model {target!r}, and there is no file of that name.{did_you_mean(target, names)} "
            f"It has {', '.join(names)}."
        )


def save_potential(model: torch.nn.Module, path: str | Path) -> None:
    """Stores a ScaleShiftMACE as safetensors, with its architecture in the JSON header (no pickle).

    Weights are stored in float32, which changes forces by about 1e-6 eV/Å.
    """
    config = extract_config_mace_model(model)
    if "error" in config:
        raise TypeError(f"only ScaleShiftMACE models can be stored: {config['error']}")
    header = {key: _to_json(value) for key, value in config.items() if key != "cueq_config"}
    # Buffers (coupling coefficients, constants) follow from the architecture and would triple the file size.
    tensors = {name: weight.detach().clone().float() for name, weight in model.named_parameters()}
    write_tensor_file(path, _KIND, _SCHEMA, header, tensors)


def load_potential(path: str | Path) -> torch.nn.Module:
    """The model stored by `save_potential`, in float32."""
    from e3nn import o3

    header, tensors = read_tensor_file(path, _KIND, _SCHEMA)
    arguments = dict(header)
    for key in ("hidden_irreps", "MLP_irreps", "edge_irreps"):
        arguments[key] = None if arguments[key] is None else o3.Irreps(arguments[key])
    for key in ("interaction_cls", "interaction_cls_first"):
        arguments[key] = mace_modules.interaction_classes[arguments[key]]
    arguments["readout_cls"] = mace_modules.readout_classes[arguments["readout_cls"]]
    arguments["gate"] = getattr(torch.nn.functional, arguments["gate"])
    for key in ("atomic_energies", "atomic_inter_scale", "atomic_inter_shift"):
        arguments[key] = np.array(arguments[key])
    arguments["cueq_config"] = None
    with preserved_process(), torch_tools.default_dtype("float32"):
        model = mace_modules.ScaleShiftMACE(**arguments)
    absent = model.load_state_dict(tensors, strict=False)
    if absent.unexpected_keys or set(absent.missing_keys) & {name for name, _ in model.named_parameters()}:
        raise ArtefactError(f"{path} does not hold the weights of the architecture in its header: {absent}.")
    return model.eval()


def _to_json(value: Any) -> Any:
    if isinstance(value, type) or callable(value):
        return value.__name__
    if isinstance(value, np.ndarray | torch.Tensor):
        return value.tolist()
    if value is None or isinstance(value, bool | int | float | str | list | dict):
        return value
    return str(value)  # irreps
