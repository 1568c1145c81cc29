"""SevenNet potentials (sevenn 0.10): any `SevenNetCalculator` of a checkpoint, among them SevenNet-0.

The layers of the model are called one after the other, as `AtomGraphSequential` does, because its results hold the
features of no layer but the last. Behind the last one the energy of an atom is linear in its scalars x_i,

    e_i = s_z (x_i W_1 W_2 + b) + E_z,      φ_i = s_z x_i,      w = W_1 W_2,

with scales s and shifts E of the elements. Source: NequIP (Batzner et al. 2022) and SevenNet (Park et al. 2024); the
identity is checked numerically for every model that is wrapped.

Importing this module imports sevenn and leaves torch's safe loading as it is.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import BaseCalculator, Calculator
from torch import Tensor

from ase_uq.backends._autograd import GraphGradients, in_the_graph
from ase_uq.backends._process import preserved_process
from ase_uq.backends.base import Backend, Batch
from ase_uq.backends.identity import probe_structure
from ase_uq.errors import PotentialMismatch, did_you_mean
from ase_uq.forward_pass import Edges, EnergyLayer, ForwardPass

# e3nn 0.4 reads constants from a file in which torch's safe loading finds a slice.
with preserved_process(), torch.serialization.safe_globals([slice]):
    from sevenn import _keys as key
    from sevenn.calculator import SevenNetCalculator
    from sevenn.nn.force_output import ForceStressOutputFromEdge
    from sevenn.nn.linear import AtomReduce
    from sevenn.nn.sequential import AtomGraphSequential
    from sevenn.train.dataload import unlabeled_atoms_to_graph
    from sevenn.util import pretrained_name_to_path

_CARRIED = tuple(
    f"{package}-{model}" for package in ("7net", "sevennet") for model in ("0", "0_11july2024", "0_22may2024", "l3i5")
)
# eV, for float32 energies of atoms; a wrong last layer is off by tenths of an eV.
_IDENTITY_TOLERANCE = 1e-3
# ASE's order of stress components among those of sevenn: xx, yy, zz, xy, yz, zx.
_VOIGT = [0, 1, 2, 4, 5, 3]


@dataclass(frozen=True)
class _Out:
    """What a pass through the layers gives, with a graph if one is kept."""

    positions: Tensor
    strain: Tensor
    layers: list[Tensor]  # features behind each interaction
    kinds: Tensor  # indices of the elements in the model
    energies: Tensor
    energy: Tensor
    forces: Tensor | None
    stress: Tensor | None


class SevenNetBackend(Backend):
    """A `SevenNetCalculator` whose features are kept.

    Structures without a volume have the stress that sevenn gives for them, which has no meaning.

    Args:
        calculator: The user's calculator. Its model and device are used unchanged.

    Raises:
        TypeError: The calculator's model is a TorchScript archive, has a readout with hidden layers, or forces that
            are not taken from its edges.
        PotentialMismatch: `w·φ_i + base_i` differs from the model's own energies of the atoms.
    """

    name = "sevennet"
    results = ("energy", "free_energy", "energies", "forces", "stress")

    def __init__(self, calculator: SevenNetCalculator) -> None:
        model: Any = calculator.model
        if not isinstance(model, AtomGraphSequential):
            raise TypeError(
                "TorchScript SevenNet models are not supported. Use the checkpoint (.pth) it was deployed from."
            )
        named: dict[str, Any] = dict(model.named_children())
        if not {"reduce_input_to_hidden", "reduce_hidden_to_energy", "rescale_atomic_energy"} <= named.keys():
            raise TypeError(
                "SevenNet models with a readout_as_fcn are not supported: their energy is not linear in the features "
                "of the last interaction."
            )
        if not isinstance(named.get("force_output"), ForceStressOutputFromEdge):
            raise TypeError(
                f"SevenNet models with a {type(named.get('force_output')).__name__} are not supported: their forces "
                "are not taken from the edges, as those of a checkpoint are."
            )
        self.calculator = calculator
        known: Any = calculator.type_map
        self._kinds: dict[int, int] = {int(z): int(kind) for z, kind in known.items()}
        self.elements = frozenset(z for z in self._kinds if z > 0)
        self._layers = named
        self._irreps = [list(m.gate.irreps_out) for name, m in named.items() if name.endswith("_equivariant_gate")]
        self._rescale = named["rescale_atomic_energy"]
        first, offset = _effective_weights(named["reduce_input_to_hidden"].linear)
        second, second_offset = _effective_weights(named["reduce_hidden_to_energy"].linear)
        self._weights, self._offset = (first @ second)[:, 0], (offset @ second + second_offset)[0]
        self._check_last_layer()

    @property
    def device(self) -> torch.device:
        return next(self.calculator.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.calculator.model.parameters()).dtype

    @property
    def is_concurrent(self) -> bool:
        return True

    def _modules(self) -> Sequence[torch.nn.Module]:
        return [self.calculator.model]

    def _settings(self) -> dict[str, Any]:
        embedding: Any = self.calculator.model.edge_embedding
        envelope = embedding.cutoff_function
        return {
            "package": "sevenn",
            "cutoff": float(self.calculator.cutoff),
            "elements": sorted(self._kinds, key=self._kinds.__getitem__),
            "interactions": [" + ".join(map(str, irreps)) for irreps in self._irreps],
            "edges": f"{embedding.spherical.irreps_out}, normalized: {embedding.spherical.sph.normalize}",
            "envelope": [type(envelope).__name__, *(v for v in vars(envelope).values() if type(v) in (int, float))],
            "features": "scalars of all layers, norms of equivariant channels; v1",
        }

    def _collate(self, frames: Sequence[Atoms]) -> Any:
        return self._placed(self._build()(frames))

    def _build(self) -> Callable[[Sequence[Atoms]], Any]:
        kinds = np.zeros(max(self.elements) + 1, dtype=np.int64)
        for z in self.elements:
            kinds[z] = self._kinds[z]
        return partial(_graphs_of, cutoff=self.calculator.cutoff, kinds=kinds)

    def _placed(self, data: Any) -> Any:
        return {name: value.to(self.device) for name, value in data.items()}

    def _forward(self, batch: Batch, forces: bool, gradients: bool) -> ForwardPass:
        graph = batch.data
        frame_of_atom = graph[key.BATCH]
        parameters = list(self.calculator.model.parameters()) if gradients else []
        with in_the_graph(parameters):
            out = self._pass(graph, forces, gradients)
            kept = None
            if gradients:
                kept = GraphGradients(
                    parameters=parameters,
                    positions=out.positions,
                    features=self._latent(out.layers),
                    energy_features=self._last_layer(out),
                    energy=out.energy,
                    forces=out.forces,
                    frame_of_atom=frame_of_atom,
                    strain=out.strain,
                )
        with torch.no_grad():
            phi, features = self._last_layer(out), self._latent(out.layers)
        energy = out.energy.detach()
        summed = torch.zeros(len(energy), dtype=torch.float64, device=phi.device)
        summed.index_add_(0, frame_of_atom, (phi @ self._weights).double())
        target, source = graph[key.EDGE_IDX]
        return ForwardPass(
            numbers=graph[key.ATOMIC_NUMBERS],
            positions=graph[key.POS],
            frame_of_atom=frame_of_atom,
            n_atoms_of_frame=graph[key.NUM_ATOMS],
            energy=energy,
            energies=out.energies.detach(),
            forces=None if out.forces is None else out.forces.detach(),
            stress=None if out.stress is None else out.stress.detach(),
            features=features,
            energy_layer=EnergyLayer(phi, self._weights, energy.double() - summed),
            edges=Edges(source, target, graph[key.EDGE_VEC], float(self.calculator.cutoff)),
            vectors=self._vectors(out.layers[0].detach()),
            gradients=kept,
        )

    def _pass(self, graph: dict[str, Tensor], forces: bool, keep_graph: bool) -> _Out:
        """Calls layer by layer; the last two behave differently for several structures than for one."""
        data, layers = dict(graph), []
        several = len(graph[key.NUM_ATOMS]) > 1
        positions, vectors = graph[key.POS], graph[key.EDGE_VEC].detach()
        strain = vectors.new_zeros(len(graph[key.NUM_ATOMS]), 3, 3)
        if keep_graph:
            positions = positions.clone().requires_grad_(True)
            strain.requires_grad_(True)
            here, there = graph[key.EDGE_IDX]
            between = positions[there] - positions[here]
            # Adds exactly 0, but makes the vectors differentiable by positions and strain, which sevenn does not need.
            stretch = torch.einsum("ex,exy->ey", vectors, ((strain + strain.mT) / 2)[graph[key.BATCH][here]])
            vectors = vectors + (between - between.detach()) + stretch
        elif forces:
            vectors.requires_grad_(True)
        data[key.EDGE_VEC] = vectors
        with torch.set_grad_enabled(forces or keep_graph):
            for name, module in self._layers.items():
                if isinstance(module, AtomReduce | ForceStressOutputFromEdge):
                    if isinstance(module, ForceStressOutputFromEdge) and not forces:
                        continue
                    module = _with_flags(module, several, keep_graph)
                data = module(data)
                if name.endswith("_equivariant_gate"):
                    layers.append(data[key.NODE_FEATURE])
        return _Out(
            positions=positions,
            strain=strain,
            layers=layers,
            kinds=data[key.ATOM_TYPE],
            energies=data[key.ATOMIC_ENERGY].reshape(-1),
            energy=data[key.PRED_TOTAL_ENERGY].reshape(-1),
            forces=data[key.PRED_FORCE] if forces else None,
            stress=-data[key.PRED_STRESS].reshape(-1, 6)[:, _VOIGT] if forces else None,
        )

    def _of_kinds(self, values: Tensor, kinds: Tensor) -> Tensor:
        """(n_atoms,) scale or shift of each atom; some models have one for all elements."""
        return values[kinds] if len(values) > 1 else values.expand(len(kinds))

    def _last_layer(self, out: _Out) -> Tensor:
        """(n_atoms, n_last) φ_i."""
        return self._of_kinds(self._rescale.scale, out.kinds)[:, None] * out.layers[-1]

    def _latent(self, layers: list[Tensor]) -> Tensor:
        """Scalars of all layers, then norms of the equivariant channels of all layers."""
        scalars, norms = [], []
        for irreps, features in zip(self._irreps, layers, strict=True):
            for (channels, kind), block in zip(irreps, _blocks(irreps, features), strict=True):
                if kind.l == 0:
                    scalars.append(block)
                else:
                    norms.append(block.reshape(len(block), channels, kind.dim).norm(dim=2))
        return torch.cat([*scalars, *norms], 1)

    def _vectors(self, features: Tensor) -> Tensor | None:
        """(n_atoms, 3, n_vectors) channels of order 1 in the first layer; e3nn orders their components x, y, z.

        They are sums over neighbours of scalars times directions, hence polar, also in models that know no parity.
        """
        irreps = self._irreps[0]
        found = [
            block.reshape(len(block), channels, 3).mT
            for (channels, kind), block in zip(irreps, _blocks(irreps, features), strict=True)
            if kind.l == 1
        ]
        return torch.cat(found, 2) if found else None

    def _check_last_layer(self) -> None:
        """Checks w·φ_i + base_i = e_i on a structure with many elements, with an independently computed base."""
        graph = self.collate([probe_structure(self.elements, ())]).data
        out = self._pass(graph, forces=False, keep_graph=False)
        with torch.no_grad():
            shift = self._of_kinds(self._rescale.shift, out.kinds)
            base = shift + self._of_kinds(self._rescale.scale, out.kinds) * self._offset
            deviation = float((self._last_layer(out) @ self._weights + base - out.energies).abs().max())
        if not deviation < _IDENTITY_TOLERANCE:
            raise PotentialMismatch(
                f"the last layer of this SevenNet model is not understood: w·φ + base differs from its energies of "
                f"atoms by {deviation:.1e} eV. Its architecture is probably newer than this package."
            )


def accepts(calculator: BaseCalculator) -> bool:
    """Whether this backend wraps the calculator."""
    return isinstance(calculator, SevenNetCalculator)


def wrap(calculator: BaseCalculator) -> SevenNetBackend:
    """The backend of a `SevenNetCalculator`."""
    assert isinstance(calculator, SevenNetCalculator)
    with preserved_process():
        return SevenNetBackend(calculator)


def load(prefix: str, target: str, device: str, dtype: str) -> Calculator:
    """The calculator that a SPEC names: `sevennet:NAME` or `sevennet:PATH`.

    NAME is a model that the package sevenn carries; nothing is downloaded. PATH is a checkpoint (`.pth`) that its
    training writes. A checkpoint is a pickle: loading it runs code, so load only files that you trust.

    Raises:
        ValueError: sevenn carries no model of that name and there is no such file, or float64 is asked for.
    """
    if dtype == "float64":
        raise ValueError("SevenNet potentials run in float32 only, as sevenn builds them. Leave dtype out.")
    if Path(target).is_file():
        path = target
    elif target.lower() in _CARRIED:
        path = pretrained_name_to_path(target)
    else:
        raise ValueError(
            f"sevenn carries no model {target!r}, and there is no checkpoint of that name."
            f"{did_you_mean(target, _CARRIED)} It carries {', '.join(_CARRIED)}."
        )
    with preserved_process():
        torch.set_default_dtype(torch.float32)  # the weights of a new model have the default one
        return SevenNetCalculator(path, device=device)


def _with_flags(module: Any, several: bool, keep_graph: bool) -> Any:
    """A copy for several structures or for one, whose forces have a graph or none; threads may share the original."""
    module = copy.copy(module)
    module._is_batch_data, module.training = several, keep_graph
    return module


def _graphs_of(frames: Sequence[Atoms], *, cutoff: float, kinds: np.ndarray) -> dict[str, Tensor]:
    """The batch of structures, as sevenn builds the graph of one, on the CPU."""
    graphs = [unlabeled_atoms_to_graph(atoms, cutoff) for atoms in frames]
    counts = [len(atoms) for atoms in frames]
    starts = np.cumsum([0, *counts[:-1]])

    def joined(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([graph[name] for graph in graphs])).float()

    edges = [graph[key.EDGE_IDX] + start for graph, start in zip(graphs, starts, strict=True)]
    numbers = np.concatenate([atoms.numbers for atoms in frames])
    return {
        key.ATOMIC_NUMBERS: torch.from_numpy(numbers),
        key.NODE_FEATURE: torch.from_numpy(kinds[numbers]),
        key.POS: joined(key.POS),
        key.EDGE_IDX: torch.from_numpy(np.concatenate(edges, axis=1)),
        key.EDGE_VEC: joined(key.EDGE_VEC),
        key.CELL_VOLUME: torch.tensor([float(graph[key.CELL_VOLUME]) for graph in graphs], dtype=torch.float32),
        key.NUM_ATOMS: torch.tensor(counts),
        key.BATCH: torch.from_numpy(np.repeat(np.arange(len(frames)), counts)),
    }


def _blocks(irreps: list[Any], features: Tensor) -> tuple[Tensor, ...]:
    """The columns of each irreducible representation."""
    return torch.split(features, [channels * kind.dim for channels, kind in irreps], 1)


def _effective_weights(linear: Any) -> tuple[Tensor, Tensor]:
    """(n_in, n_out) matrix and (1, n_out) offset of a linear map, with the path normalisation its weights lack."""
    weight = next(linear.parameters())
    width = linear.irreps_in.dim
    with torch.no_grad():
        offset = linear(torch.zeros(1, width, dtype=weight.dtype, device=weight.device))
        return linear(torch.eye(width, dtype=weight.dtype, device=weight.device)) - offset, offset
