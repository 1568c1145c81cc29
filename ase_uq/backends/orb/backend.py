"""orb-v3 potentials (orb-models 0.7): any `ORBCalculator`, direct or conservative, with D3, charge and spin.

Direct models: F = P(std·(φ_i B + b) + mean) + F_ZBL with φ_i the input of the last linear map of the force head and
P the projection that removes the net force and, without a cell, the net torque.

The energy head of orb-v3 acts on the *mean* node feature x̄, so orb's energy is not a sum of atomic energies. The
per-atom features here are its exact tangent decomposition at x̄,

    φ_i = std·[h(x̄) + J_h(x̄)(x_i - x̄); 1],     Σ_i φ_i = N·std·[h(x̄); 1] = ψ,     w·ψ + base = energy,

a linearised attribution, not a physical energy of an atom. Heads that sum over atoms (orbmol-v2) do not need it.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from orb_models.common.atoms.batch.graph_batch import AtomGraphs
from orb_models.common.models import segment_ops
from orb_models.forcefield.inference.calculator import ORBCalculator
from orb_models.forcefield.inference.d3_model import D3SumModel
from orb_models.forcefield.models.conservative_regressor import ConservativeForcefieldRegressor
from orb_models.forcefield.models.forcefield_heads import ChargeConditionedEnergyHead
from orb_models.forcefield.models.forcefield_utils import maybe_remove_net_force_and_torque
from torch import Tensor

from ase_uq.backends._autograd import GraphGradients, in_the_graph
from ase_uq.backends._process import default_dtype
from ase_uq.backends.base import Backend, Batch
from ase_uq.backends.identity import probe_structure
from ase_uq.errors import InputError, PotentialMismatch
from ase_uq.forward_pass import ConfidenceBins, Edges, EnergyLayer, ForceLayer, ForwardPass, Gradients

_IDENTITY_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}
# The one-hot code has 118 places, the first for no element; orb accepts every number that fits in.
_ALL_ELEMENTS = frozenset(range(1, 118))
_DEFAULT_DTYPE = threading.RLock()


class OrbBackend(Backend):
    """An `ORBCalculator` whose node features are kept.

    Args:
        calculator: The user's calculator. Its model, adapter, edge method, device and compilation are used
            unchanged: a compiled backbone stays compiled, and a conservative model is called as a whole.

    Raises:
        PotentialMismatch: `w·ψ + base` differs from the model's energy, or `P(φB) + base` from its forces.
    """

    name = "orb"
    elements = _ALL_ELEMENTS

    def __init__(self, calculator: ORBCalculator) -> None:
        self.calculator = calculator
        model = calculator.model
        self._dispersion = model.d3_model if isinstance(model, D3SumModel) else None
        self._model: Any = model.xc_model if isinstance(model, D3SumModel) else model
        self._conservative = isinstance(self._model, ConservativeForcefieldRegressor)
        if calculator.expects_charge_and_spin:
            self.info_keys = self.required_info_keys = ("charge", "spin")
        self.direct = not self._conservative
        stress = ("stress",) if self._model.has_stress else ()
        self.results = ("energy", "free_energy", "forces", *stress)
        with _default_dtype(self.dtype):
            self._check_last_layer()

    @property
    def device(self) -> torch.device:
        return torch.device(self.calculator.device)

    @property
    def dtype(self) -> torch.dtype:
        return next(self._model.parameters()).dtype

    def _modules(self) -> Sequence[torch.nn.Module]:
        return [self._model]

    def _settings(self) -> dict[str, Any]:
        adapter = self.calculator.adapter
        model = self._model
        settings = {
            "package": "orb_models",
            "class": type(model).__name__,
            "heads": sorted(model.heads),
            "radius": float(adapter.radius),
            "max_num_neighbors": int(self.calculator.max_num_neighbors or adapter.max_num_neighbors),
            "normalizers": {
                name: [float(head.normalizer.bn.running_mean), float(head.normalizer.bn.running_var)]
                for name, head in sorted(model.heads.items())
                if name in ("energy", "forces")
            },
            "node_aggregation": str(getattr(model.heads["energy"], "node_aggregation", "")),
            "repulsion_aggregation": str(model.pair_repulsion_fn.node_aggregation) if model.pair_repulsion else "",
            "dispersion": type(self._dispersion).__name__ if self._dispersion is not None else "",
            "features": "node features; v1",
        }
        if "forces" in model.heads:
            head = model.heads["forces"]
            settings["projection"] = [head.remove_mean, head.remove_torque_for_nonpbc_systems]
        return settings

    @property
    def _trained_settings(self) -> tuple[str, ...]:
        return ("normalizers",)

    def _collate(self, frames: Sequence[Atoms]) -> Any:
        calculator = self.calculator
        options: dict[str, Any] = {
            "max_num_neighbors": calculator.max_num_neighbors,
            "edge_method": calculator.edge_method,
            "device": self.device,
            # By default both would follow torch's global default dtype and clash with the model's dtype.
            "output_dtype": self.dtype,
            "graph_construction_dtype": self.dtype,
        }
        readable = [self._readable(atoms) for atoms in frames]
        if len({tuple(atoms.pbc) for atoms in frames}) == 1 and len(frames) > 1:
            return calculator.adapter.from_ase_atoms_list(readable, **options)
        # from_ase_atoms_list refuses batches that mix periodic and isolated structures.
        options["half_supercell"] = calculator.half_supercell
        graphs = [calculator.adapter.from_ase_atoms(atoms, **options) for atoms in readable]
        return graphs[0] if len(graphs) == 1 else AtomGraphs.batch(graphs)

    def _readable(self, atoms: Atoms) -> Atoms:
        """A copy with the inputs that orb reads; charge and spin become plain numbers, which extxyz does not return."""
        copy = Atoms(
            numbers=atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc, tags=atoms.get_tags()
        )
        for key in self.info_keys:
            value = np.asarray(atoms.info[key])
            if value.size != 1 or not np.issubdtype(value.dtype, np.number) or not np.isfinite(value):
                raise InputError(f"atoms.info[{key!r}] is {atoms.info[key]!r}; orb wants one finite number.")
            copy.info[key] = value.item()
        return copy

    def _forward(self, batch: Batch, forces: bool, gradients: bool) -> ForwardPass:
        graph = batch.data
        frame_of_atom = torch.repeat_interleave(
            torch.arange(len(graph.n_node), device=graph.n_node.device), graph.n_node
        )
        parameters = list(self._model.parameters()) if gradients else []
        if gradients:
            self._refuse_compiled()
        with _default_dtype(self.dtype), in_the_graph(parameters):
            out = (self._conservative_pass if self._conservative else self._direct_pass)(graph, gradients)
            kept = self._gradients(graph, out, frame_of_atom, parameters) if gradients else None
        out = {name: value.detach() for name, value in out.items()}
        nodes = out["node_features"]
        force_layer = self._force_layer(nodes, graph, out) if not self._conservative else None
        return ForwardPass(
            numbers=graph.atomic_numbers,
            positions=graph.positions.detach(),
            frame_of_atom=frame_of_atom,
            n_atoms_of_frame=graph.n_node,
            energy=out["energy"],
            forces=out["forces"] if forces else None,
            stress=out.get("stress") if forces else None,
            features=nodes,
            energy_layer=self._energy_layer(nodes, graph, out["energy"], frame_of_atom),
            force_layer=force_layer,
            edges=Edges(
                graph.senders,
                graph.receivers,
                -graph.edge_features["vectors"].detach(),  # orb's vectors point from the sender to the receiver
                float(self.calculator.adapter.radius),
            ),
            confidence=self._confidence(out),
            gradients=kept,
            extras={"confidence": out["confidence"]} if "confidence" in out else {},
        )

    def _confidence(self, out: dict[str, Tensor]) -> ConfidenceBins | None:
        if "confidence" not in out:
            return None
        return ConfidenceBins(out["confidence"], self._model.heads["confidence"].bin_edges.detach().clone())

    def _gradients(
        self, graph: Any, out: dict[str, Tensor], frame_of_atom: Tensor, parameters: list[torch.nn.Parameter]
    ) -> Gradients:
        charged = getattr(self._model, "coulomb_module", None) is not None
        kind = _EnergiesOnly if charged and bool(graph.system_features["pbc"].any()) else GraphGradients
        return kind(
            parameters=parameters,
            positions=out["positions"],
            features=out["node_features"],
            energy_features=self._energy_features(out["node_features"], graph, frame_of_atom),
            energy=out["energy"],
            forces=out["forces"],
            frame_of_atom=frame_of_atom,
            strain=out.get("strain"),
        )

    def _refuse_compiled(self) -> None:
        if any(module._compiled_call_impl is not None for module in self._model.modules()):
            raise InputError(
                "this orb model is compiled, and what torch compiles cannot be differentiated twice. Load it with "
                "compile=False to get gradients."
            )

    def _direct_pass(self, graph: Any, keep_graph: bool) -> dict[str, Tensor]:
        """The results of `DirectForcefieldRegressor.predict`, and the node features that it drops."""
        model = self._model
        positions, moving = graph.positions, graph
        if keep_graph:
            moving = graph.clone()
            positions = graph.positions.detach().clone().requires_grad_(True)
            between = positions[graph.receivers] - positions[graph.senders]
            # Adds exactly 0, but makes the vectors differentiable by the positions, which orb does not do here.
            moving.edge_features["vectors"] = graph.edge_features["vectors"] + (between - between.detach())
        nodes = model.model(moving)["node_features"]
        out = {name: head.predict(nodes, graph) for name, head in model.heads.items() if self._wanted(name)}
        if model.pair_repulsion:
            repulsion = model.pair_repulsion_fn(graph)
            for name in out:
                addition = model._get_raw_repulsion(name, repulsion)
                if addition is not None:
                    out[name] = out[name] + addition
            out["repulsion"] = repulsion["forces"]
        self._add_dispersion(out, graph)
        return {"node_features": nodes, "positions": positions} | out

    def _conservative_pass(self, graph: Any, keep_graph: bool) -> dict[str, Tensor]:
        """The results of `ConservativeForcefieldRegressor.predict`, under ASE's names."""
        model = self._model
        copy = graph.clone()
        with _forces_with_a_graph(model) if keep_graph else nullcontext():
            raw = model(copy)
        if "node_features" not in raw:
            raise PotentialMismatch("this orb-models gives no node features from forward; 0.7 does. Install 0.7.")
        out = {
            "energy": model.heads[model.energy_name].absolute_energy(raw[model.energy_name], graph),
            "forces": raw[model.grad_forces_name],
        }
        if model.has_stress:
            out["stress"] = raw[model.grad_stress_name]
        if "confidence" in raw:
            out["confidence"] = torch.softmax(raw["confidence"], dim=-1)
        self._add_dispersion(out, graph)
        leaves = {"positions": copy.node_features["positions"], "strain": copy.system_features["stress_displacement"]}
        return {"node_features": raw["node_features"]} | leaves | out

    def _wanted(self, head: str) -> bool:
        return "stress" not in head or self._model.has_stress

    def _add_dispersion(self, out: dict[str, Tensor], graph: Any) -> None:
        if self._dispersion is None:
            return
        dispersion = self._dispersion.predict(graph)
        for key in ("energy", "forces", "stress"):
            if key in out and key in dispersion:
                out[key] = out[key] + dispersion[key]
        out["repulsion"] = out.get("repulsion", 0) + dispersion["forces"]

    def _energy_layer(self, nodes: Tensor, graph: Any, energy: Tensor, frame_of_atom: Tensor) -> EnergyLayer:
        head = self._model.heads["energy"]
        _, last = _penultimate(head.mlp)
        std, mean = _scale(head.normalizer)
        with torch.no_grad():
            features = self._energy_features(nodes, graph, frame_of_atom)
        weights = torch.cat([last.weight[0], last.bias + mean / std]).detach()
        summed = torch.zeros(len(graph.n_node), dtype=torch.float64, device=nodes.device)
        summed.index_add_(0, frame_of_atom, features.double() @ weights.double())
        return EnergyLayer(features, weights, energy.double() - summed)

    def _energy_features(self, nodes: Tensor, graph: Any, frame_of_atom: Tensor) -> Tensor:
        """(n_atoms, n_last) φ_i, from node features with or without a graph."""
        head = self._model.heads["energy"]
        hidden, _ = _penultimate(head.mlp)
        std, _ = _scale(head.normalizer)
        if isinstance(head, ChargeConditionedEnergyHead):
            inputs = [nodes, self._model.heads["latent_charges"](nodes, graph)]
            if "latent_spins" in self._model.heads:
                inputs.append(self._model.heads["latent_spins"](nodes, graph))
            activations = hidden(torch.cat(inputs, -1))
        else:
            centre = segment_ops.aggregate_nodes(nodes, graph.n_node, reduction="mean")
            at_centre = centre[frame_of_atom]
            value_and_tangent = torch.func.jvp(hidden, (at_centre,), (nodes - at_centre,))
            activations = value_and_tangent[0] + value_and_tangent[1]
        return std * torch.cat([activations, torch.ones_like(activations[:, :1])], 1)

    def _force_layer(self, nodes: Tensor, graph: Any, out: dict[str, Tensor]) -> ForceLayer:
        head = self._model.heads["forces"]
        hidden, last = _penultimate(head.mlp)
        std, _ = _scale(head.normalizer)
        with torch.no_grad():
            features = std * hidden(nodes)
        no_cell = torch.all(graph.system_features["cell"].reshape(-1, 9) == 0, dim=1)
        return ForceLayer(
            features=features,
            weights=last.weight.detach().T,
            base=out.get("repulsion", torch.zeros_like(out["forces"])),
            force_free=head.remove_mean,
            torque_free=no_cell & head.remove_torque_for_nonpbc_systems,
        )

    def _check_last_layer(self) -> None:
        """Checks w·ψ + base = energy and P(φB) + base = forces on a small structure, with an independent base."""
        graph_source = probe_structure(frozenset({1, 6, 7, 8, 14}), self.required_info_keys)
        batch = self.collate([graph_source])
        forward_pass = self.forward(batch)
        graph, model = batch.data, self._model
        head = model.heads["energy"]
        base = head.reference(graph.atomic_numbers, graph.n_node).double()
        if model.pair_repulsion:
            base = base + model.pair_repulsion_fn(graph)["energy"].detach().double()
        if getattr(model, "coulomb_module", None) is not None:
            charges = model.heads["latent_charges"](forward_pass.features, graph)
            base = base + model.coulomb_module(charges, graph)[0].detach().double()
        if self._dispersion is not None:
            base = base + self._dispersion.predict(graph)["energy"].detach().double()
        layer = forward_pass.energy_layer
        psi = forward_pass.sum_over_atoms(layer.features).double()
        deviation = float((psi @ layer.weights.double() + base.detach() - forward_pass.energy.double()).abs().max())
        force_layer = forward_pass.force_layer
        if force_layer is not None:
            assert forward_pass.forces is not None
            raw = force_layer.features @ force_layer.weights
            projected = maybe_remove_net_force_and_torque(
                graph, raw, force_layer.force_free, bool(force_layer.torque_free.any())
            )
            deviation = max(deviation, float((projected + force_layer.base - forward_pass.forces).abs().max()))
        # Random weights and normalisers make energies of any size, so the check is relative to that size.
        size = max(1.0, float(forward_pass.energy.abs().max()), float(psi.abs().max()))
        if not deviation < _IDENTITY_TOLERANCE[self.dtype] * size:
            raise PotentialMismatch(
                f"the last layers of this orb model are not understood: they differ from its energy or forces by "
                f"{deviation:.1e} eV or eV/Å. The architecture is probably newer than this package."
            )


