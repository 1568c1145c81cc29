"""MACE potentials (mace-torch 0.3): any `MACECalculator`, single or committee, any head, plain or compiled.

The forward is the one `MACECalculator.calculate` makes, called from here because that method drops the node
features it gets. Nothing is hooked: the features stand in the model's own output, compiled or not, and the exact
last-layer features of atom i are recomputed from them by one small matrix product,

    φ_i = scale · [h_i^(1)|l=0, ..., h_i^(L-1)|l=0, act(linear_1 h_i^(L))],      w·φ_i + base_i = e_i,

with h^(t) the output of layer t. Source: the readout blocks of MACE (Batatia et al. 2022); checked numerically
for every model that is wrapped.
"""

import difflib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import BaseCalculator, Calculator
from torch import Tensor

from ase_uq.backends._autograd import GraphGradients, in_the_graph
from ase_uq.backends.base import Backend, Batch, probe_structure
from ase_uq.errors import ArtefactError, InputError, PotentialMismatch
from ase_uq.forward_pass import Edges, EnergyLayer, Evaluation, Gradients, Members
from ase_uq.io.tensor_file import read_artefact, write_artefact


@contextmanager
def _process_left_as_it_was() -> Iterator[None]:
    """Undoes what mace does to the whole process: torch's safe loading off, ASE's base class extended."""
    switch = os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    properties = list(BaseCalculator.implemented_properties)
    default_dtype = torch.get_default_dtype()
    random_state = torch.random.get_rng_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # e3nn and torch.jit speak to mace's authors, not to our users
            yield
    finally:
        BaseCalculator.implemented_properties[:] = properties
        torch.set_default_dtype(default_dtype)
        torch.random.set_rng_state(random_state)  # of which new weights, soon overwritten, have taken
        if switch is None:
            os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
        else:
            os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = switch


with _process_left_as_it_was():
    import mace  # noqa: F401 (before e3nn, which mace's modules import)
    from mace import data as mace_data
    from mace import modules as mace_modules
    from mace.calculators import MACECalculator, foundations_models
    from mace.modules.wrapper_ops import get_layout
    from mace.tools import torch_geometric, torch_tools
    from mace.tools.scripts_utils import extract_config_mace_model

_KIND, _SCHEMA = "MACE potential", 1
# Σ of float32 node energies of a probe of a few atoms; a wrong readout is off by tenths of an eV.
_IDENTITY_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}


@dataclass(frozen=True)
class _Readout:
    """How the last-layer features follow from the node features: slices and modules, resolved once.

    Plain integers, no e3nn objects: nothing here trips over a compiled model.
    """

    layer_dims: list[int]
    n_scalars: int
    vectors: slice | None  # columns of the polar vectors (1o) in the first layer
    hidden: tuple[tuple[torch.nn.Module, int], ...]  # non-linear readouts and the layer each one reads
    linear: tuple[int, ...]  # layers read by a linear readout
    kept: tuple[slice, ...]  # columns of each non-linear readout that belong to the head
    weights: Tensor
    intercept: float
    scale: float
    shift: float
    head: int
    n_heads: int
    components_first: bool  # cuEquivariance kernels order (2l+1, channels), e3nn (channels, 2l+1)


