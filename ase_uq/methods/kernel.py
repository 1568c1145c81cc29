"""Kernel on the potential's hidden features: the posterior variance of a Gaussian process at an atom or a structure.

    k(x, y) = Φ(x)·Φ(y)                      linear: an isotropic prior on the features' weights
    k(x, y) = exp(-‖Φ(x) - Φ(y)‖²/2ℓ²)       rbf, through landmarks

Labels do not enter: the residual variance depends on where the training frames are, not on their errors. It needs only
the potential's own forward pass. The linear form needs only the Gram matrix of the features and is exact for any number
of frames; on the exact features of the last layer it is last-layer rigidity with an isotropic prior. The rbf form keeps
a fixed number of rows.

Forces use the variance of each atom, also summed over the sites around it; energy and stress use the variance of the
pooled features of a structure. Sources: Holzmüller et al. 2023 (posterior features, bmdal), Zaverkin et al. 2022
(latent kernels of potentials), Quiñonero-Candela and Rasmussen 2005 (landmarks), Garreau et al. 2017 (median
heuristic).
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ase_uq.communicator import Communicator
from ase_uq.errors import LabelError
from ase_uq.forward_pass import ForwardPass, Targets
from ase_uq.io.entries import SMALLEST, Entries, StoredTensors
from ase_uq.methods._distance import raw_of_atoms
from ase_uq.methods.base import Accumulator, Head, Implied, Method, Raw
from ase_uq.numerics.buffers import Buffers, tensors_of
from ase_uq.numerics.linalg import whitener
from ase_uq.numerics.moments import Moments, reduced
from ase_uq.numerics.posterior import mean_square, pivoted_cholesky, residual
from ase_uq.numerics.sample import RowSample, labels_of_atoms
from ase_uq.numerics.sites import RADII

# Rows kept per landmark: landmarks are chosen from them, and they represent all rows in the Gram matrix.
_ROWS_A_LANDMARK = 8
# Rows are divided by the square root of a pivot: below this pivot only rounding error is left of a row.
_SMALLEST_PIVOT = 1e-10
_MEDIAN_ROWS = 1000  # the pairs among this many rows determine the median distance


CHOICES = {
    "features": ("latent", "last_layer"),
    "kernel": ("linear", "rbf"),
    "normalisation": ("centred", "global", "cosine"),
    "pooling": ("mean", "sum"),
}


class KernelHead(Head):
    """A fitted kernel.

    Args:
        settings: Hyper-parameters and results of the fit, as JSON values.
        tensors: Tensors of the variance of atoms, named `atoms.…`, and of structures, named `frames.…`.
    """

    measures = True

    def __init__(self, settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().__init__(settings, {})
        variance = LinearVariance if settings["kernel"] == "linear" else LandmarkVariance
        self.atoms, self.frames = (variance(tensors_of(part, tensors)) for part in ("atoms", "frames"))

    @classmethod
    def check(cls, settings: Entries, tensors: StoredTensors) -> Implied:
        for option, choices in CHOICES.items():
            settings.text(option, choices)
        radii = settings.numbers("radii", SMALLEST)
        variance = LinearVariance if settings["kernel"] == "linear" else LandmarkVariance
        width = None
        for part in ("atoms", "frames"):
            of_part = tensors.under(f"{part}.")
            width = variance.check(of_part, width)
            of_part.nothing_else()
        latent = settings["features"] == "latent"
        return Implied({"forces": 1 + len(radii), "energy": 2, "stress": 2}, width if latent else None)

    def forward(self, forward_pass: ForwardPass) -> Raw:
        atoms, frames = _rows(forward_pass, self._settings)
        raw = raw_of_atoms(self.atoms(atoms), forward_pass, self._settings["radii"])
        structure = self.frames(frames)[:, None]
        if self._settings["pooling"] == "sum":
            structure = structure / forward_pass.n_atoms_of_frame.double()[:, None] ** 2
        return replace(raw, energy=torch.cat([raw.energy, structure], 1), stress=torch.cat([raw.stress, structure], 1))

    def features(self, forward_pass: ForwardPass) -> Tensor:
        """(n_atoms, d) Φ with k(x, y) = Φ(x)·Φ(y), up to a unit; for rbf, the part that the landmarks represent.

        The features of the rbf kernel are bounded: far from all landmarks they vanish, so that atoms there are alike.
        """
        return self.atoms.features(_rows(forward_pass, self._settings)[0])


@dataclass(frozen=True)
class Kernel(Method):
    """Fits the residual variance of a kernel on hidden features in one streaming pass.

    Args:
        features: Features that the kernel compares: `"latent"`, invariants of all layers and norms of the equivariant
            channels, or `"last_layer"`, the exact features of the energy's last layer.
        kernel: `"linear"`, or `"rbf"`, which follows a bent cloud of features, while a linear kernel takes its hollow
            for inside.
        normalisation: `"centred"`, about the mean of the training rows and in units of their spread; `"global"`, the
            same about zero, so that an atom without features (one torn off) counts as known; `"cosine"`, rows of
            length 1, for kernels of directions only. The rbf kernel does not distinguish the first two.
        pooling: Features of a structure: `"mean"`, for a kernel of energies per atom, or `"sum"`, for a kernel of
            total energies.
        noise: Noise variance σ², relative to the mean square of the normalised features. The small default asks how far
            the training frames could interpolate. On acetylacetone 1e-2 to 1e-8 rank alike with the linear kernel.
        length: Length scale ℓ of the rbf kernel, in units of the median distance between training rows.
        landmarks: Maximum number of training rows that the rbf kernel compares with.
        radii: Radii in Å; the variance is summed over the sites within each of them, in addition to the atom's own.
    """

    name = "kernel"
    head = KernelHead
    features: Literal["latent", "last_layer"] = "latent"
    kernel: Literal["linear", "rbf"] = "rbf"
    normalisation: Literal["centred", "global", "cosine"] = "centred"
    pooling: Literal["mean", "sum"] = "mean"
    noise: float = 1e-4
    length: float = 3.0
    landmarks: int = 256
    radii: tuple[float, ...] = RADII

    def __post_init__(self) -> None:
        for option, choices in CHOICES.items():
            if getattr(self, option) not in choices:
                raise ValueError(f"{option} is one of {', '.join(map(repr, choices))}, not {getattr(self, option)!r}.")
        if not 0 < self.noise <= 1:
            raise ValueError(f"the noise is above 0 and at most 1, not {self.noise!r}.")
        if not self.length > 0:
            raise ValueError(f"the length scale is above 0, not {self.length!r}.")
        if not self.landmarks >= 1:
            raise ValueError(f"at least 1 landmark is needed, not {self.landmarks!r}.")
        if not all(radius > 0 for radius in self.radii):
            raise ValueError(f"radii are lengths in Å above 0, not {self.radii!r}.")

    def start(self) -> "KernelAccumulator":
        return KernelAccumulator(self)


class LinearVariance(Buffers):
    """(n, d) → (n,): ‖(x - centre) root‖², with mean 1 over the fitted rows."""

    centre: Tensor
    root: Tensor

    @staticmethod
    def check(tensors: StoredTensors, width: int | None) -> int:
        """Refuses wrong tensors of a file; `width` is the number of features, if it is known, and is returned."""
        width = len(tensors.take("centre", width))
        tensors.take("root", width, width)
        return width

    def forward(self, rows: Tensor) -> Tensor:
        return ((rows - self.centre) @ self.root).square().sum(1)

    def features(self, rows: Tensor) -> Tensor:
        """(n, d) → (n, d): rows relative to the centre."""
        return rows - self.centre


class LandmarkVariance(Buffers):
    """(n, d) → (n,): variance of the rbf kernel given landmarks, with mean 1 over the fitted rows.

    v(x) = k(x, x) - ‖Φ‖² + σ² Φᵀ(Φ_TᵀΦ_T + σ²I)⁻¹Φ = 1 - ‖k_xm root‖²,  Φ = k_xm K_mm^{-1/2}

    The first two terms are the variance that the landmarks cannot represent: without them v would vanish far away. If
    every training row is a landmark, v is the posterior variance of the Gaussian process.
    """

    landmarks: Tensor  # (m, d) in units of ℓ
    root: Tensor  # (m, m)
    length: Tensor  # () ℓ
    mean: Tensor  # () mean of v over the fitted rows

    @staticmethod
    def check(tensors: StoredTensors, width: int | None) -> int:
        """Refuses wrong tensors of a file; `width` is the number of features, if it is known, and is returned."""
        size, width = tensors.take("landmarks", None, width).shape
        tensors.take("root", size, size)
        for name in ("length", "mean"):
            tensors.take(name, low=SMALLEST)
        return width

    def forward(self, rows: Tensor) -> Tensor:
        known = (_rbf(rows / self.length, self.landmarks) @ self.root).square().sum(1)
        return (1 - known).clamp(min=0) / self.mean

    def features(self, rows: Tensor) -> Tensor:
        """(n, d) → (n, m): k_xm K_mm^{-1/2}."""
        whitening, _ = whitener(_rbf(self.landmarks, self.landmarks))
        return _rbf(rows / self.length, self.landmarks) @ whitening


class Sums(Protocol):
    """What a fit keeps of the rows of atoms or of structures."""

    def add(self, rows: Tensor, labels: Tensor) -> None:
        """Takes (n, d) rows; their labels (n, 2) decide which may be landmarks."""
        ...

    def finish(self, communicator: Communicator) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors of the variance, and a record of the fit; at least one rank has had rows."""
        ...


