"""How far the features of a potential moved when it was trained further: what came, what went, what merely turned.

    found = drift("mace:my.model", "mace:my_fine_tuned.model", "calibration.xyz")
    print(found.describe())

An uncertainty model reads features as they were. Where they moved little beside their spread, its scores still rank
atoms as they did, and calibrating again may do; where they moved but follow from each other, it must be fitted again,
on the same frames; where much came that did not follow from the old ones, those frames may no longer cover it.
"""

import math
from dataclasses import dataclass

import numpy as np

from ase_uq.diagnostics.features import Latent, LatentStream, Potential, as_latent
from ase_uq.diagnostics.reconstruction import Gathered, PointwiseErrors, gather
from ase_uq.errors import PotentialMismatch
from ase_uq.io.frames import Frames
from ase_uq.io.source import Source


@dataclass(frozen=True)
class Drift:
    """The difference between the features of a potential before and after further training, on some frames.

    Args:
        gained: GFRE from old to new: what of the new features does not follow from the old ones.
        lost: GFRE from new to old: what of the old features does not follow from the new ones.
        gained_within: The first as a share of the spread of the new features within elements.
        lost_within: The second as a share of the spread of the old features within elements.
        moved: Root mean square distance between an atom's old and new features, as a share of the spread of the old
            ones over all atoms.
        moved_within: The same as a share of the spread of the old features within elements.
        n_frames: Number of frames.
    """

    gained: float
    lost: float
    gained_within: float
    lost_within: float
    moved: float
    moved_within: float
    n_frames: int

    def describe(self) -> str:
        """The numbers in a sentence."""
        return (
            f"features moved by {self.moved:.3f} of their spread ({self.moved_within:.2f} of that within elements); "
            f"of the new ones {self.gained:.3f} ({self.gained_within:.2f}) do not follow from the old ones, of the old "
            f"ones {self.lost:.3f} ({self.lost_within:.2f}) not from the new ones."
        )


def drift(
    old: Potential,
    new: Potential,
    frames: Frames,
    *,
    block: int = 1,
    batch_atoms: int | None = None,
    progress: bool = True,
) -> Drift:
    """How far features moved from one potential to the one that was trained from it, on frames without labels.

    Args:
        old: The potential before; an ASE calculator, a SPEC, a backend, or `Latent` for other features than all.
        new: The potential after.
        frames: Path or list, such as the calibration frames of an uncertainty model of the old potential.
        block: Number of consecutive frames that stay in one half, as in `gfre`.
        batch_atoms: Largest number of atoms evaluated together; None for the default of the device.
        progress: Whether to show a progress bar.

    Raises:
        PotentialMismatch: The two have not the same architecture.
        InputError: One of them cannot evaluate a frame, or there are fewer atoms than features.
    """
    latents = {"old": as_latent(old), "new": as_latent(new)}
    if why := _difference(latents["old"], latents["new"]):
        raise PotentialMismatch(
            f"{why}: features of the new one are not those of the old one after more training. `ase-uq compare` "
            "compares potentials of any architectures."
        )
    title = "features" if progress else ""
    stream = LatentStream(latents, Source(frames), batch_atoms=batch_atoms, title=title, keep=True)
    gathered = gather(stream, block)
    return drift_of(gathered, gathered.pointwise(stream, [("old", "new"), ("new", "old")]), "old", "new")


def drift_of(gathered: Gathered, pointwise: PointwiseErrors, old: str, new: str) -> Drift:
    """The drift between two of the potentials whose features were gathered.

    Args:
        gathered: From `gather`.
        pointwise: Errors of both directions.
        old: Name of the potential before.
        new: Name of the potential after.
    """
    first, second = gathered.halves
    joint = first + second
    before, after = gathered.columns[old], gathered.columns[new]
    cross = joint.scatter[before, after].diagonal().sum()
    variance = joint.scatter.diagonal()
    apart = (variance[before].sum() + variance[after].sum() - 2 * cross) / joint.count
    apart = float(apart + (joint.mean[after] - joint.mean[before]).square().sum())
    moved = math.sqrt(max(apart, 0.0) / float(variance[before].sum() / joint.count))
    spread = float(np.sqrt(np.mean(pointwise.spreads[old].astype(float) ** 2)))
    return Drift(
        gained=gathered.gfre(old, new),
        lost=gathered.gfre(new, old),
        gained_within=pointwise.beyond_elements((old, new)),
        lost_within=pointwise.beyond_elements((new, old)),
        moved=moved,
        moved_within=moved / spread if spread else math.nan,
        n_frames=gathered.n_frames,
    )


def same_architecture(one: Latent, other: Latent) -> bool:
    """Whether two potentials differ in their training only, and the same features of them are compared."""
    return not _difference(one, other)


def _difference(one: Latent, other: Latent) -> str:
    """Where the architectures or the chosen features differ, in words; empty if they do not."""
    if one.features is not other.features:
        return "other features of the new potential were chosen than of the old one"
    if one.backend.name != other.backend.name:
        return f"the old potential is of {one.backend.name}, the new one of {other.backend.name}"
    old, new = one.backend.architecture, other.backend.architecture
    for name in old | new:
        if old.get(name) != new.get(name):
            shapes = [_told(shapes.get(name)) for shapes in (old, new)]
            return (
                f"the weights {name.partition('.')[2]} are {shapes[0]} in the old potential, {shapes[1]} in the new one"
            )
    return ""


def _told(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else " × ".join(map(str, shape)) or "one number"