class MACEBackend(Backend):
    """A `MACECalculator` whose node features are kept.

    Args:
        calculator: The user's calculator. Its models, dtype, device, head, padding and compilation are used
            as they are. For a committee the mean is the committee's, features and gradients are the first
            member's.

    Raises:
        TypeError: The calculator's model has no energy readout (dipole models) or is a TorchScript archive.
        PotentialMismatch: `w·φ_i + base_i` does not give the model's own node energies.
    """

    name = "mace"
    results = ("energy", "free_energy", "energies", "forces", "stress")

    def __init__(self, calculator: MACECalculator) -> None:
        if calculator.model_type != "MACE":
            raise TypeError(
                f"MACE models of type {calculator.model_type!r} are not supported: their energy is not the sum "
                "of readouts. Use a model of type 'MACE'."
            )
        if isinstance(calculator.models[0], torch.jit.ScriptModule):
            raise TypeError("TorchScript MACE models are not supported. Use the .model file it was compiled from.")
        self.calculator = calculator
        self.elements = frozenset(int(z) for z in calculator.z_table.zs)
        self.info_keys = tuple(sorted({*calculator.info_keys.values()}))
        if getattr(_plain(calculator.models[0]), "joint_embedding", None) is not None:
            self.required_info_keys = tuple(key for key in ("charge", "spin") if key in self.info_keys)
        self._readout = _resolve_readout(_plain(calculator.models[0]), str(calculator.head))
        if calculator.use_compile:
            # The probe structure must not be compiled for, nor set the size that real structures are padded to.
            with self._uncompiled():
                self._check_last_layer()
                _ = self.identity  # kept from here on
        else:
            self._check_last_layer()

    @property
    def device(self) -> torch.device:
        return next(self.calculator.models[0].parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.calculator.models[0].parameters()).dtype

    def _modules(self) -> Sequence[torch.nn.Module]:
        return [_plain(model) for model in self.calculator.models]

    def _settings(self) -> dict[str, Any]:
        model = _plain(self.calculator.models[0])
        return {
            "package": "mace",
            "heads": list(self.calculator.available_heads),
            "head": str(self.calculator.head),
            "members": len(self.calculator.models),
            "r_max": float(model.r_max),
            "elements": sorted(self.elements),
            "avg_num_neighbors": [float(np.float32(layer.avg_num_neighbors)) for layer in model.interactions],
            "scale": _rounded(self._readout.scale),
            "shift": _rounded(self._readout.shift),
            "isolated_atoms": [_rounded(e) for e in model.atomic_energies_fn.atomic_energies.flatten().tolist()],
            "units": [self.calculator.energy_units_to_eV, self.calculator.length_units_to_A],
            "features": "invariants of all layers, norms of equivariant channels; v1",
        }

    def _collate(self, frames: Sequence[Atoms]) -> Any:
        if len(frames) == 1:
            _check_heads(frames, self.calculator.available_heads)
            # The calculator's own road: keeps its padding, hence one compiled graph along a run.
            return self.calculator._atoms_to_batch(frames[0])
        return self._placed(self._graphs()(frames))

    def _build(self) -> Callable[[Sequence[Atoms]], Any] | None:
        return None if self.calculator.use_compile else self._graphs()

    def _placed(self, data: Any) -> Any:
        return data.to(self.calculator.device)

    def _graphs(self) -> Callable[[Sequence[Atoms]], Any]:
        calculator = self.calculator
        return partial(
            _graphs_of,
            keys=mace_data.KeySpecification(
                info_keys=calculator.info_keys,
                arrays_keys={**calculator.arrays_keys, calculator.charges_key: "charges"},
            ),
            z_table=calculator.z_table,
            cutoff=calculator.r_max,
            heads=calculator.available_heads,
            head=calculator.head,
            dtype=calculator.default_dtype,
        )

    def _evaluate(self, batch: Batch, forces: bool, gradients: bool) -> Evaluation:
        n_frames = len(batch.frames)
        n_atoms = sum(len(atoms) for atoms in batch.frames)
        first = self.calculator.models[0]
        if gradients and _plain(first) is not first:
            raise InputError(
                "this MACE model is compiled, and what torch compiles cannot be differentiated twice. Make its "
                "MACECalculator without compile_mode to get gradients."
            )
        parameters = list(first.parameters()) if gradients else []
        data, leaves, outputs = {}, [], []
        with in_the_graph(parameters):
            for model in self.calculator.models:
                data = self._inputs(batch.data, model)
                leaves.append(data["positions"])  # in whose place the model puts deformed ones
                outputs.append(self._forward(model, data, forces, keep_graph=gradients and not outputs))
            kept = self._gradients(batch, outputs[0], leaves[0], data["batch"], parameters) if gradients else None
        energy_unit = self.calculator.energy_units_to_eV
        length_unit = self.calculator.length_units_to_A

        def every(key: str, rows: int) -> Tensor:
            # Rows beyond the real ones are padding, which a compiled calculator adds.
            return torch.stack([out[key].detach()[:rows] for out in outputs])

        def mean(key: str, rows: int, unit: float) -> Tensor:
            return every(key, rows).mean(0) * unit

        members = None
        if len(outputs) > 1:
            members = Members(
                energy=every("energy", n_frames) * energy_unit,
                forces=every("forces", n_atoms) * (energy_unit / length_unit) if forces else None,
                stress=_voigt(every("stress", n_frames)) * (energy_unit / length_unit**3) if forces else None,
            )
        features = outputs[0]["node_feats"].detach()[:n_atoms]
        frame_of_atom = data["batch"][:n_atoms]
        with torch.no_grad():
            phi = self._last_layer(features) * energy_unit
        weights = self._readout.weights.to(phi)
        energy = mean("energy", n_frames, energy_unit)
        summed = torch.zeros(n_frames, dtype=torch.float64, device=phi.device)
        summed.index_add_(0, frame_of_atom, (phi @ weights).double())
        return Evaluation(
            numbers=torch.as_tensor(np.concatenate([a.numbers for a in batch.frames]), device=phi.device),
            positions=data["positions"].detach()[:n_atoms] * length_unit,
            frame_of_atom=frame_of_atom,
            n_atoms_of_frame=torch.tensor([len(a) for a in batch.frames], device=phi.device),
            energy=energy,
            energies=mean("node_energy", n_atoms, energy_unit),
            forces=mean("forces", n_atoms, energy_unit / length_unit) if forces else None,
            stress=_voigt(mean("stress", n_frames, energy_unit / length_unit**3)) if forces else None,
            features=self._latent(features),
            energy_layer=EnergyLayer(phi, weights, energy.double() - summed),
            edges=_edges(data, n_atoms, float(self.calculator.r_max), length_unit),
            vectors=self._vectors(features),
            members=members,
            gradients=kept,
        )

    def _gradients(
        self,
        batch: Batch,
        out: dict[str, Tensor],
        leaf: Tensor,
        frame_of_row: Tensor,
        parameters: list[torch.nn.Parameter],
    ) -> Gradients:
        """Of the first member, in eV and Å; `leaf` are the positions in the model's own unit."""
        n_frames, n_atoms = len(batch.frames), sum(len(atoms) for atoms in batch.frames)
        energy_unit, length_unit = self.calculator.energy_units_to_eV, self.calculator.length_units_to_A
        forces = out["forces"]
        return GraphGradients(
            parameters=parameters,
            positions=leaf,
            features=self._latent(out["node_feats"][:n_atoms]),
            energy_features=self._last_layer(out["node_feats"][:n_atoms]) * energy_unit,
            energy=out["energy"][:n_frames] * energy_unit,
            forces=None if forces is None else forces[:n_atoms] * (energy_unit / length_unit),
            frame_of_atom=frame_of_row[:n_atoms],
            length_unit=length_unit,
        )

    @contextmanager
    def _uncompiled(self) -> Iterator[None]:
        calculator = self.calculator
        names = ("models", "use_compile", "pad_num_atoms", "pad_num_edges", "_padding_initialized")
        before = {name: getattr(calculator, name) for name in names}
        calculator.models = [_plain(model) for model in calculator.models]
        calculator.use_compile = False
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(calculator, name, value)

    def _inputs(self, data: Any, model: torch.nn.Module) -> dict[str, Tensor]:
        batch = self.calculator._clone_batch(data)
        dtype = next(model.parameters()).dtype
        for key in batch.keys:
            if torch.is_tensor(batch[key]) and torch.is_floating_point(batch[key]):
                batch[key] = batch[key].to(dtype=dtype)
        return batch.to_dict()

    def _forward(
        self, model: torch.nn.Module, data: dict[str, Tensor], forces: bool, keep_graph: bool = False
    ) -> dict[str, Tensor]:
        calculator = self.calculator
        if not forces and not calculator.use_compile:
            with torch.set_grad_enabled(keep_graph):
                return model(data, compute_force=False)
        outside = calculator.use_compile and calculator._enable_oeq
        if outside:
            # As MACECalculator does: the strain must be a leaf outside the compiled graph.
            positions = data["positions"]
            strain = torch.zeros((int(data["ptr"].numel() - 1), 3, 3), dtype=positions.dtype, device=positions.device)
            data["displacement"] = strain + positions.sum() * 0.0
        keep_graph = keep_graph or (calculator.use_compile and not outside)
        return model(data, compute_stress=True, training=keep_graph)

    def _latent(self, features: Tensor) -> Tensor:
        """Invariants of all layers, then the norms of the equivariant channels of each."""
        scalars, norms = [], []
        for block in torch.split(features, self._readout.layer_dims, -1):
            n_scalars = min(self._readout.n_scalars, block.shape[1])
            scalars.append(block[:, :n_scalars])
            start, order = n_scalars, 1
            while start < block.shape[1]:
                width = n_scalars * (2 * order + 1)
                channels = block[:, start : start + width]
                if self._readout.components_first:
                    norms.append(channels.reshape(len(block), 2 * order + 1, n_scalars).norm(dim=1))
                else:
                    norms.append(channels.reshape(len(block), n_scalars, 2 * order + 1).norm(dim=2))
                start, order = start + width, order + 1
        return torch.cat([*scalars, *norms], 1)

    def _vectors(self, features: Tensor) -> Tensor | None:
        """(n_atoms, 3, n_vectors) channels of order 1 of the first layer; e3nn orders their components x, y, z."""
        if self._readout.vectors is None:
            return None
        channels = features[:, self._readout.vectors]
        if self._readout.components_first:
            return channels.reshape(len(features), 3, -1)
        return channels.reshape(len(features), -1, 3).mT

    def _last_layer(self, features: Tensor) -> Tensor:
        readout = self._readout
        layers = torch.split(features, readout.layer_dims, -1)
        parts = [layers[index][:, : readout.n_scalars] for index in readout.linear]
        for (block, index), kept in zip(readout.hidden, readout.kept, strict=True):
            parts.append(_hidden_activations(block, layers[index], readout)[:, kept])
        return torch.cat(parts, 1) * readout.scale

    def _check_last_layer(self) -> None:
        """w·φ_i + base_i = e_i on a structure with every element, with the base computed on its own."""
        batch = self.collate([probe_structure(self.elements, self.required_info_keys)])
        evaluation = self.evaluate(batch, forces=False)
        model = _plain(self.calculator.models[0])
        unit = self.calculator.energy_units_to_eV
        inputs = self._inputs(batch.data, model)
        with torch.no_grad(), torch_tools.default_dtype(self.calculator.default_dtype):
            base = model.atomic_energies_fn(inputs["node_attrs"])[: len(batch.frames[0]), self._readout.head].double()
            base = base + self._readout.shift + self._readout.scale * self._readout.intercept
            if hasattr(model, "pair_repulsion_fn"):
                vectors = inputs["positions"][inputs["edge_index"][1]] - inputs["positions"][inputs["edge_index"][0]]
                lengths = (vectors + inputs["shifts"]).norm(dim=-1, keepdim=True)
                repulsion = model.pair_repulsion_fn(
                    lengths, inputs["node_attrs"], inputs["edge_index"], model.atomic_numbers
                )
                scaled = self._readout.scale if hasattr(model, "scale_shift") else 1.0
                base = base + scaled * repulsion[: len(base)].double()
            own = self._forward(self.calculator.models[0], self._inputs(batch.data, model), False)["node_energy"]
        layer = evaluation.energy_layer
        predicted = (layer.features @ layer.weights).double() + base * unit
        deviation = float((predicted - own.detach()[: len(base)].double() * unit).abs().max())
        if not deviation < _IDENTITY_TOLERANCE[self.dtype] * max(1.0, abs(unit)):
            raise PotentialMismatch(
                f"the last layer of this MACE model is not understood: w·φ + base differs from its node energies by "
                f"{deviation:.1e} eV. The architecture ({type(model).__name__}) is probably newer than this package."
            )