class _EnergiesOnly(GraphGradients):
    """Gradients of a model whose Ewald sum orb-models differentiates only once: its forces have no graph."""

    def of_forces(self, tangents: Tensor) -> Iterator[Tensor]:
        raise InputError(
            "orb's electrostatics of periodic structures give no derivatives of forces by the parameters. Use the "
            "energies, or structures without periodic boundaries."
        )


@contextmanager
def _forces_with_a_graph(model: torch.nn.Module) -> Iterator[None]:
    """Makes the forces that the model derives from its energy differentiable once more."""
    before = model.training
    model.training = True  # only the outermost module: the modules inside stay in inference mode
    try:
        yield
    finally:
        model.training = before


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Sets torch's default dtype, which orb uses for some constants, to the model's, as orb's loaders leave it.

    The whole process has one, so orb models are evaluated by one thread at a time.
    """
    with _DEFAULT_DTYPE, default_dtype(dtype):
        yield


def accepts(calculator: BaseCalculator) -> bool:
    """Whether this backend wraps the calculator."""
    return isinstance(calculator, ORBCalculator)


def wrap(calculator: BaseCalculator) -> OrbBackend:
    """The backend of an `ORBCalculator`."""
    assert isinstance(calculator, ORBCalculator)
    return OrbBackend(calculator)


def _penultimate(mlp: torch.nn.Sequential) -> tuple[torch.nn.Sequential, torch.nn.Linear]:
    """The layers before the last linear map, and that map."""
    layers = list(mlp.children())
    last = max(index for index, layer in enumerate(layers) if isinstance(layer, torch.nn.Linear))
    linear = layers[last]
    assert isinstance(linear, torch.nn.Linear)
    return torch.nn.Sequential(*layers[:last]), linear


def _scale(normalizer: Any) -> tuple[Tensor, Tensor]:
    return normalizer.bn.running_var.sqrt().detach(), normalizer.bn.running_mean.detach()
