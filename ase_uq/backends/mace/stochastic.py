"""MACE with drawn weights: the linear maps of messages and of updates, each weight with a noise of its own.

Weights of e3nn's linear maps are scalars: a path (channel in, channel out) multiplies all 2l + 1 components of a
channel by the same number. With noise of the weights that all atoms of a structure share, every member is thus exactly
as equivariant as the potential. Drawn are, in each interaction, its linear maps and the last layer of the radial
network (messages), and the linear map of its product basis (updates). Per structure,

    y = W(θ) x + √α(G) W(θ ∘ ε) x,

exact, since maps are linear in their weights: copies of a batch, one a member, are one batch, and each map adds to
what the plain one gives. α is a function of the mean over the atoms of [element] ⊗ [1, Σ_j R_k(r_ij)], R_k the
potential's own radial functions, which no noise has reached; it is in the graph, so forces are the gradients of each
member's energy.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from mace.calculators import MACECalculator
from torch import Tensor

from ase_uq.backends.base import Batch
from ase_uq.backends.mace.backend import MACEBackend, voigt
from ase_uq.backends.mace.readout import plain_module
from ase_uq.backends.stochastic import Blip, Drawn, MemberPasses, StochasticModel
from ase_uq.errors import InputError
from ase_uq.forward_pass import ForwardPass
from ase_uq.numerics.variational import Rates


class StochasticMACE(StochasticModel):
    """A MACE whose weights can be drawn.

    Args:
        backend: Backend of the potential, for its units and its inputs.
        model: Its model, or a copy of it.

    Raises:
        InputError: The model has no linear maps of e3nn.
    """

    def __init__(self, backend: MACEBackend, model: torch.nn.Module) -> None:
        self._backend, self._model = backend, model
        self._found = list(_drawn_maps(model))
        if not any(_is_equivariant(module) for _, _, module in self._found):
            raise InputError(
                "this MACE model has no linear maps of e3nn whose weights could be drawn: it was converted to "
                "accelerated kernels. Load the .model file as it was trained."
            )
        self.layers = tuple((group, _n_weights(module)) for _, group, module in self._found)

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return dict(self._model.named_parameters())

    def invariants(self, batch: Batch) -> Tensor:
        data = self._backend._inputs(batch.data, self._model)
        model: Any = self._model
        source, target = data["edge_index"]
        lengths = (data["positions"][target] - data["positions"][source] + data["shifts"]).norm(dim=1, keepdim=True)
        with torch.no_grad():
            radial = model.radial_embedding(lengths, data["node_attrs"], data["edge_index"], model.atomic_numbers)
        return _invariants(radial, data["node_attrs"], data["edge_index"], data["batch"], len(batch.frames))

    def draw(
        self, batch: Batch, rates: Rates, noise: Sequence[Tensor], *, forces: bool = True, training: bool = False
    ) -> Drawn:
        n_members, n_frames = len(noise[0]), len(batch.frames)
        n_atoms = sum(len(atoms) for atoms in batch.frames)
        data = _copies(self._backend._inputs(batch.data, self._model), n_members, n_atoms, n_frames)
        alphas = _Alphas(rates, data["batch"], n_members * n_frames)
        model = self._perturbed(alphas, noise)
        if forces:
            out = model(data, compute_stress=True, training=training)
        else:
            with torch.set_grad_enabled(training):
                out = model(data, compute_force=False)
        energy_unit = self._backend.calculator.energy_units_to_eV
        length_unit = self._backend.calculator.length_units_to_A
        force_unit, stress_unit = energy_unit / length_unit, energy_unit / length_unit**3
        return Drawn(
            energy=out["energy"].reshape(n_members, n_frames) * energy_unit,
            forces=out["forces"].reshape(n_members, n_atoms, 3) * force_unit if forces else None,
            stress=voigt(out["stress"]).reshape(n_members, n_frames, 6) * stress_unit if forces else None,
            rates=alphas.values[:n_frames],
        )

    def _perturbed(self, alphas: "_Alphas", noise: Sequence[Tensor]) -> Any:
        """The model with these noises: a shell of its own around the same weights, so that no other thread sees it."""
        replaced: dict[str, torch.nn.Module] = {
            path: _PerturbedMap(module, group, epsilon, alphas)
            for (path, group, module), epsilon in zip(self._found, noise, strict=True)
        }
        replaced["radial_embedding"] = _RadialEmbedding(self._model.get_submodule("radial_embedding"), alphas)
        return _with(self._model, replaced)


class StochasticMACEBackend(MACEBackend):
    """A `MACECalculator` with the predictions of members beside its own.

    Args:
        calculator: The calculator, with the weights of `blip`.
        blip: Rates, number of members and seed.
    """

    _members: MemberPasses | None = None  # of the passes that check the potential when it is wrapped

    def __init__(self, calculator: MACECalculator, blip: Blip) -> None:
        super().__init__(calculator)
        self._blip = blip
        (model,) = self._modules()
        self._members = MemberPasses(StochasticMACE(self, model), blip, self.device)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), **self._blip.settings}

    @property
    def is_concurrent(self) -> bool:
        return False  # draws of all members fill the memory, and the cores

    @property
    def _trained_settings(self) -> tuple[str, ...]:
        return (*super()._trained_settings, "blip_rates")

    def _forward(self, batch: Batch, forces: bool, gradients: bool) -> ForwardPass:
        plain = super()._forward(batch, forces, gradients)
        return plain if self._members is None else self._members.beside(plain, batch, forces)


def with_blip(backend: MACEBackend, blip: Blip) -> StochasticMACEBackend:
    """The backend of a copy of the calculator with the weights of `blip`."""
    model = copied_model(backend)
    blip.put(model)
    calculator = copy.copy(backend.calculator)
    calculator.models, calculator.atoms, calculator.results = [model], None, {}
    return StochasticMACEBackend(calculator, blip)


def copied_model(backend: MACEBackend) -> Any:
    """A copy of the potential's model, whose weights may be changed.

    `copy.deepcopy` would compile all that e3nn has generated once more.

    Raises:
        InputError: The potential is a committee, or compiled.
    """
    model, *others = backend.calculator.models
    if others:
        raise InputError(
            f"these are {1 + len(others)} MACE models, and weights are drawn about those of one. Give one .model file."
        )
    if plain_module(model) is not model:
        raise InputError(
            "this MACE model is compiled, and its weights cannot be drawn. Make its MACECalculator without "
            "compile_mode."
        )
    copies: dict[int, torch.nn.Parameter] = {}

    def own(weight: torch.nn.Parameter) -> torch.nn.Parameter:
        if id(weight) not in copies:
            copies[id(weight)] = torch.nn.Parameter(weight.detach().clone(), weight.requires_grad)
        return copies[id(weight)]

    def copied(module: Any) -> Any:
        if module is None or not any(True for _ in module.parameters()):
            return module
        other = _shell(module, {name: copied(child) for name, child in module._modules.items()})
        vars(other)["_parameters"] = {
            name: weight if weight is None else own(weight) for name, weight in module._parameters.items()
        }
        return other

    return copied(model)


class _Alphas:
    """α of a pass: written where the radial functions are known, read where weights are drawn.

    Args:
        rates: α of each group.
        frame_of_atom: (n_rows,) copy of the structure that each atom belongs to.
        n_frames: Number of copies of structures.
    """

    values: Tensor
    frame_of_edge: Tensor

    def __init__(self, rates: Rates, frame_of_atom: Tensor, n_frames: int) -> None:
        self.rates, self.frame_of_atom, self.n_frames = rates, frame_of_atom, n_frames

    def set(self, radial: Any, node_attrs: Tensor, edge_index: Tensor) -> None:
        invariants = _invariants(radial, node_attrs, edge_index, self.frame_of_atom, self.n_frames)
        self.values = self.rates(invariants)
        self.frame_of_edge = self.frame_of_atom[edge_index[1]]

    def scale(self, group: str, of_edges: bool, like: Tensor) -> Tensor:
        """(n_rows, 1) √α of the structure of each atom or edge."""
        root = self.values[:, self.rates.groups.index(group)].sqrt().to(like)
        return root[self.frame_of_edge if of_edges else self.frame_of_atom][:, None]


class _RadialEmbedding(torch.nn.Module):
    """The radial functions, of which α is made in passing."""

    def __init__(self, inner: torch.nn.Module, alphas: _Alphas) -> None:
        super().__init__()
        self._inner, self._alphas = inner, alphas

    def forward(self, lengths: Tensor, node_attrs: Tensor, edge_index: Tensor, atomic_numbers: Tensor) -> Any:
        radial = self._inner(lengths, node_attrs, edge_index, atomic_numbers)
        self._alphas.set(radial, node_attrs, edge_index)
        return radial


class _PerturbedMap(torch.nn.Module):
    """A linear map of atoms or edges, with the noise of each member on its weights."""

    def __init__(self, inner: Any, group: str, noise: Tensor, alphas: _Alphas) -> None:
        super().__init__()
        self._inner, self._group, self._noise, self._alphas = inner, group, noise, alphas
        self._of_edges = not _is_equivariant(inner)

    def forward(self, features: Tensor) -> Tensor:
        plain = self._inner(features)
        rows = features.reshape(len(self._noise), -1, features.shape[-1])
        weights = self._inner.weight.flatten() * self._noise
        drawn = _applied(self._inner, rows, weights).reshape(plain.shape)
        return plain + self._alphas.scale(self._group, self._of_edges, plain) * drawn


def _applied(module: Any, rows: Tensor, weights: Tensor) -> Tensor:
    """(n_members, n, n_in), (n_members, n_weights) → (n_members, n, n_out): the map without a bias."""
    if isinstance(module, torch.nn.Linear):
        return rows @ weights.unflatten(1, module.weight.shape).mT
    if not _is_equivariant(module):
        norm = (module.h_in * module.var_in / module.var_out) ** 0.5
        return rows @ (weights.unflatten(1, module.weight.shape) / norm)
    inputs, outputs = (irreps.slices() for irreps in (module.irreps_in, module.irreps_out))
    blocks: list[Any] = [None] * len(outputs)
    for number, path in enumerate(module.instructions):
        dim = module.irreps_out[path.i_out].ir.dim
        channels = rows[..., inputs[path.i_in]].unflatten(-1, (-1, dim))
        matrix = path.path_weight * module.weight_view_for_instruction(number, weights)
        part = torch.einsum("tnum,tuv->tnvm", channels, matrix).flatten(2)
        blocks[path.i_out] = part if blocks[path.i_out] is None else blocks[path.i_out] + part
    # Outputs that no path leads to are 0.
    zeros = rows.new_zeros(*rows.shape[:2], 1)
    filled = [
        zeros.expand(-1, -1, place.stop - place.start) if block is None else block
        for place, block in zip(outputs, blocks, strict=True)
    ]
    return torch.cat(filled, -1)


def _drawn_maps(model: Any) -> Iterator[tuple[str, str, Any]]:
    """Path, group and module of each map whose weights are drawn."""
    for layer, interaction in enumerate(model.interactions):
        for name, child in interaction.named_children():
            path = f"interactions.{layer}.{name}"
            if "linear" in name and _is_equivariant(child):
                yield path, f"messages {layer}", child
            elif name == "conv_tp_weights":
                inner, last = [(n, m) for n, m in child.named_modules() if hasattr(m, "weight")][-1]
                yield f"{path}.{inner}", f"messages {layer}", last
        product = model.products[layer]
        if _is_equivariant(product.linear):
            yield f"products.{layer}.linear", f"updates {layer}", product.linear


def _is_equivariant(module: Any) -> bool:
    """Whether it is a linear map of e3nn with weights of its own."""
    from e3nn import o3

    return isinstance(module, o3.Linear)


def _n_weights(module: Any) -> int:
    return module.weight.numel()


def _with(module: Any, replaced: dict[str, torch.nn.Module], path: str = "") -> Any:
    """The module with other modules at some paths; all else is shared, weights too."""
    if path in replaced:
        return replaced[path]
    prefix = f"{path}." if path else ""
    if not any(one.startswith(prefix) for one in replaced):
        return module
    children = {
        name: child if child is None else _with(child, replaced, f"{prefix}{name}")
        for name, child in module._modules.items()
    }
    return _shell(module, children)


def _shell(module: Any, children: dict[str, Any]) -> Any:
    """The module with other children; all else is shared."""
    other = object.__new__(type(module))
    vars(other).update(vars(module), _modules=children)
    vars(other).pop("forward", None)  # one that was set on the module is bound to it, and to its children
    return other


def _copies(data: dict[str, Any], n_copies: int, n_atoms: int, n_frames: int) -> dict[str, Any]:
    """The data of several copies of a batch, one after the other."""
    copies = torch.arange(n_copies, device=data["batch"].device)
    found = {}
    for key, value in data.items():
        if not torch.is_tensor(value) or not value.dim():
            found[key] = value
        elif key == "edge_index":
            found[key] = (value[:, None] + n_atoms * copies[None, :, None]).flatten(1)
        elif key == "batch":
            found[key] = (value + n_frames * copies[:, None]).flatten()
        elif key == "ptr":
            found[key] = torch.cat([value[:1], (value[1:] + n_atoms * copies[:, None]).flatten()])
        else:
            found[key] = value.detach().repeat(n_copies, *[1] * (value.dim() - 1))
    return found


def _invariants(radial: Any, node_attrs: Tensor, edge_index: Tensor, frame_of_atom: Tensor, n_frames: int) -> Tensor:
    """(n_frames, n_elements · (1 + n_radial)) means over atoms of [element] ⊗ [1, Σ_j R_k(r_ij)]."""
    functions, cutoff = radial
    if cutoff is not None:
        functions = functions * cutoff
    summed = functions.new_zeros(len(node_attrs), functions.shape[1]).index_add(0, edge_index[1], functions)
    own = torch.cat([torch.ones_like(summed[:, :1]), summed], 1)
    rows = (node_attrs[:, :, None] * own[:, None, :]).flatten(1)
    total = rows.new_zeros(n_frames, rows.shape[1]).index_add(0, frame_of_atom, rows)
    counts = torch.bincount(frame_of_atom, minlength=n_frames)
    return total / counts[:, None]