def accepts(calculator: BaseCalculator) -> bool:
    """Whether this backend wraps the calculator."""
    return isinstance(calculator, MACECalculator)


def wrap(calculator: BaseCalculator) -> MACEBackend:
    """The backend of a `MACECalculator`."""
    assert isinstance(calculator, MACECalculator)
    with _process_left_as_it_was():
        return MACEBackend(calculator)


def load(prefix: str, target: str, device: str, dtype: str) -> Calculator:
    """The calculator that a SPEC names: `mace:PATH`, `mace-mp:NAME`, `mace-off:NAME`, `mace-omol:NAME`.

    PATH is a `.model` file as MACE trains it, several of them as `committee_*.model`, or a `.safetensors` file of
    `save_potential`. A `.model` file is a pickle: loading one runs code, so load only your own or those you trust.
    NAME is one of the loader's own, an `https:` address, or a `.model` file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: MACE has no pretrained model of that name.
    """
    with _process_left_as_it_was():
        # mace.torch.load carries no weights_only: its files are pickled modules.
        os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
        if prefix == "mace":
            dtype = dtype or "float64"
            # Sorted: the first member of a committee gives the features.
            paths = [target] if Path(target).is_file() else sorted(glob(target))
            if not paths:
                raise FileNotFoundError(f"there is no MACE model file {target}.")
            source: dict[str, Any] = {"model_paths": paths}
            if all(path.endswith(".safetensors") for path in paths):
                source = {"models": [load_potential(path).to(getattr(torch, dtype)) for path in paths]}
            calculator = MACECalculator(**source, device=device, default_dtype=dtype)
        else:
            _check_pretrained(prefix, target)
            loader = getattr(foundations_models, prefix.replace("-", "_"))
            options = {"default_dtype": dtype} if dtype else {}
            # What MACE prints about its licences belongs beside our results, not into them.
            with redirect_stdout(sys.stderr):
                calculator = loader(model=target or None, device=device, **options)
        # MACE appends to the list of ASE's base class, which is put back on leaving: give it a list of its own.
        calculator.implemented_properties = list(dict.fromkeys(calculator.implemented_properties))
        return calculator