class KernelAccumulator(Accumulator):
    """Collects what the fit keeps of all atoms and of all structures."""

    def __init__(self, method: Kernel) -> None:
        self.settings = asdict(method) | {"radii": list(method.radii)}
        sums = LinearSums if method.kernel == "linear" else LandmarkSums
        self.atoms: Sums = sums(method)
        self.frames: Sums = sums(method)

    def _add(self, forward_pass: ForwardPass, targets: Targets) -> None:
        atoms, frames = _rows(forward_pass, self.settings)
        self.atoms.add(atoms, labels_of_atoms(forward_pass, targets))
        self.frames.add(frames, torch.stack([targets.frames, torch.zeros_like(targets.frames)], 1))

    def _finish(self, communicator: Communicator) -> KernelHead:
        settings, tensors = dict(self.settings), {}
        for part, sums in (("atoms", self.atoms), ("frames", self.frames)):
            of_part, settings[part] = sums.finish(communicator)
            tensors |= {f"{part}.{name}": tensor for name, tensor in of_part.items()}
        return KernelHead(settings, tensors)


class LinearSums:
    """Moments of the rows."""

    def __init__(self, method: Kernel) -> None:
        self.method = method
        self.moments: Moments | None = None

    def add(self, rows: Tensor, labels: Tensor) -> None:
        moments = Moments.of(rows)
        self.moments = moments if self.moments is None else self.moments + moments

    def finish(self, communicator: Communicator) -> tuple[dict[str, Tensor], dict[str, Any]]:
        moments = reduced(self.moments, communicator)
        assert moments is not None
        if self.method.normalisation == "centred":
            gram, centre = moments.scatter, moments.mean
        else:
            gram, centre = moments.about_zero(), torch.zeros_like(moments.mean)
        square = mean_square(gram, moments.count, offset=float(centre.square().sum()))
        rest = residual(gram / square, moments.count, self.method.noise)
        root = rest.root / (square * rest.mean) ** 0.5
        record = {"rows": int(moments.count), "effective": rest.effective, "jitter": rest.jitter}
        return {"centre": centre, "root": root}, record


