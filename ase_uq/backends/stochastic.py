"""Potentials whose weights are drawn: what a package's own part of them does, and the file that training makes.

    backend = load_backend("mace:my.model?blip=my.blip.safetensors")

The prediction is that of the mean weights, from the plain forward pass. Beside it are the predictions of T members: a
member is one fixed draw ε of the noise on the weights, ω = θ (1 + √α(G) ε), the same for all structures and calls. All
are moved together, so that their mean over the draws is the prediction:

    E_t(R) = E(R; ω_t) - 1/T Σ_s E(R; ω_s) + E(R; θ)

Each member is a potential of its own: smooth, equivariant, conservative, and the same for two structures that are
compared. So the spread over members is that of a committee, and `committee` calibrates it.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ase_uq.backends.identity import PROBE_TOLERANCE, Identity, differing, relative_deviation
from ase_uq.display.representation import Brief
from ase_uq.errors import ArtefactError, PotentialMismatch
from ase_uq.forward_pass import ForwardPass, Members
from ase_uq.io.entries import Entries, StoredTensors, WrongEntry
from ase_uq.io.tensor_file import read_tensor_file, write_tensor_file
from ase_uq.numerics.buffers import tensors_of
from ase_uq.numerics.variational import Rates, noise_of

if TYPE_CHECKING:
    from ase_uq.backends.base import Backend, Batch

_KIND, _SCHEMA = "stochastic weights file", 1
_MOST_MEMBERS, LARGEST_SEED = 1000, 2**62
# Atoms of all copies that are evaluated together, for the memory that neighbour lists of a dense solid need.
_ATOMS_TOGETHER = {"cpu": 1200}
_ATOMS_TOGETHER_ON_GPU = 32_000


@dataclass(frozen=True)
class Drawn:
    """Predictions of the members for a batch; with a graph while a potential is trained.

    Args:
        energy: (n_members, n_frames) eV.
        forces: (n_members, n_atoms, 3) eV/Å, or None if they were not asked for.
        stress: (n_members, n_frames, 6) eV/Å³, Voigt, or None.
        rates: (n_frames, n_groups) α of the structures.
    """

    energy: Tensor
    forces: Tensor | None
    stress: Tensor | None
    rates: Tensor


def check_members(n_members: int) -> None:
    """Refuses a number of members that have no spread, or that nobody can evaluate.

    Raises:
        ValueError: It is not from 2 to a thousand.
    """
    if not (isinstance(n_members, int) and 2 <= n_members <= _MOST_MEMBERS):
        raise ValueError(f"n_members is {n_members}; a whole number from 2 to {_MOST_MEMBERS} was expected.")


class StochasticModel(ABC):
    """A copy of a potential whose weights can be drawn and trained.

    Attributes:
        layers: Group of each layer whose weights are drawn, and the number of its weights.
    """

    layers: tuple[tuple[str, int], ...]

    @property
    @abstractmethod
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """θ by name."""

    @abstractmethod
    def invariants(self, batch: "Batch") -> Tensor:
        """(n_frames, n_inputs) those of each structure that its rates are a function of."""

    @abstractmethod
    def draw(
        self, batch: "Batch", rates: Rates, noise: Sequence[Tensor], *, forces: bool = True, training: bool = False
    ) -> Drawn:
        """Predictions with drawn weights.

        Forces and stresses are the derivatives of the energies of each member, also through the rates.

        Args:
            batch: Batch of the backend.
            rates: α of each group.
            noise: (n_members, size) ε of each layer, in the order of `layers`.
            forces: Whether forces and stresses are needed.
            training: Whether to keep the graph of all results.
        """

    @property
    def groups(self) -> dict[str, int]:
        """Number of weights of each group, whose α is one."""
        found: dict[str, int] = {}
        for group, size in self.layers:
            found[group] = found.get(group, 0) + size
        return found

    def noise(self, n_members: int, seed: int) -> list[Tensor]:
        """ε of each layer, in the dtype of the potential and on its device."""
        like = next(iter(self.parameters.values()))
        return [one.to(like) for one in noise_of([size for _, size in self.layers], n_members, seed)]


@dataclass(frozen=True, repr=False)
class Blip(Brief):
    """Weights and rates of a stochastic potential.

    Args:
        potential: Identity of the potential that it was made from.
        weights: θ by name.
        rates: α of each group of weights.
        n_members: Number of members whose predictions stand beside that of θ.
        seed: Seed of their noise.
        training: What it was made by, as JSON values.
    """

    potential: Identity
    weights: Mapping[str, Tensor]
    rates: Rates
    n_members: int = 8
    seed: int = 0
    training: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_members(self.n_members)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file; it appears whole or not at all.

        Raises:
            ArtefactError: The folder is missing or not writable, or the disk is full.
        """
        header = {
            "potential": {"settings": self.potential.settings, "weights": self.potential.weights},
            "rates": self.rates.settings,
            "n_members": self.n_members,
            "seed": self.seed,
            "training": dict(self.training or {}),
        }
        tensors = {
            "probe": self.potential.probe,
            **{f"weights.{name}": weight for name, weight in self.weights.items()},
            **{f"rates.{name}": tensor for name, tensor in self.rates.named_buffers()},
        }
        write_tensor_file(path, _KIND, _SCHEMA, header, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Blip":
        """What `save` wrote.

        Raises:
            ArtefactError: There is no such file, or it is another one, truncated, altered or newer than this package.
        """
        header, tensors = read_tensor_file(path, _KIND, _SCHEMA)
        try:
            entries = Entries(header, "header")
            potential = entries.under("potential")
            settings = potential.under("settings").value
            stored = StoredTensors(tensors)
            probe = stored.take("probe", None, None, dtype=torch.float32)
            Rates.check(entries.under("rates"), stored.under("rates."))
            weights = stored.under("weights.")
            weights.finite()
            stored.nothing_else()
            return cls(
                potential=Identity(settings, potential.text("weights"), probe),
                weights=weights.tensors,
                rates=Rates(header["rates"], tensors_of("rates", tensors)),
                n_members=entries.whole("n_members", 2, _MOST_MEMBERS),
                seed=entries.whole("seed", -LARGEST_SEED, LARGEST_SEED),
                training=entries.under("training").value,
            )
        except WrongEntry as error:
            raise ArtefactError(f"{path} is not what training writes: {error}. Make the file again.") from error

    def check(self, backend: "Backend") -> None:
        """Refuses a potential that it was not made from.

        Raises:
            PotentialMismatch: The potentials differ; the message says in what.
        """
        here, then = backend.identity, self.potential
        advice = "Load the potential that it was trained from, or train again with `ase-uq blip`."
        if keys := differing(then, here):
            raise PotentialMismatch(
                f"the stochastic weights were trained from another potential: {keys[0]} was "
                f"{then.settings.get(keys[0])!r}, here it is {here.settings.get(keys[0])!r}. {advice}"
            )
        if then.weights != here.weights:
            deviation = relative_deviation(here.probe, then.probe)
            if not deviation <= PROBE_TOLERANCE:
                raise PotentialMismatch(
                    f"the stochastic weights were trained from a potential of other weights: features of the probe "
                    f"structure differ by {deviation:.1e} (relative). {advice}"
                )

    def put(self, model: torch.nn.Module) -> None:
        """Sets the weights of a copy of the potential.

        Raises:
            ArtefactError: They are not those of its architecture.
        """
        own = dict(model.named_parameters())
        wrong = sorted(own.keys() ^ self.weights.keys()) or [n for n in own if own[n].shape != self.weights[n].shape]
        if wrong:
            raise ArtefactError(f"the stochastic weights do not fit the potential: {wrong[0]} differs. Train again.")
        with torch.no_grad():
            for name, weight in own.items():
                weight.copy_(self.weights[name])

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What, beside the weights, its members depend on: for the identity of the backend."""
        digest = hashlib.sha256(repr(self.rates.settings).encode())
        for name, tensor in sorted(self.rates.named_buffers()):
            digest.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
        return {"blip_members": self.n_members, "blip_seed": self.seed, "blip_rates": digest.hexdigest()[:16]}


class MemberPasses:
    """The members of a stochastic potential, evaluated beside each plain pass.

    Args:
        model: The potential with the weights of `blip`.
        blip: Rates, number of members and seed.
        device: Device of the potential.
    """

    def __init__(self, model: StochasticModel, blip: Blip, device: torch.device) -> None:
        self.model = model
        self._rates = Rates(blip.rates.settings, dict(blip.rates.named_buffers())).to(device)
        self._noise = model.noise(blip.n_members, blip.seed)
        self._together = _ATOMS_TOGETHER.get(device.type, _ATOMS_TOGETHER_ON_GPU)

    def beside(self, forward_pass: ForwardPass, batch: "Batch", forces: bool) -> ForwardPass:
        """The same pass with its members: as many copies of the batch in one call as memory is meant for."""
        n_members = len(self._noise[0])
        n_copies = max(1, min(n_members, self._together // max(1, len(forward_pass.numbers))))
        parts = [
            self.model.draw(batch, self._rates, [one[first : first + n_copies] for one in self._noise], forces=forces)
            for first in range(0, n_members, n_copies)
        ]

        def joined(name: str) -> Tensor | None:
            found = [getattr(part, name) for part in parts]
            if found[0] is None:
                return None
            drawn, predicted = torch.cat(found).detach(), getattr(forward_pass, name)
            return drawn - drawn.mean(0) + predicted

        energy = joined("energy")
        assert energy is not None
        return replace(forward_pass, members=Members(energy, joined("forces"), joined("stress")))
