"""The numbers of all learners, and their files."""

import csv
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from ase_uq import Quantile

STRATEGIES: dict[str, dict[str, Any]] = {
    "random": {"strategy": "random"},
    "lcmd": {"strategy": "lcmd"},
    "lcmd of atoms": {"strategy": "lcmd", "per": "environment"},
    "maxdist": {"strategy": "maxdist"},
    "maxdet": {"strategy": "maxdet"},
    "top": {"strategy": "top"},
    # More uncertain than nine calibration frames in ten, and short of 1 eV/Å.
    "bands": {"strategy": "bands", "flag": Quantile(0.9), "halt": 1.0},
}
SHARE = "share of new frames"


@dataclass(frozen=True)
class Row:
    """One number.

    Args:
        pool: Which one frames were chosen from.
        learner: What learned from the frames.
        measure: Of its error.
        test: Frames it was judged on.
        strategy: How frames were chosen.
        n: How many of them.
        seed: Of the start and the pool.
        value: In the unit that `measure` names.
    """

    pool: str
    learner: str
    measure: str
    test: str
    strategy: str
    n: int
    seed: int
    value: float


def read_csv(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [
            Row(**(entry | {"n": int(entry["n"]), "seed": int(entry["seed"]), "value": float(entry["value"])}))
            for entry in csv.DictReader(file)
        ]


def write_csv(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(rows[0])])
        for row in rows:
            writer.writerow([f"{x:.6g}" if isinstance(x, float) else x for x in astuple(row)])
