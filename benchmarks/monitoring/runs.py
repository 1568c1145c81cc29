"""The runs that everything is judged on: how they are made, what is kept of them, and their files."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from ase_uq.sampling.perturbed import KINDS

METHODS = ("combined", "bll", "pdrum", "kernel")
THERMAL, CALIBRATION = ("reference",), ("reference", "calibration")
THERMAL_FRESH, FRESH = ("test",), ("test", "fresh")
GAMMA, COMMITTEE = "gamma", "committee"
READINGS = (*METHODS, GAMMA, COMMITTEE)
TIMESTEP, FRICTION = 0.5, 0.02  # fs, 1/fs
COLD, HOT = 300.0, 2000.0  # K
RUN = 2000  # steps of a run at 300 K, and of the heating
WARM_UP = 100  # steps with new momenta before anything is written down
BATCH = 40  # replicas evaluated together
AFTER = 100  # steps that a run goes on after it has failed, so that late alarms are seen
KEEP = 8  # steps between stored positions, those that the committee reads
# What a failure is: a bond 1.5 times as long as the covalent radii say or 0.6 times, atoms fused to less than 1.25
# times, an energy this far below the minimum, a temperature that no thermostat made, or useless forces.
LONGEST, SHORTEST, FUSED = 1.5, 0.6, 1.25
HOLE, BOILING, USELESS = 1.0, 5000.0, 5.0  # eV, K, eV/Å
HOT_STEPS = 100  # of the run that makes a hot frame
LOST = 50.0  # Å from the origin; beyond, a molecule has flown apart


@dataclass(frozen=True)
class Run:
    """One run, or one frame.

    Args:
        readings: (n_steps, n_methods) largest ε_i, eV/Å, and largest gamma.
        energy: (n_steps,) of the potential above that of the relaxed molecule, eV.
        temperature: (n_steps,) K.
        bonds: (n_steps,) whether a bond is broken or atoms are fused.
        labelled: (n_labels,) steps at which the reference was asked.
        norms: (n_labels, n_atoms, n_methods) ε_i and gamma there.
        errors: (n_labels, n_atoms) ‖F_ref - F‖, eV/Å; infinite where the reference did not converge.
        kept: (n_kept,) steps whose positions are stored.
        positions: (n_kept, n_atoms, 3) Å.
    """

    readings: np.ndarray
    energy: np.ndarray
    temperature: np.ndarray
    bonds: np.ndarray
    labelled: np.ndarray
    norms: np.ndarray
    errors: np.ndarray
    kept: np.ndarray
    positions: np.ndarray

    def failure(self, *, useless: bool) -> int | None:
        """The first step at which a bond has broken, atoms have fused or the energy has diverged.

        Args:
            useless: Whether forces that are no good at all, or no reference, count too.
        """
        failed = self.bonds.astype(bool) | (self.energy < -HOLE) | (self.temperature > BOILING)
        if useless:
            failed[self.labelled[self.errors.max(1, initial=0.0) > USELESS]] = True
        return first(failed)

    def event(self, tolerance: float) -> int | None:
        """The first labelled step whose largest force error exceeds a tolerance."""
        found = first(self.errors.max(1) > tolerance)
        return None if found is None else int(self.labelled[found])


@dataclass(frozen=True)
class Plan:
    """What an ensemble is.

    Args:
        n_runs: Independent runs, or frames where `steps` is 0.
        steps: Of a run.
        hot: Whether the thermostat goes from COLD to HOT within RUN steps.
        perturbed: Kinds of perturbed frames that runs start from, as many of each; empty for thermal ones.
        label_every: Steps between labels.
    """

    n_runs: int
    steps: int
    hot: bool = False
    perturbed: tuple[str, ...] = ()
    label_every: int = 2

    @property
    def conditions(self) -> str:
        length = f"{self.steps * TIMESTEP / 1000:g} ps"
        start = "perturbed starts" if self.perturbed else "thermal starts"
        heat = f", heated to {HOT:.0f} K within {RUN * TIMESTEP / 1000:g} ps and held" if self.hot else ""
        return (
            f"{self.n_runs} runs of {length} at most, {start}, {COLD:.0f} K{heat}"
            if self.steps
            else f"{self.n_runs} frames"
        )


# A seed an ensemble: its place in this table. Thresholds see only the first two.
ENSEMBLES = {
    "reference": Plan(40, RUN, label_every=16),
    "calibration": Plan(200, 0, perturbed=KINDS),
    "test": Plan(100, RUN, label_every=16),
    "fresh": Plan(200, 0, perturbed=KINDS),
    "heating": Plan(40, 2 * RUN, hot=True),
    "strained": Plan(39, RUN, perturbed=("rattled", "strained", "compressed")),
}
PERTURBED = ("calibration", "fresh", "strained")


def first(condition: np.ndarray) -> int | None:
    """Place of the first true entry."""
    return int(condition.argmax()) if condition.any() else None


def save(path: Path, runs: Sequence[Run]) -> None:
    arrays = {}
    for field in fields(Run):
        parts = [getattr(run, field.name) for run in runs]
        arrays[field.name] = np.concatenate(parts)
        arrays[f"{field.name}_lengths"] = np.array([len(part) for part in parts])
    np.savez_compressed(path, **arrays)


def load(path: Path) -> list[Run]:
    with np.load(path) as stored:
        columns = [
            np.split(stored[field.name], np.cumsum(stored[f"{field.name}_lengths"])[:-1]) for field in fields(Run)
        ]
    return [Run(*parts) for parts in zip(*columns, strict=True)]
