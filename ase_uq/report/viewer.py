"""Structures that can be turned in a page without a network: what plotly.js is to draw, and plotly.js itself.

plotly (MIT) ships its script in its wheel and says so in its API, which no viewer made for molecules does: py3Dmol,
ASE's own X3D and weas-widget fetch theirs while the page is looked at. `page.js` builds balls and sticks from what
`drawing` gives.
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

MOST_ATOMS = 400  # of one structure: the page stays small and turns smoothly

try:
    from plotly.offline import get_plotlyjs
except ImportError as error:
    raise MissingDependency(
        'structures that turn need plotly, which is not installed. Run: pip install "ase-uq[report]"'
    ) from error


@cache
def plotly_script() -> str:
    """The text of plotly.js."""
    return get_plotlyjs()


def packed(text: str) -> str:
    """Text as base64 of gzip, the same every time."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def cut_out(frame: ScoredFrame) -> tuple[Atoms, np.ndarray]:
    """What is drawn of a frame and the indices of its atoms: all, of a large one those around its most uncertain.

    Atoms whose positions are not finite are nowhere to be drawn.
    """
    atoms, indices = finite_part(frame.atoms)
    if not len(atoms):
        return atoms, indices
    centre = int(np.nan_to_num(frame.uncertainty[indices], nan=np.inf).argmax())
    part, among = surroundings(atoms, centre, MOST_ATOMS)
    return part, indices[among]


def drawing(frame: ScoredFrame) -> dict[str, Any]:
    """What `page.js` draws, as JSON values; uncertainties that are not finite are null."""
    atoms, indices = cut_out(frame)
    uncertainty = frame.uncertainty[indices]
    seen = balls(atoms)
    values = [float(f"{value:.6g}") if np.isfinite(value) else None for value in uncertainty]
    symbols = atoms.get_chemical_symbols()
    return {
        "positions": seen.positions.round(3).tolist(),
        "radii": seen.radii.round(3).tolist(),
        "bonds": seen.bonds.tolist(),
        "cell": seen.cell.round(3).tolist(),
        "uncertainties": values,
        "names": [
            f"{symbol} {index}: {value:.3g} eV/Å"
            for symbol, index, value in zip(symbols, indices, uncertainty, strict=True)
        ],
    }
