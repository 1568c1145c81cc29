"""orb calculators from a SPEC, and models stored without pickles."""

from pathlib import Path
from typing import Any

import torch
from ase.calculators.calculator import Calculator
from orb_models.forcefield import pretrained
from orb_models.forcefield.forcefield_adapter import ForcefieldAtomsAdapter
from orb_models.forcefield.inference.calculator import ORBCalculator

from ase_uq.backends._process import preserved_process
from ase_uq.errors import ArtefactError, did_you_mean
from ase_uq.io.tensor_file import read_tensor_file, write_tensor_file

_KIND, _SCHEMA = "orb potential", 1
SPOKEN = "Setting global torch default dtype|Consider passing 'precision="  # warnings of orb's loaders


def load(prefix: str, target: str, device: str, dtype: str) -> Calculator:
    """The calculator that a SPEC names: `orb:FUNCTION[@WEIGHTS]` or `orb:PATH.safetensors`.

    FUNCTION is one of orb's own loader names, for example `orb_v3_direct_20_omat`; `-` may stand for `_`.
    WEIGHTS is a local checkpoint for it.

    Raises:
        ValueError: orb-models has no loader of that name.
        FileNotFoundError: There is no such file.
    """
    if target.endswith(".safetensors"):
        return load_potential(target, device, dtype)
    name, _, weights = target.partition("@")
    name = name.replace("-", "_")
    loaders = pretrained.ORB_PRETRAINED_MODELS
    known = {loader.replace("-", "_"): function for loader, function in loaders.items()}
    if name not in known:
        raise ValueError(
            f"orb-models has no loader {name!r}.{did_you_mean(name, known)} It has {', '.join(sorted(known))}."
        )
    if weights and not Path(weights).is_file():
        raise FileNotFoundError(f"there is no orb checkpoint {weights}.")
    options: dict[str, Any] = {"weights_path": weights} if weights else {}
    if dtype:
        options["precision"] = {"float32": "float32-high", "float64": "float64"}[dtype]
    with preserved_process(SPOKEN):
        # orb compiles unless told not to.
        model, adapter = known[name](device=device or None, compile=False, **options)
    return ORBCalculator(model, adapter, device=device or None)


def save_potential(model: torch.nn.Module, path: str | Path, description: dict[str, Any]) -> None:
    """Stores an orb-v3-architecture model as safetensors (no pickle).

    Args:
        model: The model.
        path: File to write.
        description: `architecture` (name of a function of `orb_models.forcefield.pretrained`), its `arguments`,
            and the arguments of the `adapter`.
    """
    write_tensor_file(path, _KIND, _SCHEMA, description, model.state_dict())


def load_potential(path: str | Path, device: str = "cpu", dtype: str = "") -> ORBCalculator:
    """The calculator of a model stored by `save_potential`."""
    header, tensors = read_tensor_file(path, _KIND, _SCHEMA)
    name = header["architecture"]
    if name not in ("orb_v3_direct_architecture", "orb_v3_conservative_architecture"):
        raise ArtefactError(f"{path} names the architecture {name!r}, which is not one of orb-v3's.")
    with preserved_process(SPOKEN):
        torch.set_default_dtype(torch.float32)
        model = getattr(pretrained, name)(device="cpu", **header["arguments"])
        model.load_state_dict(tensors)
    if dtype == "float64":
        model = model.double()
    model.eval()
    for weight in model.parameters():
        weight.requires_grad_(False)
    return ORBCalculator(model, ForcefieldAtomsAdapter(**header["adapter"]), device=device or "cpu")
