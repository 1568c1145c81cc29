"""MACE potentials (mace-torch 0.3): any `MACECalculator`, single or committee, any head, plain or compiled.

The forward pass is the same as in `MACECalculator.calculate`, but is called from here because that method drops the
node features. No hooks are needed: the model's output, compiled or not, contains the features, and the exact last-layer
features of atom i are recomputed from them by one small matrix product,

    φ_i = scale · [h_i^(1)|l=0, ..., h_i^(L-1)|l=0, act(linear_1 h_i^(L))],      w·φ_i + base_i = e_i,

with h^(t) the output of layer t. Source: the readout blocks of MACE (Batatia et al. 2022); the identity
is checked numerically for every model that is wrapped.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from mace.calculators import MACECalculator
from mace.tools import torch_tools
from torch import Tensor

from ase_uq.backends._autograd import GraphGradients, in_the_graph
from ase_uq.backends._process import preserved_process
from ase_uq.backends.base import Backend, Batch
from ase_uq.backends.identity import probe_structure
from ase_uq.backends.mace.graphs import Graphs
from ase_uq.backends.mace.readout import hidden_activations, plain_module, resolve_readout, rounded
from ase_uq.backends.stochastic import Blip
from ase_uq.errors import InputError, PotentialMismatch
from ase_uq.forward_pass import Edges, EnergyLayer, ForwardPass, Gradients, Members

if TYPE_CHECKING:
    from ase_uq.backends.mace.stochastic import StochasticMACE

# eV, for float32 node energies of a probe with a few atoms; a wrong readout is off by tenths of an eV.
_IDENTITY_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}


class MACEBackend(Backend):
    """A `MACECalculator` whose node features are kept.

    Args:
        calculator: The user's calculator. Its models, dtype, device, head, padding and compilation are used
            unchanged. For a committee, the mean is that of all members; features and gradients are those of the first
            member.

    Raises:
        TypeError: The calculator's model has no energy readout (dipole models) or is a TorchScript archive.
        PotentialMismatch: `w·φ_i + base_i` differs from the model's own node energies.
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
        self.heads, self.head = tuple(calculator.available_heads), str(calculator.head)
        if getattr(plain_module(calculator.models[0]), "joint_embedding", None) is not None:
            self.required_info_keys = tuple(key for key in ("charge", "spin") if key in self.info_keys)
        self._readout = resolve_readout(plain_module(calculator.models[0]), self.head)
        if calculator.use_compile:
            # The probe structure must neither trigger compilation nor set the size to which structures are padded.
            with self._uncompiled():
                self._check_last_layer()
                _ = self.identity  # cached from here on
        else:
            self._check_last_layer()

    @property
    def is_concurrent(self) -> bool:
        return not self.calculator.use_compile

    @property
    def device(self) -> torch.device:
        return next(self.calculator.models[0].parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.calculator.models[0].parameters()).dtype

    def _modules(self) -> Sequence[torch.nn.Module]:
        return [plain_module(model) for model in self.calculator.models]

    def _settings(self) -> dict[str, Any]:
        model = plain_module(self.calculator.models[0])
        return {
            "package": "mace",
            "heads": list(self.heads),
            "head": self.head,
            "members": len(self.calculator.models),
            "r_max": float(model.r_max),
            "elements": sorted(self.elements),
            "avg_num_neighbors": [float(np.float32(layer.avg_num_neighbors)) for layer in model.interactions],
            "scale": rounded(self._readout.scale),
            "shift": rounded(self._readout.shift),
            "isolated_atoms": [rounded(e) for e in model.atomic_energies_fn.atomic_energies.flatten().tolist()],
            "units": [self.calculator.energy_units_to_eV, self.calculator.length_units_to_A],
            "features": "invariants of all layers, norms of equivariant channels; v1",
        }

    @property
    def _trained_settings(self) -> tuple[str, ...]:
        return ("heads", "head", "avg_num_neighbors", "scale", "shift", "isolated_atoms")

    def stochastic(self) -> "StochasticMACE":
        from ase_uq.backends.mace.stochastic import StochasticMACE, copied_model

        return StochasticMACE(self, copied_model(self))

    def _with_blip(self, blip: Blip) -> "MACEBackend":
        from ase_uq.backends.mace.stochastic import with_blip

        with preserved_process():
            return with_blip(self, blip)

    def _collate(self, frames: Sequence[Atoms]) -> Any:
        if len(frames) == 1 and self.calculator.use_compile:
            # The calculator's own method keeps its padding, hence a single compiled graph along a run.
            return self.calculator._atoms_to_batch(frames[0])
        return self._placed(self._graphs()(frames))

    def _build(self) -> Callable[[Sequence[Atoms]], Any] | None:
        return None if self.calculator.use_compile else self._graphs()

    def _placed(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value.to(self.device) for key, value in data.items()}

    def _graphs(self) -> Graphs:
        calculator = self.calculator
        return Graphs(
            info_keys=tuple(calculator.info_keys.items()),
            arrays_keys=tuple({**calculator.arrays_keys, calculator.charges_key: "charges"}.items()),
            numbers=tuple(map(int, calculator.z_table.zs)),
            cutoff=float(calculator.r_max),
            heads=tuple(calculator.available_heads),
            head=calculator.head,
            dtype=calculator.default_dtype,
        )

    def _volume(self, atoms: Atoms) -> float:
        # MACE gives directions that are not periodic a length of its own, and divides by the volume of that cell.
        return super()._volume(atoms) if atoms.pbc.all() else 0.0

    def _forward(self, batch: Batch, forces: bool, gradients: bool) -> ForwardPass:
        n_frames = len(batch.frames)
        n_atoms = sum(len(atoms) for atoms in batch.frames)
        first = self.calculator.models[0]
        if gradients and plain_module(first) is not first:
            raise InputError(
                "this MACE model is compiled, and what torch compiles cannot be differentiated twice. Make its "
                "MACECalculator without compile_mode to get gradients."
            )
        parameters = list(first.parameters()) if gradients else []
        data, leaves, outputs = {}, [], []
        with in_the_graph(parameters):
            for model in self.calculator.models:
                data = self._inputs(batch.data, model)
                leaves.append(data["positions"])  # the model replaces them by deformed positions
                outputs.append(self._model_outputs(model, data, forces, keep_graph=gradients and not outputs))
            kept = self._gradients(batch, outputs[0], leaves[0], data["batch"], parameters) if gradients else None
        energy_unit = self.calculator.energy_units_to_eV
        length_unit = self.calculator.length_units_to_A

        def every(key: str, rows: int) -> Tensor:
            # Any further rows are padding, which a compiled calculator adds.
            return torch.stack([out[key].detach()[:rows] for out in outputs])

        def mean(key: str, rows: int, unit: float) -> Tensor:
            return every(key, rows).mean(0) * unit

        members = None
        if len(outputs) > 1:
            members = Members(
                energy=every("energy", n_frames) * energy_unit,
                forces=every("forces", n_atoms) * (energy_unit / length_unit) if forces else None,
                stress=voigt(every("stress", n_frames)) * (energy_unit / length_unit**3) if forces else None,
            )
        features = outputs[0]["node_feats"].detach()[:n_atoms]
        frame_of_atom = data["batch"][:n_atoms]
        with torch.no_grad():
            phi = self._last_layer(features) * energy_unit
        weights = self._readout.weights.to(phi)
        energy = mean("energy", n_frames, energy_unit)
        summed = torch.zeros(n_frames, dtype=torch.float64, device=phi.device)
        summed.index_add_(0, frame_of_atom, (phi @ weights).double())
        return ForwardPass(
            numbers=torch.as_tensor(np.concatenate([a.numbers for a in batch.frames]), device=phi.device),
            positions=data["positions"].detach()[:n_atoms] * length_unit,
            frame_of_atom=frame_of_atom,
            n_atoms_of_frame=torch.tensor([len(a) for a in batch.frames], device=phi.device),
            energy=energy,
            energies=mean("node_energy", n_atoms, energy_unit),
            forces=mean("forces", n_atoms, energy_unit / length_unit) if forces else None,
            stress=voigt(mean("stress", n_frames, energy_unit / length_unit**3)) if forces else None,
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
        """Gradients of the first member, in eV and Å; `leaf` holds the positions in the model's own unit."""
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
            strain=None if forces is None else out["displacement"],
        )

    @contextmanager
    def _uncompiled(self) -> Iterator[None]:
        calculator = self.calculator
        names = ("models", "use_compile", "pad_num_atoms", "pad_num_edges", "_padding_initialized")
        before = {name: getattr(calculator, name) for name in names}
        calculator.models = [plain_module(model) for model in calculator.models]
        calculator.use_compile = False
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(calculator, name, value)

    def _inputs(self, data: Any, model: torch.nn.Module) -> dict[str, Tensor]:
        """Copies for one model: it turns the positions of its inputs into a leaf of its graph."""
        inputs = {key: value.clone() for key, value in (data if isinstance(data, dict) else data.to_dict()).items()}
        if self.calculator.use_compile:
            for key in ("node_attrs", "positions"):
                inputs[key].requires_grad_(True)  # as MACECalculator does
        dtype = next(model.parameters()).dtype
        return {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}

    def _model_outputs(
        self, model: torch.nn.Module, data: dict[str, Tensor], forces: bool, keep_graph: bool = False
    ) -> dict[str, Tensor]:
        calculator = self.calculator
        if not forces and not calculator.use_compile:
            with torch.set_grad_enabled(keep_graph):
                return model(data, compute_force=False)
        outside = calculator.use_compile and calculator._enable_oeq
        if outside:
            # As in MACECalculator, the strain must be a leaf outside the compiled graph.
            positions = data["positions"]
            strain = torch.zeros((int(data["ptr"].numel() - 1), 3, 3), dtype=positions.dtype, device=positions.device)
            data["displacement"] = strain + positions.sum() * 0.0
        keep_graph = keep_graph or (calculator.use_compile and not outside)
        return model(data, compute_stress=True, training=keep_graph)

    def _latent(self, features: Tensor) -> Tensor:
        """Invariants of all layers, then norms of the equivariant channels of all layers."""
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
        """(n_atoms, 3, n_vectors) channels of order 1 in the first layer; e3nn orders their components x, y, z."""
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
            parts.append(hidden_activations(block, layers[index], readout)[:, kept])
        return torch.cat(parts, 1) * readout.scale

    def _check_last_layer(self) -> None:
        """Checks w·φ_i + base_i = e_i on a structure with many elements, with an independently computed base."""
        batch = self.collate([probe_structure(self.elements, self.required_info_keys)])
        forward_pass = self.forward(batch, forces=False)
        model = plain_module(self.calculator.models[0])
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
            outputs = self._model_outputs(self.calculator.models[0], self._inputs(batch.data, model), False)
        layer = forward_pass.energy_layer
        predicted = (layer.features @ layer.weights).double() + base * unit
        deviation = float((predicted - outputs["node_energy"].detach()[: len(base)].double() * unit).abs().max())
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
    with preserved_process():
        return MACEBackend(calculator)


def voigt(stress: Tensor) -> Tensor:
    """(..., 3, 3) → (..., 6), in ASE's order, on the device."""
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