def _check_pretrained(prefix: str, target: str) -> None:
    names = {
        "mace-mp": [name for name in foundations_models.mace_mp_names if name],
        "mace-off": list(foundations_models.mace_off_urls),
        "mace-omol": ["extra_large"],
    }[prefix]
    if target and target not in names and not target.startswith("https:") and not Path(target).exists():
        close = difflib.get_close_matches(target, names, n=2)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(
            f"{prefix} has no model {target!r}, and there is no file of that name.{hint} It has {', '.join(names)}."
        )


def save_potential(model: torch.nn.Module, path: str | Path) -> None:
    """Stores a ScaleShiftMACE as safetensors with its architecture in the JSON header (no pickle).

    Weights are stored in float32, which changes forces by about 1e-6 eV/Å.
    """
    config = extract_config_mace_model(model)
    if "error" in config:
        raise TypeError(f"only ScaleShiftMACE models can be stored: {config['error']}")
    header = {key: _to_json(value) for key, value in config.items() if key != "cueq_config"}
    # Buffers (coupling coefficients, constants) follow from the architecture and would treble the file.
    tensors = {name: weight.detach().clone().float() for name, weight in model.named_parameters()}
    write_artefact(path, _KIND, _SCHEMA, header, tensors)


def load_potential(path: str | Path) -> torch.nn.Module:
    """The model stored by `save_potential`, in float32."""
    from e3nn import o3

    header, tensors = read_artefact(path, _KIND, _SCHEMA)
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
    with _process_left_as_it_was(), torch_tools.default_dtype("float32"):
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


