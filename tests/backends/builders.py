"""Small MACE and orb models with random weights: every variant of the architectures without a download."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule

from ase_uq.backends._process import default_dtype
from ase_uq.backends.mace import loading  # before e3nn, which the mace package patches
from ase_uq.testing.backends import standard_frames

# isort: split
import e3nn

ORB_SIZES = {"latent_dim": 32, "base_mlp_hidden_dim": 32, "head_mlp_hidden_dim": 32, "num_message_passing_steps": 2}
_OMOL = {
    "total_charge": {
        "type": "categorical", "per": "graph", "num_classes": 201, "offset": 100, "in_dim": 1, "emb_dim": 8
    },
    "total_spin": {
        "type": "categorical", "per": "graph", "num_classes": 101, "offset": 0, "in_dim": 1, "emb_dim": 8
    },
}  # fmt: skip


_BUILT: dict[str, Any] = {}


def built(build: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What `build` gives for these arguments, built once, as a copy that may be changed."""
    key = repr((build.__module__, build.__qualname__, arguments, sorted(options.items())))
    if key not in _BUILT:
        _BUILT[key] = build(*arguments, **options)
    return twin(_BUILT[key])


def twin(module: torch.nn.Module) -> Any:
    """A copy with weights of its own; those of `copy` compile what e3nn has generated once more, which takes longer."""
    if isinstance(module, torch.jit.ScriptModule):
        return copy.deepcopy(module)
    other = object.__new__(type(module))
    for name, value in vars(module).items():
        if name == "_modules":
            value = {key: None if inner is None else twin(inner) for key, inner in value.items()}
        elif name in ("_parameters", "_buffers") or isinstance(value, torch.Tensor):
            value = copy.deepcopy(value)
        elif isinstance(value, dict | list | set):
            value = copy.copy(value)
        vars(other)[name] = value
    return other


@contextmanager
def compiled() -> Iterator[None]:
    """e3nn compiles the code that it generates, as it does unless it is told otherwise."""
    before = e3nn.get_optimization_defaults()
    e3nn.set_optimization_defaults(jit_script_fx=True, optimize_einsums=True)
    try:
        yield
    finally:
        e3nn.set_optimization_defaults(**before)


def make_mace(**arguments: Any) -> Any:
    """A ScaleShiftMACE in float64; equal arguments give equal weights."""
    return built(_mace, **arguments)


def _mace(
    heads: tuple[str, ...] = ("Default",),
    channels: int = 8,
    order: int = 1,
    elements: tuple[int, ...] = (1, 6, 8),
    layers: int = 2,
    seed: int = 0,
    r_max: float = 4.0,
    correlation: int = 2,
    readout: str = "NonLinearReadoutBlock",
    interaction: str = "RealAgnosticResidualInteractionBlock",
    repulsion: bool = False,
    **options: Any,
) -> torch.nn.Module:
    from e3nn import o3

    modules = loading.mace_modules
    n_heads = len(heads)
    isolated = np.linspace(-10, -20, len(elements))
    with default_dtype(torch.float64), torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # e3nn builds with a deprecated part of torch
        torch.manual_seed(seed)
        model = modules.ScaleShiftMACE(
            atomic_inter_scale=[0.8 + 0.1 * h for h in range(n_heads)] if n_heads > 1 else 0.8,
            atomic_inter_shift=[0.1 + 0.1 * h for h in range(n_heads)] if n_heads > 1 else 0.1,
            atomic_energies=np.stack([isolated + 0.5 * h for h in range(n_heads)]) if n_heads > 1 else isolated,
            r_max=r_max,
            num_bessel=4,
            num_polynomial_cutoff=5,
            max_ell=2,
            interaction_cls=modules.interaction_classes[interaction],
            interaction_cls_first=modules.interaction_classes[interaction],
            num_interactions=layers,
            num_elements=len(elements),
            hidden_irreps=o3.Irreps(" + ".join(f"{channels}x{o}{'eo'[o % 2]}" for o in range(order + 1))),
            MLP_irreps=o3.Irreps("8x0e"),
            avg_num_neighbors=8.0,
            atomic_numbers=list(elements),
            correlation=correlation,
            gate=torch.nn.functional.silu,
            pair_repulsion=repulsion,
            heads=list(heads),
            radial_MLP=[16, 16],
            readout_cls=modules.readout_classes[readout],
            **options,
        )
    return model.eval()


def make_mh1_like() -> torch.nn.Module:
    """Two heads, non-linear interaction, biased readout of the last layer only: the make of mace-mh-1."""
    return make_mace(
        heads=("omat", "omol"),
        readout="NonLinearBiasReadoutBlock",
        interaction="RealAgnosticResidualNonLinearInteractionBlock",
        use_last_readout_only=True,
        use_agnostic_product=True,
        apply_cutoff=False,
    )


def make_omol_like() -> torch.nn.Module:
    """Charge and spin embedded, with a readout of their own: the make of mace-omol."""
    return make_mace(heads=("omol",), embedding_specs=_OMOL, use_embedding_readout=True)


def make_orb(kind: str, dtype: str = "float32", seed: int = 0, **options: Any) -> Any:
    """An orb-v3 with random weights and normalisers that matter, ready for inference; equal arguments, equal ones."""
    return built(_orb, kind, dtype, seed, **options)


def _orb(kind: str, dtype: str, seed: int, **options: Any) -> Any:
    from orb_models.forcefield import pretrained

    build = {
        "direct": pretrained.orb_v3_direct_architecture,
        "conservative": pretrained.orb_v3_conservative_architecture,
    }[kind]
    with default_dtype(torch.float32), torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build(device="cpu", **(ORB_SIZES | options))
        for module in model.modules():
            if type(module).__name__ == "ScalarNormalizer":
                module.bn.running_var.fill_(0.49)
                module.bn.running_mean.fill_(0.02)
        energy = model.heads["energy"]
        energy.reference.linear.weight.data.copy_(-torch.linspace(1, 20, 118))
    model = model.to(getattr(torch, dtype)).eval()
    model.prepare_for_inference()
    for weight in model.parameters():
        weight.requires_grad_(False)
    return model


def charged_frames() -> list[Atoms]:
    """The standard structures with charges and spins."""
    frames = standard_frames()
    for index, atoms in enumerate(frames):
        atoms.info.update(charge=index % 3 - 1, spin=index % 2 + 1)
    return frames


def quiet() -> warnings.catch_warnings:
    """Silences what mace and e3nn say to their authors."""
    return warnings.catch_warnings(action="ignore")


def water() -> Atoms:
    """A slightly distorted water molecule."""
    atoms = molecule("H2O")
    atoms.rattle(0.05, seed=3)
    return atoms
