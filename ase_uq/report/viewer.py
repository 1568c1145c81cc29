"""Structures that can be turned in a page without a network: the data that plotly.js draws, and plotly.js itself.

plotly (MIT) ships its script in its wheel and documents how to get it. No viewer made for molecules does this: py3Dmol,
ASE's own X3D and weas-widget download theirs while the page is viewed. `page.js` builds balls and sticks from the
values of `drawing`.
"""

import base64
import gzip
from functools import cache
from typing import Any

import numpy as np
from ase import Atoms

from ase_uq.errors import MissingDependency
from ase_uq.report.balls import balls, finite_part, surroundings
from ase_uq.report.survey import ScoredFrame

MOST_ATOMS = 400  # per structure, so that the page stays small and structures turn smoothly

try:
    from plotly.offline import get_plotlyjs
except ImportError as error:
    raise MissingDependency(
        'structures that can be turned need plotly, which is not installed. Run: pip install "ase-uq[report]"'
    ) from error


@cache
def plotly_script() -> str:
    """The text of plotly.js."""
    return get_plotlyjs()


@cache
def packed(text: str) -> str:
    """Text as base64 of gzip, without a time stamp: equal texts give equal results.

    Several pages have the same plotly.js, which takes half a second.
    """
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def cut_out(frame: ScoredFrame) -> tuple[Atoms, np.ndarray]:
    """The part of a frame that is drawn, and the indices of its atoms.

    Of a large frame, only the surroundings of its most uncertain atom are drawn. Atoms whose positions are not finite
    cannot be drawn.
    """
    atoms, indices = finite_part(frame.atoms)
    if not len(atoms):
        return atoms, indices
    centre = int(np.nan_to_num(frame.uncertainty[indices], nan=np.inf).argmax())
    part, among = surroundings(atoms, centre, MOST_ATOMS)
    return part, indices[among]


def drawing(frame: ScoredFrame) -> dict[str, Any]:
    """The data that `page.js` draws, as JSON values; uncertainties that are not finite are null."""
    atoms, indices = cut_out(frame)
    uncertainty = frame.uncertainty[indices]
    model = balls(atoms)
    values = [float(f"{value:.6g}") if np.isfinite(value) else None for value in uncertainty]
    symbols = atoms.get_chemical_symbols()
    return {
        "positions": model.positions.round(3).tolist(),
        "radii": model.radii.round(3).tolist(),
        "bonds": model.bonds.tolist(),
        "cell": model.cell.round(3).tolist(),
        "uncertainties": values,
        "names": [
            f"{symbol} {index}: {value:.3g} eV/Å"
            for symbol, index, value in zip(symbols, indices, uncertainty, strict=True)
        ],
    }