def _check_heads(frames: Sequence[Atoms], heads: Sequence[str]) -> None:
    for atoms in frames:
        head = atoms.info.get("head")
        if head is not None and head not in heads:
            raise InputError(f"atoms.info['head'] is {head!r}; the model has {heads}.")


def _graphs_of(
    frames: Sequence[Atoms], *, keys: Any, z_table: Any, cutoff: float, heads: list[str], head: str, dtype: str
) -> Any:
    """The batch that mace makes of structures, on the CPU."""
    _check_heads(frames, heads)
    with torch_tools.default_dtype(dtype):
        graphs = [
            mace_data.AtomicData.from_config(
                mace_data.config_from_atoms(atoms, key_specification=keys, head_name=head),
                z_table=z_table,
                cutoff=cutoff,
                heads=heads,
            )
            for atoms in frames
        ]
    return torch_geometric.Batch.from_data_list(graphs)


def _plain(model: Any) -> Any:
    """The module behind `torch.compile`."""
    return getattr(model, "_orig_mod", model)


def _rounded(value: float) -> float:
    # As float32 so that a model cast between precisions keeps its settings.
    return float(np.float32(value))


def _voigt(stress: Tensor) -> Tensor:
    """(..., 3, 3) → (..., 6), as ASE does it, on the device."""
    xx, yy, zz = stress.diagonal(dim1=-2, dim2=-1).unbind(-1)
    twice = stress + stress.mT
    return torch.stack([xx, yy, zz, twice[..., 1, 2] / 2, twice[..., 0, 2] / 2, twice[..., 0, 1] / 2], -1)


