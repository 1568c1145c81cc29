"""Derivatives of a forward pass whose graph is kept, for every potential that torch can differentiate."""

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from ase_uq.errors import InputError
from ase_uq.forward_pass import NO_LAST_LAYER, Gradients, Slopes

VOIGT = [0, 4, 8, 5, 2, 1]  # xx, yy, zz, yz, xz, xy of a flat symmetric matrix


class _Flags:
    """Flags of parameters, which threads share: passes that leave them alone may overlap, others have them alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sharing = Counter[int]()  # passes in each thread
        self._owner: int | None = None
        self._depth = 0

    @contextmanager
    def left_alone(self) -> Iterator[None]:
        thread = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._owner in (None, thread))
            self._sharing[thread] += 1
        try:
            yield
        finally:
            with self._changed:
                self._sharing[thread] -= 1
                self._sharing += Counter()  # without threads that have ended
                self._changed.notify_all()

    @contextmanager
    def owned(self) -> Iterator[None]:
        thread = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._owner in (None, thread) and not self._sharing.keys() - {thread})
            self._owner = thread
            self._depth += 1
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1
                if not self._depth:
                    self._owner = None
                self._changed.notify_all()


# Threads may share a potential: flags that one thread has set must not be restored by another.
_FLAGS = _Flags()


@contextmanager
def in_the_graph(parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Includes parameters in the graph of everything computed inside; their flags are restored on leaving.

    Without parameters nothing is changed, but no other thread changes them meanwhile.
    """
    if not parameters:
        with _FLAGS.left_alone():
            yield
        return
    with _FLAGS.owned():
        flags = [parameter.requires_grad for parameter in parameters]
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter, flag in zip(parameters, flags, strict=True):
                parameter.requires_grad_(flag)


class GraphGradients(Gradients):
    """Derivatives taken from the graph of the forward pass that gave the values, without a further forward pass.

    The graph and its memory live as long as this object, which must be created inside `in_the_graph`.

    Args:
        parameters: θ, in the order of `named_parameters`.
        positions: (n_rows, 3) leaf of the graph; rows beyond n_atoms are padding.
        features: (n_atoms, n_features) features, with a graph.
        energy_features: (n_atoms, n_last) features of the energy's last layer, with a graph; None without a graph.
        energy: (n_frames,) energies, eV.
        forces: (n_atoms, 3) forces, eV/Å, with a graph of their own; None to derive them from the energy.
        frame_of_atom: (n_atoms,) index of the frame of each atom.
        length_unit: Å in one unit of `positions`.
        strain: (n_frames, 3, 3) tensor of the graph, 0, that deforms each structure by its symmetric part; None if
            there is none.
    """

    def __init__(
        self,
        *,
        parameters: Sequence[torch.nn.Parameter],
        positions: Tensor,
        features: Tensor,
        energy: Tensor,
        forces: Tensor | None,
        frame_of_atom: Tensor,
        energy_features: Tensor | None = None,
        length_unit: float = 1.0,
        strain: Tensor | None = None,
    ) -> None:
        self._parameters = parameters
        # The ends of the graph remain usable after the parameters' own flags have been restored.
        self._edges = [torch.autograd.graph.get_gradient_edge(parameter) for parameter in parameters]
        self._positions, self._features, self._energy = positions, features, energy
        self._energy_features, self._strain = energy_features, strain
        self._given_forces, self._frame_of_atom, self._length_unit = forces, frame_of_atom, length_unit

    def of_features(self, cotangent: Tensor, energy_cotangent: Tensor | None = None) -> Tensor:
        outputs, cotangents = [self._features], [cotangent]
        if energy_cotangent is not None:
            if self._energy_features is None:
                raise InputError(NO_LAST_LAYER)
            outputs.append(self._energy_features)
            cotangents.append(energy_cotangent)
        cotangents = [-c.to(output) / self._length_unit for c, output in zip(cotangents, outputs, strict=True)]
        (gradient,) = torch.autograd.grad(
            outputs, self._positions, cotangents, retain_graph=True, materialize_grads=True
        )
        return gradient[: len(self._features)]

    def of_energy_layer(self, weights: Tensor) -> Slopes:
        layer = self._energy_features
        if layer is None:
            raise InputError(NO_LAST_LAYER)
        inputs = [self._positions] if self._strain is None else [self._positions, self._strain]
        columns = [
            torch.autograd.grad(layer, inputs, column.expand_as(layer), retain_graph=True, materialize_grads=True)
            for column in weights.to(layer).T
        ]
        by_position, *by_strain = (torch.stack(found, -1) for found in zip(*columns, strict=True))
        virials = None
        if by_strain:
            virials = by_strain[0].flatten(1, 2)[:, VOIGT]
        return Slopes(-by_position[: len(layer)] / self._length_unit, virials)

    def of_energies(self) -> Iterator[Tensor]:
        for cotangent in torch.eye(len(self._energy)).to(self._energy):
            yield self._of_parameters(self._energy, cotangent)

    def of_forces(self, tangents: Tensor) -> Iterator[Tensor]:
        tangents = tangents.to(self._forces)
        for frame in range(len(self._energy)):
            in_frame = (self._frame_of_atom == frame)[:, None]
            yield self._of_parameters(self._forces, torch.where(in_frame, tangents, 0))

    @cached_property
    def _forces(self) -> Tensor:
        """(n_atoms, 3) -∂E/∂R with a graph; its backward pass runs only once."""
        if self._given_forces is not None:
            return self._given_forces
        # Gradients may be switched off by the caller, and weights frozen again would be constants of this graph.
        with torch.enable_grad(), in_the_graph(self._parameters):
            (slope,) = torch.autograd.grad(
                self._energy.sum(), self._positions, create_graph=True, materialize_grads=True
            )
            return -slope[: len(self._features)] / self._length_unit

    def _of_parameters(self, output: Tensor, cotangent: Tensor) -> Tensor:
        """(n_parameters,) cotangent · ∂output/∂θ; 0 for parameters that the output does not depend on."""
        if not output.requires_grad:
            gradients = [None] * len(self._edges)  # an output that depends on no parameter
        else:
            gradients = torch.autograd.grad(output, self._edges, cotangent, retain_graph=True, allow_unused=True)
        parts = [
            (torch.zeros_like(parameter) if gradient is None else gradient).flatten()
            for gradient, parameter in zip(gradients, self._parameters, strict=True)
        ]
        return torch.cat(parts).detach()
