"""One page for people: what several potentials see of the same atoms, and which atoms only one of them sees."""

import os
import platform
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from ase_uq.diagnostics.comparison import Comparison, Pair, Unseen
from ase_uq.errors import InputError
from ase_uq.io.frames import Frames
from ase_uq.io.source import Source
from ase_uq.report import plots
from ase_uq.report.balls import finite_part, surroundings
from ase_uq.report.comparison_plots import error_table, latent_maps, reconstruction
from ase_uq.report.output import check_outputs, publish
from ase_uq.report.pictures import Album, Picture
from ase_uq.report.template import rendered
from ase_uq.report.viewer import MOST_ATOMS
from ase_uq.report.words import counted, number

_DRAWN = 3  # frames of each potential
_LISTED = 5  # frames of each pair
_MOST_ELEMENTS = 12  # in the picture; the table has all
_SHARE = "GFRE / spread within elements"


def write_comparison(
    path: str | os.PathLike[str],
    comparison: Comparison,
    frames: Frames,
    *,
    pictures: str | os.PathLike[str] | None = None,
    sources: Mapping[str, str] | None = None,
) -> tuple[Path, ...]:
    """Writes a page about a comparison, and its pictures as PNG files.

    Args:
        path: HTML file; replaced if it exists.
        comparison: From `compare`.
        frames: The frames that were compared, of which the worst are drawn.
        pictures: Folder of the PNG files, created if it is missing; by default `<path>_figures`. Pictures of an
            earlier page in it are replaced, other files are left alone.
        sources: Further lines for the section "Where this comes from", by name; for example the potentials.

    Returns:
        The PNG files.

    Raises:
        InputError: There are other frames than were compared.
        ArtefactError: A file cannot be written; the files that were there before remain.
        FileExistsError: As in `write_report`.
    """
    path = Path(path)
    folder = path.with_name(f"{path.stem}_figures") if pictures is None else Path(pictures)
    check_outputs(path, folder)
    page = _Page(comparison, dict(sources or {}))
    text = rendered("comparison.html.j2", page.values(frames))
    return publish(path, text, folder, page.album.files)