def _edges(data: dict[str, Tensor], n_atoms: int, cutoff: float, length_unit: float) -> Edges:
    source, target = data["edge_index"]
    vector = (data["positions"][source] - data["positions"][target] - data["shifts"]).detach() * length_unit
    if len(data["positions"]) > n_atoms:
        real = (source < n_atoms) & (target < n_atoms)
        source, target, vector = source[real], target[real], vector[real]
    return Edges(source, target, vector, cutoff * length_unit)


def _hidden_activations(block: Any, features: Tensor, readout: _Readout) -> Tensor:
    """Input of the last linear map of a non-linear readout."""
    hidden = block.non_linearity(block.linear_1(features))
    if hasattr(block, "linear_mid"):
        hidden = _masked(hidden, readout)
        hidden = block.non_linearity(block.linear_mid(hidden))
    return hidden


def _masked(hidden: Tensor, readout: _Readout) -> Tensor:
    if readout.n_heads == 1:
        return hidden
    kept = torch.zeros_like(hidden)
    columns = _head_columns(hidden.shape[1], readout.head, readout.n_heads)
    kept[:, columns] = hidden[:, columns]
    return kept


def _head_columns(width: int, head: int, n_heads: int) -> slice:
    step = width // n_heads
    return slice(head * step, (head + 1) * step)


def _resolve_readout(model: Any, head_name: str) -> _Readout:
    heads = list(getattr(model, "heads", None) or ["Default"])
    head = heads.index(head_name) if head_name in heads else 0
    dims = [product.linear.irreps_out.dim for product in model.products]
    n_scalars = model.products[-1].linear.irreps_out.count("0e")
    readouts = list(model.readouts)
    layers = list(range(len(dims) - len(readouts), len(dims)))
    linear, hidden, kept, intercept = [], [], [], 0.0
    linear_weights, hidden_weights = [], []
    for block, layer in zip(readouts, layers, strict=True):
        last = block.linear_2 if hasattr(block, "linear_1") else block.linear
        matrix, offset = _effective_weights(last)
        intercept += float(offset[head])
        if hasattr(block, "linear_1"):
            columns = _head_columns(len(matrix), head, len(heads))
            hidden.append((block, layer))
            kept.append(columns)
            hidden_weights.append(matrix[columns, head])
        else:
            linear.append(layer)
            linear_weights.append(matrix[:n_scalars, head])
    has_scale = hasattr(model, "scale_shift")
    scale = float(torch.atleast_1d(model.scale_shift.scale)[head]) if has_scale else 1.0
    shift = float(torch.atleast_1d(model.scale_shift.shift)[head]) if has_scale else 0.0
    weights = torch.cat([*linear_weights, *hidden_weights]).detach().clone()
    return _Readout(
        layer_dims=dims,
        n_scalars=n_scalars,
        vectors=_vector_columns(model.products[0].linear.irreps_out),
        hidden=tuple(hidden),
        linear=tuple(linear),
        kept=tuple(kept),
        weights=weights,
        intercept=intercept,
        scale=scale,
        shift=shift,
        head=head,
        n_heads=len(heads),
        components_first=get_layout(getattr(model.products[0], "cueq_config", None)) == "ir_mul",
    )


def _vector_columns(irreps: Any) -> slice | None:
    start = 0
    for multiplicity, kind in irreps:
        width = multiplicity * kind.dim
        if str(kind) == "1o":  # 1e are pseudo-vectors
            return slice(start, start + width)
        start += width
    return None


def _effective_weights(linear: Any) -> tuple[Tensor, Tensor]:
    """(n_in, n_out) matrix and offset of a linear map, with the path normalisation that its weights lack."""
    weight = next(linear.parameters())
    width = linear.irreps_in.dim
    with torch.no_grad():
        offset = linear(torch.zeros(1, width, dtype=weight.dtype, device=weight.device))
        matrix = linear(torch.eye(width, dtype=weight.dtype, device=weight.device)) - offset
    return matrix, offset[0]