class LandmarkSums:
    """A sample of the rows, of a size that does not grow with the training frames."""

    def __init__(self, method: Kernel) -> None:
        self.method = method
        self.sample = RowSample(_ROWS_A_LANDMARK * method.landmarks)
        self.seen = 0

    def add(self, rows: Tensor, labels: Tensor) -> None:
        self.sample.add(labels, rows)
        self.seen += len(rows)

    def finish(self, communicator: Communicator) -> tuple[dict[str, Tensor], dict[str, Any]]:
        rows = self.sample.finish(communicator)
        seen = int(communicator.sum({"seen": torch.tensor([self.seen], dtype=torch.float64)})["seen"])
        assert rows is not None
        # For an rbf kernel all rows are alike before the first pivot: sorted, it is the same for any order of frames.
        rows = rows[rows.norm(dim=1).argsort(descending=True)]
        length = self.method.length * _median_distance(rows[:: -(-len(rows) // _MEDIAN_ROWS)])
        rows = rows / length
        pivots = pivoted_cholesky(
            lambda j: _rbf(rows, rows[j : j + 1])[:, 0],
            torch.ones_like(rows[:, 0]),
            self.method.landmarks,
            smallest=_SMALLEST_PIVOT,
        )
        factor = pivots.factor[pivots.indices]
        eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        # Landmarks represent themselves; the other rows of the sample also represent the rows that were not kept.
        weights = torch.full_like(rows[:, 0], (seen - len(factor)) / max(len(rows) - len(factor), 1))
        weights[pivots.indices] = 1.0
        rest = residual(pivots.factor.T @ (weights[:, None] * pivots.factor), seen, self.method.noise)
        whitening = torch.linalg.solve_triangular(factor, eye, upper=False).T
        # For every direction among the landmarks, the share that the training rows determine.
        shares, directions = torch.linalg.eigh(eye - rest.root @ rest.root.T)
        tensors = {
            "landmarks": rows[pivots.indices],
            "root": whitening @ (directions * shares.clamp(min=0).sqrt()),
            "length": rows.new_tensor(length),
            "mean": rows.new_tensor(1.0),
        }
        mean = (weights * LandmarkVariance(tensors)(rows * length)).sum() / seen
        record = {"rows": seen, "sample": len(rows), "landmarks": len(factor), "length": length}
        return tensors | {"mean": mean}, record | {"effective": rest.effective, "jitter": rest.jitter}


def _rows(forward_pass: ForwardPass, settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(n_atoms, d) and (n_frames, d) float64 rows that the kernels of atoms and of structures compare."""
    latent = settings["features"] == "latent"
    atoms = (forward_pass.features if latent else forward_pass.energy_layer.features).double()
    frames = forward_pass.sum_over_atoms(atoms)
    if settings["pooling"] == "mean":
        frames = frames / forward_pass.n_atoms_of_frame.double()[:, None]
    if settings["normalisation"] == "cosine":
        atoms, frames = (torch.nn.functional.normalize(rows, eps=1e-300) for rows in (atoms, frames))
    return atoms, frames


def _rbf(rows: Tensor, landmarks: Tensor) -> Tensor:
    """(n, d), (m, d) → (n, m): exp(-‖x - y‖²/2) of rows in units of ℓ."""
    # The square of a difference may be expanded relative to the landmarks' centre: features are much longer than the
    # distances between neighbours, but they are not much farther than that from the centre.
    centre = landmarks.mean(0)
    rows, landmarks = rows - centre, landmarks - centre
    squares = rows.square().sum(1)[:, None] + landmarks.square().sum(1) - 2 * rows @ landmarks.T
    return torch.exp(-squares.clamp(min=0) / 2)


def _median_distance(rows: Tensor) -> float:
    """Median of the distances between rows; pairs of equal rows, as in perfect crystals, are left out.

    Raises:
        LabelError: All rows are equal.
    """
    distances = torch.nn.functional.pdist(rows)
    distances = distances[distances > 1e-8 * rows.square().sum(1).mean().sqrt()]
    if not len(distances):
        raise LabelError(
            f"all {len(rows)} training rows have the same features: they have no length scale for an rbf kernel. Fit "
            "on frames that differ, or leave 'kernel' out of the methods."
        )
    return float(distances.median())