class _Page:
    """The contents of the page."""

    def __init__(self, comparison: Comparison, sources: dict[str, str]) -> None:
        self._found, self._sources = comparison, sources
        self.album = Album()

    def values(self, frames: Frames) -> dict[str, Any]:
        """The values of `comparison.html.j2`. Pictures are drawn in the order of the page."""
        found = self._found
        return {
            "names": found.names,
            "facts": [
                ("frames", f"{found.n_frames:,}", counted(len(found.pointwise.numbers), "atom")),
                *((f"features of {name}", f"{n:,}", "for each atom") for name, n in found.n_features.items()),
            ],
            "sentences": found.describe().splitlines(),
            "matrix": self._matrix(),
            "pairs": self._pairs(),
            "by_element": self._by_element() if len(found.elements) > 1 else None,
            "elements": self._elements(),
            "map": self._maps(),
            "worst": self._worst(),
            "cards": self._cards(frames),
            "n_neighbours": found.n_neighbours,
            "n_sampled": len(found.sampled),
            "provenance": {
                **self._sources,
                "written": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z} by ase_uq {version('ase-uq')}, ASE "
                f"{version('ase')}, torch {version('torch')}, Python {platform.python_version()}",
            },
            "version": version("ase-uq"),
        }

    def _matrix(self) -> Picture:
        found = self._found

        def square(errors: Mapping[Pair, float]) -> np.ndarray:
            return np.array([[errors.get((a, b), np.nan) for b in found.names] for a in found.names])

        matrices = {
            "one linear map (GFRE)": square(found.gfre),
            _SHARE: square({pair: found.beyond_elements(pair) for pair in found.pairs}),
            f"maps on {found.n_neighbours} neighbours (LFRE)": square({p: v.value for p, v in found.lfre.items()}),
        }
        ax = reconstruction(matrices, found.names)
        told = "; ".join(f"from {a} to {b} {found.gfre[a, b]:.2f}" for a, b in found.pairs)
        return self.album.add(
            "reconstruction",
            ax,
            f"Errors of reconstruction as three tables. Global errors: {told}.",
            "0: the features of the column follow from those of the row. 1: they do not at all. In the middle, the "
            "error beside the spread of the features within each element: at about 1 or above, the row says no more of "
            "an atom than its element.",
        )

    def _pairs(self) -> dict[str, Any]:
        found = self._found
        rows = []
        for pair in found.pairs:
            value, low, high = found.lfre[pair]
            interval = "" if np.isnan(low) else f" ({low:.3f} to {high:.3f})"
            cells = [f"{found.gfre[pair]:.3f}", number(found.beyond_elements(pair)), f"{value:.3f}{interval}"]
            rows.append((" to ".join(pair), [*cells, f"{found.gfrd[pair]:.3f}"]))
        heads = ["from, to", "GFRE", _SHARE, "LFRE (95 % interval)", "GFRD"]
        return {"heads": heads, "rows": rows}

    def _by_element(self) -> Picture:
        found = self._found
        symbols = found.most_frequent(_MOST_ELEMENTS)
        cells = [[found.beyond_elements(pair, symbol) for symbol in symbols] for pair in found.pairs]
        ax = error_table(cells, [f"{a} → {b}" for a, b in found.pairs], symbols, title=_SHARE)
        ax.set_xlabel("element", fontsize=9)
        caption = "Errors of the atoms of each element, beside the spread of the features within it."
        if len(found.elements) > len(symbols):
            caption += f" The {len(symbols)} most frequent of {len(found.elements)} elements; the table has all."
        alt = f"Table of errors by element: {', '.join(symbols)} for {counted(len(found.pairs), 'pair')} of potentials."
        return self.album.add("elements", ax, alt, caption)

    def _elements(self) -> dict[str, Any]:
        found = self._found
        rows = []
        for symbol in found.elements:
            mine = found.pointwise.numbers == chemical_symbols.index(symbol)
            cells = [
                f"{found.error_of_element(pair, symbol):.3f}, {number(found.beyond_elements(pair, symbol))}"
                for pair in found.pairs
            ]
            rows.append((symbol, [f"{int(mine.sum()):,}", *cells]))
        return {"heads": ["element", "atoms", *(" to ".join(pair) for pair in found.pairs)], "rows": rows}

    def _maps(self) -> Picture:
        found = self._found
        others = "the other" if len(found.names) == 2 else "the best of the others"
        ax = latent_maps(
            {name: plane.coordinates["atoms"] for name, plane in found.planes.items()},
            {name: found.seen_by_no_other(name)[found.sampled] for name in found.names},
            [chemical_symbols[z] for z in found.pointwise.numbers[found.sampled]],
            explained={name: plane.explained for name, plane in found.planes.items()},
            label=f"what {others} misses",
        )
        return self.album.add(
            "latent_maps",
            ax,
            f"Principal components of {counted(len(found.sampled), 'atom')} in features of {', '.join(found.names)}.",
            "Each mark is an atom, along the two directions in which the features of the potential named above differ "
            f"most. The colour says how much of its features {others} misses, as a share of the spread of all; the "
            "scale ends at the highest hundredth.",
        )

    def _worst(self) -> list[dict[str, Any]]:
        tables = []
        for pair in self._found.pairs:
            errors = self._found.pointwise.errors[pair]
            rows = [
                (str(w.frame), [f"{w.symbol} {w.atom}", f"{w.error:.2f}"]) for w in self._found.worst(errors, _LISTED)
            ]
            median = float(np.median(errors))
            title = f"{pair[1]} sees, {pair[0]} does not (median atom {median:.2f})"
            tables.append({"title": title, "heads": ["frame", "atom", "error"], "rows": rows})
        return tables

    def _cards(self, frames: Frames) -> list[dict[str, Any]]:
        found = self._found
        errors = {name: found.seen_by_no_other(name) for name in found.names}
        worst = {name: found.worst(each, _DRAWN) for name, each in errors.items()}
        structures = _structures(frames, {one.frame for each in worst.values() for one in each}, found.n_frames)
        cards = []
        for number_, (name, each) in enumerate(worst.items()):
            top = each[0].error or 1.0
            for one in each:
                mine = errors[name][found.pointwise.frame == one.frame]
                cards.append(self._card(number_, name, one, structures[one.frame], mine, top))
        return cards

    def _card(
        self, which: int, name: str, worst: Unseen, atoms: Atoms, errors: np.ndarray, top: float
    ) -> dict[str, Any]:
        part, indices = finite_part(atoms)
        shown, among = surroundings(part, worst.atom, MOST_ATOMS)
        ax = plots.structure(shown, errors[indices[among]], largest=top)
        formula = atoms.get_chemical_formula()
        alt = f"Frame {worst.frame}, {formula}, of which {name} sees most that no other potential does."
        return {
            "picture": self.album.add(f"unseen_{which}_{worst.frame}", ax, alt),
            "name": name,
            "frame": worst.frame,
            "formula": formula,
            "atom": f"{worst.symbol} {worst.atom}",
            "error": worst.error,
        }


def _structures(frames: Frames, wanted: set[int], n_frames: int) -> dict[int, Atoms]:
    found: dict[int, Atoms] = {}
    last = -1
    for last, atoms in Source(frames).read():
        if last in wanted and isinstance(atoms, Atoms):
            found[last] = atoms
    if last + 1 != n_frames or found.keys() != wanted:
        raise InputError(f"there are {last + 1} frames, but {n_frames} were compared: give the same ones.")
    return found
