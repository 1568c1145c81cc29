"""Several potentials compared by what they see of the same atoms: errors of reconstruction, and where they come from.

comparison = compare({"mace": "mace:my.model", "orb": "orb:orb_v3_direct_20_omat"}, "frames.xyz")
print(comparison.table())
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from ase_uq.diagnostics.drift import Drift, drift_of, same_architecture
from ase_uq.diagnostics.features import LatentStream, Potential, as_latent
from ase_uq.diagnostics.latent import LatentMap, principal_plane
from ase_uq.diagnostics.reconstruction import (
    LABELS,
    N_NEIGHBOURS,
    N_SAMPLED,
    Gathered,
    Interval,
    PointwiseErrors,
    gather,
)
from ase_uq.display.progress import progress_bar
from ase_uq.display.representation import Brief
from ase_uq.io.frames import Frames
from ase_uq.io.source import Source

Pair = tuple[str, str]
_SHOWN = 12  # elements of the table


@dataclass(frozen=True)
class Unseen:
    """A frame with an atom that one potential sees and another does not.

    Args:
        frame: Number of the frame.
        atom: Place of the atom in the frame.
        symbol: Its element.
        error: Its error, as a share of the spread of the features over all atoms.
    """

    frame: int
    atom: int
    symbol: str
    error: float


@dataclass(frozen=True, repr=False)
class Comparison(Brief):
    """What potentials see of the same atoms. Errors are by (from, to): of the features of the second, by the first.

    Args:
        n_features: Number of features of each potential.
        n_frames: Number of frames.
        gfre: Global reconstruction errors.
        gfrd: Global reconstruction distortions.
        lfre: Local reconstruction errors with 95 % intervals, over sampled atoms.
        n_neighbours: Number of neighbours of an atom on which a local map was fitted.
        pointwise: The global error of each atom.
        planes: By potential, the sampled atoms along the two directions in which its features differ most.
        sampled: (n_sampled,) rows of the sampled atoms in `pointwise`.
        drifts: From each potential to a later one of the same architecture, as if this was fine-tuned from that.
    """

    n_features: Mapping[str, int]
    n_frames: int
    gfre: Mapping[Pair, float]
    gfrd: Mapping[Pair, float]
    lfre: Mapping[Pair, Interval]
    n_neighbours: int
    pointwise: PointwiseErrors
    planes: Mapping[str, LatentMap]
    sampled: np.ndarray
    drifts: Mapping[Pair, Drift]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the potentials."""
        return tuple(self.n_features)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """All (from, to)."""
        return tuple(self.gfre)

    @property
    def elements(self) -> tuple[str, ...]:
        """Symbols of the elements of the frames."""
        return tuple(chemical_symbols[z] for z in np.unique(self.pointwise.numbers))

    def most_frequent(self, n: int) -> tuple[str, ...]:
        """Symbols of the elements with most atoms, by their atomic numbers."""
        numbers, counts = np.unique(self.pointwise.numbers, return_counts=True)
        return tuple(chemical_symbols[z] for z in np.sort(numbers[np.argsort(-counts, kind="stable")[:n]]))

    def beyond_elements(self, pair: Pair, symbol: str | None = None) -> float:
        """Root mean square error as a share of the spread within elements, of all atoms or of one element.

        At about 1 or above, the first potential says no more of these atoms than their elements, as far as one linear
        map for all elements tells. NaN if features of the second are the same for all atoms of each element.
        """
        numbers = self.pointwise.numbers
        return self.pointwise.beyond_elements(
            pair, slice(None) if symbol is None else numbers == chemical_symbols.index(symbol)
        )

    def error_of_element(self, pair: Pair, symbol: str) -> float:
        """Root mean square error of the atoms of one element, as a share of the spread over all atoms."""
        errors = self.pointwise.errors[pair][self.pointwise.numbers == chemical_symbols.index(symbol)]
        return float(np.sqrt(np.mean(errors.astype(float) ** 2)))

    def seen_by_no_other(self, name: str) -> np.ndarray:
        """(n_atoms,) the smallest error of each atom among reconstructions by all other potentials."""
        return np.min([errors for (_, to), errors in self.pointwise.errors.items() if to == name], axis=0)

    def worst(self, errors: np.ndarray, n: int = 5) -> list[Unseen]:
        """The frames with the largest errors of an atom, worst first.

        Args:
            errors: (n_atoms,) errors, such as `pointwise.errors[pair]`.
            n: How many.
        """
        found: dict[int, Unseen] = {}
        for row in np.argsort(-errors, kind="stable"):
            frame = int(self.pointwise.frame[row])
            if frame not in found:
                symbol = chemical_symbols[self.pointwise.numbers[row]]
                found[frame] = Unseen(frame, int(self.pointwise.place[row]), symbol, float(errors[row]))
            if len(found) == n:
                break
        return list(found.values())

    def describe(self) -> str:
        """From which other potential the features of each follow best, and how far they drifted; a line each."""
        lines = []
        for name in self.names:
            best = min((pair for pair in self.pairs if pair[1] == name), key=lambda pair: self.gfre[pair])
            lines.append(
                f"The features of {name} follow best from those of {best[0]}: GFRE {self.gfre[best]:.3f}, which is "
                f"{self.beyond_elements(best):.2f} of their spread within elements; LFRE {self.lfre[best].value:.3f}."
            )
        lines += [
            f"From {old} to {new}, which have the same architecture: {d.describe()}"
            for (old, new), d in self.drifts.items()
        ]
        return "\n".join(lines)

    def table(self) -> str:
        """All errors as aligned text, and what they mean."""
        features = ", ".join(f"{name} {n}" for name, n in self.n_features.items())
        n_atoms = len(self.pointwise.numbers)
        local = f"LFRE: maps on {self.n_neighbours} neighbours, {len(self.sampled):,} atoms"
        blocks = [
            f"{self.n_frames:,} frames, {n_atoms:,} atoms; features: {features}",
            self._matrix("GFRE: one linear map for all", {pair: f"{value:.3f}" for pair, value in self.gfre.items()}),
            self._matrix(
                "GFRE as a share of the spread within elements",
                {pair: f"{self.beyond_elements(pair):.3f}" for pair in self.pairs},
            ),
            self._by_element(),
            self._matrix(
                local, {pair: f"{v:.3f} ({low:.3f}-{high:.3f})" for pair, (v, low, high) in self.lfre.items()}
            ),
            self._worst_frames(),
            self.describe(),
            "0: the features of the second potential follow from those of the first; 1: they do not at all. A share "
            "of the\nspread within elements of about 1 or more: the first says no more of an atom than its element. "
            "None of this\nsays how accurate a potential is.",
        ]
        return "\n\n".join(blocks)

    def numbers(self) -> dict[str, Any]:
        """Everything but the single atoms as JSON values; None where a number is not defined."""
        return {
            "n_frames": self.n_frames,
            "n_atoms": len(self.pointwise.numbers),
            "n_features": dict(self.n_features),
            "n_neighbours": self.n_neighbours,
            "pairs": [self._numbers_of(pair) for pair in self.pairs],
            "drifts": [{"old": old, "new": new} | vars(drift) for (old, new), drift in self.drifts.items()],
        }

    def _numbers_of(self, pair: Pair) -> dict[str, Any]:
        local = self.lfre[pair]
        by_element = {
            symbol: {
                "error": self.error_of_element(pair, symbol),
                "beyond_elements": _known(self.beyond_elements(pair, symbol)),
            }
            for symbol in self.elements
        }
        return {
            "from": pair[0],
            "to": pair[1],
            "gfre": self.gfre[pair],
            "gfrd": self.gfrd[pair],
            "lfre": local.value,
            "lfre_interval": [_known(local.low), _known(local.high)],
            "beyond_elements": _known(self.beyond_elements(pair)),
            "elements": by_element,
            "worst": [vars(frame) for frame in self.worst(self.pointwise.errors[pair])],
        }

    def _matrix(self, title: str, cells: Mapping[Pair, str]) -> str:
        rows = [[f"from {a}", *(cells.get((a, b), "-") for b in self.names)] for a in self.names]
        return _aligned([[title, *(f"to {name}" for name in self.names)], *rows])

    def _by_element(self) -> str:
        shown = self.most_frequent(_SHOWN)
        rows = [[f"{a} to {b}", *(f"{self.beyond_elements((a, b), z):.3f}" for z in shown)] for a, b in self.pairs]
        n_more = len(self.elements) - len(shown)
        note = f"\n{n_more} more elements, with fewer atoms, are not listed here." if n_more else ""
        return _aligned([["the same share by element", *shown], *rows]) + note

    def _worst_frames(self) -> str:
        lines = ["atoms that the second sees and the first does not, in the frames where they are worst"]
        for pair in self.pairs:
            worst = self.worst(self.pointwise.errors[pair], 3)
            named = ", ".join(f"frame {w.frame} ({w.symbol} {w.atom}: {w.error:.2g})" for w in worst)
            lines.append(f"{pair[0]} to {pair[1]}: {named}")
        return "\n".join(lines)


