"""A closed-form potential: the smallest complete backend, for tests and as a template for new backends.

The energy of an atom is linear in Gaussians of the distances to its neighbours, one set per pair of elements:

    e_i = base_{Z_i} + w·φ_i,    φ_i[p, k] = Σ_j δ(p, {Z_i, Z_j}) exp(-(r_ij - μ_k)² / 2σ²) · f_c(r_ij),

with weights that give a Morse bond for every pair of elements, plus a little noise, so that molecules hold together.
The direct variant has a force head like orb's: F = P(φ^F B), with φ^F_i[p, k] = Σ_j (the same) r̂_ij, where P removes
the net force and, without a cell, the net torque.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import BaseCalculator, Calculator, all_changes
from ase.data import atomic_numbers, covalent_radii
from ase.neighborlist import neighbor_list
from torch import Tensor

from ase_uq.backends._autograd import VOIGT, GraphGradients, in_the_graph
from ase_uq.backends._stochastic_toy import StochasticToy
from ase_uq.backends.base import Backend, Batch
from ase_uq.backends.stochastic import Blip, MemberPasses
from ase_uq.errors import InputError
from ase_uq.forward_pass import Edges, EnergyLayer, ForceLayer, ForwardPass, Gradients

_CENTRES = torch.arange(0.6, 4.0, 0.4, dtype=torch.float64)  # μ_k, Å
_WIDTH = 0.3  # σ, Å
_DEPTH, _STIFFNESS = 0.5, 2.0  # depth and stiffness of the Morse bonds: eV, 1/Å
_FEW = 50_000  # all pairs of atoms and images of so few are looked at in less time than lists of cells are made


@dataclass(frozen=True)
class Graph:
    """Structures as tensors, in the potential's dtype."""

    numbers: Tensor  # (n_atoms,)
    positions: Tensor  # (n_atoms, 3)
    cell: Tensor  # (n_frames, 3, 3)
    frame_of_atom: Tensor  # (n_atoms,)
    n_atoms_of_frame: Tensor  # (n_frames,)
    source: Tensor  # (n_edges,) the neighbour
    target: Tensor  # (n_edges,) the atom that has this neighbour
    shift: Tensor  # (n_edges, 3) lattice vector to the neighbour's image, Å

    def to(self, device: torch.device) -> "Graph":
        """The same graph on another device."""
        return Graph(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def graph_of(frames: Sequence[Atoms], cutoff: float, dtype: torch.dtype) -> Graph:
    """Several structures as one graph, with their neighbour lists."""
    sources, targets, shifts, offset = [], [], [], 0
    for atoms in frames:
        i, j, shift = _neighbours(atoms, cutoff)
        targets.append(i + offset)
        sources.append(j + offset)
        shifts.append(shift)
        offset += len(atoms)
    counts = torch.tensor([len(atoms) for atoms in frames])

    def tensor(arrays: Sequence[np.ndarray], dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(np.concatenate(arrays), dtype=dtype)

    return Graph(
        numbers=tensor([atoms.numbers for atoms in frames], torch.long),
        positions=tensor([atoms.positions for atoms in frames], dtype),
        cell=tensor([atoms.cell.array[None] for atoms in frames], dtype),
        frame_of_atom=torch.repeat_interleave(counts),
        n_atoms_of_frame=counts,
        source=tensor(sources, torch.long),
        target=tensor(targets, torch.long),
        shift=tensor(shifts, dtype),
    )


def _neighbours(atoms: Atoms, cutoff: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Atom, neighbour, and lattice vector to the neighbour's image, of every pair within the cutoff."""
    cell, pbc = atoms.cell.complete(), atoms.pbc
    reciprocal = np.linalg.inv(cell.array).T if cell.rank == 3 else np.zeros((3, 3))
    reach = np.where(pbc, 1 + cutoff * np.linalg.norm(reciprocal, axis=1), 0).astype(int)
    if len(atoms) ** 2 * np.prod(2 * reach + 1.0) > _FEW or (pbc & ~atoms.cell.array.any(1)).any():
        i, j, lattice = neighbor_list("ijS", atoms, cutoff)
        return i, j, lattice @ cell.array
    # Of atoms in the same cell, images further away than that are out of reach.
    home = np.where(pbc, np.floor(atoms.positions @ reciprocal.T), 0)
    images = np.stack(np.meshgrid(*(np.arange(-n, n + 1) for n in reach), indexing="ij"), -1).reshape(-1, 3)
    inside = atoms.positions - home @ cell.array
    apart = inside - inside[:, None]
    square = np.square(apart[:, :, None] + images @ cell.array).sum(3)
    np.einsum("iik->ik", square)[:, len(images) // 2] = np.inf
    i, j, k = np.nonzero(square < cutoff**2)
    return i, j, (images[k] + home[i] - home[j]) @ cell.array


class ToyPotential(torch.nn.Module):
    """The potential as a module: `forward` gives everything that the calculator and the backend need.

    Args:
        elements: Symbols of the elements that it knows.
        direct: Whether forces come from a separate force head instead of the energy's gradient.
        seed: Seed of the noise on the weights.
    """

    cutoff = 4.0

    def __init__(self, elements: Sequence[str] = ("H", "C", "N", "O", "Si"), direct: bool = False, seed: int = 0):
        super().__init__()
        self.direct = direct
        self.numbers = tuple(sorted(atomic_numbers[symbol] for symbol in elements))
        n_elements = len(self.numbers)
        # Row of a pair of elements in the table of features, the same for (a, b) and (b, a).
        first, second = torch.triu_indices(n_elements, n_elements)
        pair = torch.zeros(n_elements, n_elements, dtype=torch.long)
        pair[first, second] = pair[second, first] = torch.arange(len(first))
        self._pair, self._n_pairs = pair, len(first)
        lengths = torch.tensor([covalent_radii[z] for z in self.numbers], dtype=torch.float64)
        bond = (lengths[first] + lengths[second])[:, None]
        stretch = torch.exp(-_STIFFNESS * (_CENTRES - bond))
        morse = _DEPTH * stretch.clamp(max=6.0) * (stretch.clamp(max=6.0) - 2)
        slope = 2 * _STIFFNESS * _DEPTH * stretch.clamp(max=6.0) * (1 - stretch.clamp(max=6.0))
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            return 0.02 * torch.randn(shape, generator=generator, dtype=torch.float64)

        # Each of the two atoms gets half of a bond; 0.53 = spacing / (σ √2π) makes the Gaussians add up to the curve.
        weights = 0.53 * 0.5 * morse
        self.weights = torch.nn.Parameter((weights + noise(*weights.shape)).flatten(), requires_grad=False)
        base = -torch.tensor(self.numbers, dtype=torch.float64)
        self.base = torch.nn.Parameter(base, requires_grad=False)
        if direct:
            # The slope of the bond along r̂; the noise makes the head as little equivariant as orb's.
            forces = torch.kron(0.53 * slope.reshape(-1, 1), torch.eye(3, dtype=torch.float64))
            self.force_weights = torch.nn.Parameter(forces + noise(*forces.shape), requires_grad=False)

    def collate(self, frames: Sequence[Atoms]) -> Graph:
        """Several structures as one graph on the device."""
        return graph_of(frames, self.cutoff, self.weights.dtype).to(self.weights.device)

    def forward(self, graph: Graph, forces: bool = True, keep_graph: bool = False) -> dict[str, Tensor]:
        """Energies, forces, stress, features and the leaf `positions`; detached unless the graph is kept."""
        n_frames = len(graph.n_atoms_of_frame)
        conservative = forces and not self.direct
        strain = torch.zeros(n_frames, 3, 3, dtype=graph.positions.dtype, device=graph.positions.device)
        positions = graph.positions.clone().requires_grad_(conservative or keep_graph)
        strain.requires_grad_(conservative or keep_graph)
        with torch.set_grad_enabled(conservative or keep_graph):
            vectors = positions[graph.source] - positions[graph.target] + graph.shift
            deformed = (strain + strain.mT) / 2
            vectors = vectors + torch.einsum("ex,exy->ey", vectors, deformed[graph.frame_of_atom[graph.target]])
            distance = vectors.norm(dim=1)
            phi = self._sum_over_neighbours(graph, distance, torch.ones_like(distance)[:, None])[:, :, 0]
            kinds = torch.as_tensor(self.numbers, device=phi.device)
            isolated = self.base[torch.searchsorted(kinds, graph.numbers)]
            energies = isolated + phi @ self.weights
            energy = torch.zeros_like(graph.cell[:, 0, 0]).index_add(0, graph.frame_of_atom, energies)
        base = torch.zeros_like(energy).index_add(0, graph.frame_of_atom, isolated)
        with torch.set_grad_enabled(keep_graph):
            arrows = self._sum_over_neighbours(graph, distance, vectors / distance[:, None])
            # The norm of the sum of the neighbours' directions: 0 at the centre of symmetric surroundings.
            features = torch.cat([phi, arrows.sum(1).norm(dim=1, keepdim=True)], 1)
            out = {"energy": energy, "energies": energies, "phi": phi, "base": base, "features": features}
            out |= {"positions": positions, "strain": strain, "vectors": vectors, "arrows": arrows}
            if self.direct:
                out["force_phi"] = arrows.flatten(1)
                out["forces"] = _without_rigid_motion(out["force_phi"] @ self.force_weights, graph)
        if conservative:
            slope, virial = torch.autograd.grad(energy.sum(), (positions, strain), create_graph=keep_graph)
            volume = torch.linalg.det(graph.cell).abs()
            # Structures without a volume have no stress.
            stress = virial / torch.where(volume > 0, volume, torch.inf)[:, None, None]
            voigt = stress.reshape(n_frames, 9)[:, VOIGT]
            out |= {"forces": -slope, "stress": voigt}
        return out if keep_graph else {name: value.detach() for name, value in out.items()}

    def _sum_over_neighbours(self, graph: Graph, distance: Tensor, values: Tensor) -> Tensor:
        """(n_edges, m) → (n_atoms, n_pairs * n_centres, m): sum over neighbours j of Gaussians times values."""
        centres = _CENTRES.to(distance)
        envelope = 0.5 * (1 + torch.cos(torch.pi * (distance / self.cutoff).clamp(max=1)))
        gaussians = torch.exp(-((distance[:, None] - centres) ** 2) / (2 * _WIDTH**2)) * envelope[:, None]
        kinds = torch.as_tensor(self.numbers, device=distance.device)
        kind = torch.searchsorted(kinds, graph.numbers)
        row = graph.target * self._n_pairs + self._pair.to(distance.device)[kind[graph.target], kind[graph.source]]
        shape = (len(graph.numbers) * self._n_pairs, len(centres), values.shape[1])
        total = torch.zeros(shape, dtype=distance.dtype, device=distance.device)
        total = total.index_add(0, row, gaussians[:, :, None] * values[:, None, :])
        return total.reshape(len(graph.numbers), self._n_pairs * len(centres), values.shape[1])


class ToyCalculator(Calculator):
    """ASE calculator of a `ToyPotential`.

    Args:
        elements: Symbols of elements, as in `ToyPotential`.
        direct: Whether there is a force head, as in `ToyPotential`. A direct model has no stress.
        seed: Seed, as in `ToyPotential`.
        device: Device to run on.
        dtype: Precision, `float64` or `float32`.
    """

    def __init__(
        self,
        elements: Sequence[str] = ("H", "C", "N", "O", "Si"),
        *,
        direct: bool = False,
        seed: int = 0,
        device: str = "cpu",
        dtype: str = "float64",
    ) -> None:
        super().__init__()
        self.potential = ToyPotential(elements, direct, seed).to(device, getattr(torch, dtype))
        self.implemented_properties = ["energy", "free_energy", "energies", "forces"] + ["stress"] * (not direct)

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Fills `results` for one structure."""
        super().calculate(atoms, list(properties), list(system_changes))
        assert self.atoms is not None  # the copy that ASE just made
        out = self.potential(self.potential.collate([self.atoms]))
        energy = float(out["energy"])
        self.results = {"energy": energy, "free_energy": energy}
        self.results |= {key: out[key].cpu().numpy() for key in ("energies", "forces")}
        if not self.potential.direct:
            self.results["stress"] = out["stress"][0].cpu().numpy()


class ToyBackend(Backend):
    """A `ToyCalculator` whose features are kept."""

    name = "toy"

    def __init__(self, calculator: ToyCalculator) -> None:
        self.calculator = calculator
        self._potential = calculator.potential
        self.direct = self._potential.direct
        self.elements = frozenset(self._potential.numbers)
        self.results = tuple(calculator.implemented_properties)

    @property
    def device(self) -> torch.device:
        return self._potential.weights.device

    @property
    def dtype(self) -> torch.dtype:
        return self._potential.weights.dtype

    @property
    def is_concurrent(self) -> bool:
        return True

    def _modules(self) -> Sequence[torch.nn.Module]:
        return [self._potential]

    def _settings(self) -> dict[str, Any]:
        return {
            "package": "toy",
            "elements": sorted(self.elements),
            "direct": self._potential.direct,
            "cutoff": self._potential.cutoff,
            "features": "Gaussians, norm of the directions; v1",
        }

    def stochastic(self) -> StochasticToy:
        if self.direct:
            raise InputError("weights of a direct force head cannot be drawn. Use a conservative potential.")
        return StochasticToy(copy.deepcopy(self._potential))

    def _with_blip(self, blip: Blip) -> "ToyBackend":
        calculator = copy.deepcopy(self.calculator)
        blip.put(calculator.potential)
        return StochasticToyBackend(calculator, blip)

    def _collate(self, frames: Sequence[Atoms]) -> Graph:
        return self._potential.collate(frames)

    def _build(self) -> Callable[[Sequence[Atoms]], Graph]:
        return partial(graph_of, cutoff=self._potential.cutoff, dtype=self.dtype)

    def _placed(self, data: Graph) -> Graph:
        return data.to(self.device)

    def _forward(self, batch: Batch, forces: bool, gradients: bool) -> ForwardPass:
        graph: Graph = batch.data
        parameters = list(self._potential.parameters()) if gradients else []
        with in_the_graph(parameters):
            out = self._potential(graph, forces=forces, keep_graph=gradients)
            kept = self._gradients(graph, out, parameters) if gradients else None
        out = {name: value.detach() for name, value in out.items()}
        return ForwardPass(
            numbers=graph.numbers,
            positions=graph.positions,
            frame_of_atom=graph.frame_of_atom,
            n_atoms_of_frame=graph.n_atoms_of_frame,
            energy=out["energy"],
            energies=out["energies"],
            forces=out.get("forces") if forces else None,
            stress=out.get("stress"),
            features=out["features"],
            energy_layer=EnergyLayer(out["phi"], self._potential.weights.detach(), out["base"]),
            force_layer=self._force_layer(graph, out) if self._potential.direct else None,
            edges=Edges(graph.source, graph.target, out["vectors"], self._potential.cutoff),
            vectors=out["arrows"].mT,
            gradients=kept,
        )

    def _gradients(self, graph: Graph, out: dict[str, Tensor], parameters: list[torch.nn.Parameter]) -> Gradients:
        return GraphGradients(
            parameters=parameters,
            positions=out["positions"],
            features=out["features"],
            energy_features=out["phi"],
            energy=out["energy"],
            forces=out.get("forces"),
            frame_of_atom=graph.frame_of_atom,
            strain=out["strain"],
        )

    def _force_layer(self, graph: Graph, out: dict[str, Tensor]) -> ForceLayer:
        return ForceLayer(
            features=out["force_phi"],
            weights=self._potential.force_weights.detach(),
            base=torch.zeros_like(graph.positions),
            force_free=True,
            torque_free=_without_cell(graph),
        )


class StochasticToyBackend(ToyBackend):
    """A `ToyCalculator` with the predictions of members beside its own."""

    def __init__(self, calculator: ToyCalculator, blip: Blip) -> None:
        super().__init__(calculator)
        self._blip = blip
        self._members = MemberPasses(StochasticToy(self._potential), blip, self.device)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), **self._blip.settings}

    @property
    def is_concurrent(self) -> bool:
        return False  # draws of all members fill the memory, and the cores

    @property
    def _trained_settings(self) -> tuple[str, ...]:
        return ("blip_rates",)

    def _forward(self, batch: Batch, forces: bool, gradients: bool) -> ForwardPass:
        return self._members.beside(super()._forward(batch, forces, gradients), batch, forces)


def accepts(calculator: BaseCalculator) -> bool:
    """Whether this backend wraps the calculator."""
    return isinstance(calculator, ToyCalculator)


def wrap(calculator: BaseCalculator) -> ToyBackend:
    """The backend of a `ToyCalculator`."""
    assert isinstance(calculator, ToyCalculator)
    return ToyBackend(calculator)


def load(prefix: str, target: str, device: str, dtype: str) -> ToyCalculator:
    """The calculator that a SPEC names: `toy:` or `toy:direct`."""
    if target not in ("", "direct"):
        raise ValueError(f"there is no toy potential {target!r}. Use toy: or toy:direct.")
    return ToyCalculator(direct=target == "direct", device=device or "cpu", dtype=dtype or "float64")


def _without_cell(graph: Graph) -> Tensor:
    return (graph.cell == 0).all(dim=(1, 2))


def _without_rigid_motion(forces: Tensor, graph: Graph) -> Tensor:
    """The projection P: removes the net force of every structure, and the net torque if it has no cell."""
    forces = forces.clone()
    for frame, no_cell in enumerate(_without_cell(graph).tolist()):
        in_frame = graph.frame_of_atom == frame
        forces[in_frame] -= forces[in_frame].mean(0)
        if no_cell:
            arms = graph.positions[in_frame] - graph.positions[in_frame].mean(0)
            inertia = (arms**2).sum() * torch.eye(3).to(arms) - arms.T @ arms
            torque = torch.linalg.cross(arms, forces[in_frame]).sum(0)
            # Pseudo-inverse: a linear molecule cannot rotate about its axis, and a single atom not at all.
            rotation = torch.linalg.pinv(inertia, rtol=1e-6, hermitian=True) @ torque
            forces[in_frame] -= torch.linalg.cross(rotation.expand_as(arms), arms)
    return forces
