"""What an evaluation found: every score, and the samples it was computed from."""

import csv
import os
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from html import escape
from pathlib import Path
from textwrap import fill
from typing import Any

from ase_uq.diagnostics.samples import Sample
from ase_uq.diagnostics.table import MetricValue, aligned_table
from ase_uq.diagnostics.verdict import as_json, sentences
from ase_uq.display.representation import Brief
from ase_uq.io.files import check_writable


@dataclass(frozen=True, repr=False)
class Assessment(Brief):
    """How good uncertainties are: scores for people and programs, and the samples they were computed from, for figures.

    Args:
        scores: All numbers in tidy form, one per row.
        samples: Residuals with finite, positive standard deviations, by (method, quantity).
        n_frames: Labelled frames that were evaluated.
        tolerance: Force errors above it counted as bad, eV/Å.
        energy_offset: Offset of the calibration frames' energies that was taken out, in words; empty for none.
    """

    scores: tuple[MetricValue, ...]
    samples: Mapping[tuple[str, str], Sample]
    n_frames: int
    tolerance: float
    energy_offset: str = ""

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods, the primary one first."""
        return tuple(dict.fromkeys(method for method, _ in self.samples))

    @property
    def quantities(self) -> tuple[str, ...]:
        """Names of the quantities, in the order of the table."""
        return tuple(dict.fromkeys(quantity for _, quantity in self.samples))

    def select(
        self,
        *,
        method: str | None = None,
        quantity: str | None = None,
        element: str | None = None,
        metric: str | None = None,
    ) -> tuple[MetricValue, ...]:
        """The scores that match all given arguments."""
        arguments = {"method": method, "quantity": quantity, "element": element, "metric": metric}
        wanted = {name: value for name, value in arguments.items() if value is not None}
        return tuple(s for s in self.scores if all(getattr(s, name) == value for name, value in wanted.items()))

    def table(self) -> str:
        """The most telling scores as aligned text: one block per quantity, one row per method."""
        table = aligned_table(self.scores, self.n_frames, self.tolerance)
        if self.energy_offset:
            table += f" Energies: the\noffset of the calibration frames, {self.energy_offset}, was taken out."
        return table

    def describe(self) -> str:
        """What the scores say, in sentences."""
        return "\n".join(fill(text, 110) for text in sentences(self.scores, self.n_frames, self.tolerance))

    def numbers(self) -> dict[str, Any]:
        """All scores and the sentences, as JSON values; None where a number is not defined."""
        return as_json(self.scores, self.n_frames, self.tolerance)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(self.table())}</pre><p>{escape(self.describe())}</p>"

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes all scores in full precision, one per row; the file appears complete or not at all.

        Raises:
            ArtefactError: The file cannot be written.
        """
        path = Path(path)
        check_writable(path)
        part = path.with_name(path.name + ".part")
        try:
            with open(part, "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow([field.name for field in fields(MetricValue)])
                writer.writerows(astuple(score) for score in self.scores)
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