def compare(
    potentials: Mapping[str, Potential],
    frames: Frames,
    *,
    block: int = 1,
    n_neighbours: int = N_NEIGHBOURS,
    n_sampled: int = N_SAMPLED,
    n_bootstrap: int = 200,
    seed: int = 0,
    batch_atoms: int | None = None,
    progress: bool = True,
) -> Comparison:
    """Compares potentials by what they see of the same atoms: reconstruction errors from each to each.

    Args:
        potentials: By name: ASE calculators, SPECs, backends, or `Latent` for other features than all.
        frames: Path or list. Each is evaluated once by each potential, or twice if there are many.
        block: Number of consecutive frames that stay together where frames are halved and resampled: about as many as
            are correlated.
        n_neighbours: Number of neighbours on which local maps are fitted; at most half of the sampled atoms of a half.
        n_sampled: Largest number of atoms of each half for local errors and maps.
        n_bootstrap: Number of resamples of frames for the intervals of local errors; 0 for none.
        seed: Seed of the resamples.
        batch_atoms: Largest number of atoms evaluated together; None for the default of the device.
        progress: Whether to show progress bars.

    Raises:
        InputError: The potentials have no element in common, one of them cannot evaluate a frame, its features do not
            vary, or there are fewer atoms than features.
        ValueError: There are fewer than two potentials, or a number is out of range.
    """
    if len(potentials) < 2:
        raise ValueError(f"there is {len(potentials)} potential; give at least two to compare.")
    latents = {name: as_latent(potential) for name, potential in potentials.items()}
    title = "features" if progress else ""
    stream = LatentStream(latents, Source(frames), batch_atoms=batch_atoms, title=title, keep=True)
    gathered = gather(stream, block, n_sampled)
    pairs = list(permutations(latents, 2))
    n_neighbours = min(n_neighbours, max(4, min(map(len, gathered.samples)) // 2))
    how = {"n_neighbours": n_neighbours, "n_bootstrap": n_bootstrap, "seed": seed}
    bar = progress_bar(pairs, desc="local maps", show=progress, leave=False)
    local = {pair: gathered.lfre(*pair, **how) for pair in bar}
    pointwise = gathered.pointwise(stream, pairs, "atoms" if progress else "")
    return Comparison(
        n_features={name: columns.stop - columns.start for name, columns in gathered.columns.items()},
        n_frames=gathered.n_frames,
        gfre={pair: gathered.gfre(*pair) for pair in pairs},
        gfrd={pair: gathered.gfrd(*pair) for pair in pairs},
        lfre=local,
        n_neighbours=n_neighbours,
        pointwise=pointwise,
        planes=_planes(gathered),
        sampled=_sampled(gathered, pointwise),
        drifts={
            (old, new): drift_of(gathered, pointwise, old, new)
            for old, new in combinations(latents, 2)
            if same_architecture(latents[old], latents[new])
        },
    )


def _planes(gathered: Gathered) -> dict[str, LatentMap]:
    rows = np.concatenate([sample[:, LABELS:].cpu().numpy() for sample in gathered.samples])
    return {name: principal_plane({"atoms": rows[:, columns]}) for name, columns in gathered.columns.items()}


def _sampled(gathered: Gathered, pointwise: PointwiseErrors) -> np.ndarray:
    """(n_sampled,) rows of the sampled atoms."""
    labels = np.concatenate([sample[:, :2].cpu().numpy() for sample in gathered.samples]).astype(int)
    first = np.searchsorted(pointwise.frame, labels[:, 0])
    return first + labels[:, 1]


def _known(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
