"""The whole story on an embedded potential: heat until it no longer knows, then ask the reference for the errors.

Malonaldehyde, whose potential was trained at 300 K, is held at 300 K and then heated to 2000 K. The run flags frames
and halts itself by the predicted uncertainty; the reference method, GFN2-xTB, then says how wrong the forces were.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.calculator import CalculationFailed
from ase.io import read

from ase_uq import embedded
from ase_uq.backends import load_backend
from ase_uq.diagnostics.latent import evenly
from ase_uq.display.progress import progress_bar
from ase_uq.display.representation import Brief
from ase_uq.dynamics import UncertaintyMonitor
from ase_uq.engines.ase.calculator import UncertainCalculator
from ase_uq.errors import MissingDependency, UncertaintyHalt
from ase_uq.io.frames import read_frames, write_frames
from ase_uq.io.results import annotated
from ase_uq.metrics import spearman
from ase_uq.sampling.ensembles import langevin
from ase_uq.sampling.momenta import set_thermal_momenta
from ase_uq.thresholds.criteria import Quantile
from ase_uq.thresholds.reduction import atom_norms
from ase_uq.uncertainty_model.model import UncertaintyModel

COLD, HOT = 300.0, 2000.0  # K
TIMESTEP = 0.5  # fs; the transferring proton wants a short step
FLAG = Quantile(0.99)
HALT_BY_FLAG = 2.5  # the default halt, in units of the flag
PROTON, DONOR, ACCEPTOR = 5, 0, 4  # atoms of the hydrogen bond
_MOST_LABELS, _COLD_LABELS, _ROWS = 40, 6, 8


@dataclass(frozen=True, repr=False)
class Run(Brief):
    """The heated run, step by step.

    Args:
        time: (n,) time of each step, fs.
        temperature: (n,) temperature of the thermostat, K.
        readings: (n,) largest ε_i of each step, eV/Å.
        flag: Threshold from which on frames are flagged, eV/Å.
        halt: Threshold from which on the run is halted, eV/Å.
        halted: Why and when the run halted itself; empty if it did not.
    """

    time: np.ndarray
    temperature: np.ndarray
    readings: np.ndarray
    flag: float
    halt: float
    halted: str


@dataclass(frozen=True)
class Comparison:
    """One frame, as predicted and as labelled by the reference.

    Args:
        time: Time of the frame, fs.
        temperature: Temperature of the thermostat, K.
        predicted: Largest ε_i, eV/Å.
        largest_error: Largest ‖F_ref - F‖ of an atom, eV/Å.
        rms_error: Root mean square of ‖F_ref - F‖ over the atoms, eV/Å.
        is_flagged: Whether the run flagged the frame.
        proton_moved: Whether the proton is closer to the other oxygen than to the one it started at.
    """

    time: float
    temperature: float
    predicted: float
    largest_error: float
    rms_error: float
    is_flagged: bool
    proton_moved: bool


@dataclass(frozen=True, repr=False)
class DemoResult(Brief):
    """The results of the demo.

    Args:
        run: The heated run.
        comparisons: The frames that the reference labelled, in the order of time.
        flagged: File with the flagged frames.
        labelled: File with the frames that have reference labels.
        figure: Picture of uncertainties and errors along the run.
    """

    run: Run
    comparisons: tuple[Comparison, ...]
    flagged: Path
    labelled: Path
    figure: Path


def run_demo(
    folder: str | os.PathLike[str],
    potential: str = "mace",
    *,
    seed: int = 0,
    cold_steps: int = 200,
    heating_steps: int = 1200,
    halt: float | None = None,
    tell: Callable[[str], None] = print,
    progress: bool = True,
) -> DemoResult:
    """Heats malonaldehyde until the run halts itself, and compares with the reference.

    Args:
        folder: Folder for `flagged.xyz`, `labelled.xyz` and `demo.png`; files of an earlier demo are replaced.
        potential: `mace`, `orb-direct` or `orb-conservative`.
        seed: Seed of velocities and thermostat.
        cold_steps: Number of steps at 300 K.
        heating_steps: Number of steps from 300 K to 2000 K.
        halt: Uncertainty at which the run is halted, eV/Å; by default two and a half times the flag.
        tell: Function that receives the text, one line at a time.
        progress: Whether to show a progress bar.

    Raises:
        MissingDependency: The potential's package, tblite or matplotlib is not installed.
        ValueError: There is no such embedded potential.
    """
    _check_installed()
    folder = Path(folder)
    calculator = UncertainCalculator(
        load_backend(f"embedded:{potential}"),
        UncertaintyModel.load(embedded.path(f"{potential.replace('-', '_')}.uq.safetensors")),
    )
    folder.mkdir(parents=True, exist_ok=True)
    flagged, labelled, figure = (folder / name for name in ("flagged.xyz", "labelled.xyz", "demo.png"))
    for file in (flagged, labelled, figure):
        file.unlink(missing_ok=True)
    tell(f"Malonaldehyde (9 atoms) with the embedded {potential} potential, which has only seen it at {COLD:.0f} K.")
    tell(f"Holding it at {COLD:.0f} K for {cold_steps * TIMESTEP:.0f} fs, then heating towards {HOT:.0f} K ...")
    start = read(embedded.path("malonaldehyde.xyz"))
    assert isinstance(start, Atoms)
    atoms = Atoms(start.numbers, start.positions, calculator=calculator)  # leaves out the labels of the file
    flag = calculator.threshold(FLAG)
    levels = (flag, HALT_BY_FLAG * flag if halt is None else halt)
    run, cold_frames = _heat(atoms, (cold_steps, heating_steps), levels, flagged, seed, progress)
    flagged_frames = read_frames(flagged) if flagged.exists() else []
    tell(f"  {run.halted or f'not halted within {2 * heating_steps * TIMESTEP:.0f} fs of heating'}")
    tell(f"  {len(flagged_frames)} frames above {run.flag:.3f} eV/Å (99 % of the calibration frames stay below it)")
    chosen = [*evenly(cold_frames, _COLD_LABELS), *evenly(flagged_frames, _MOST_LABELS - _COLD_LABELS)]
    tell(f"Asking the reference, GFN2-xTB, about {len(chosen)} of its frames ...")
    comparisons = tuple(sorted(_compare(chosen, run, labelled, progress), key=lambda row: row.time))
    for line in (*_table(comparisons), *_verdict(comparisons)):
        tell(line)
    _draw(run, comparisons, figure)
    tell(f"Files: {flagged} (to label), {labelled} (labelled, to train on), {figure} (the picture)")
    return DemoResult(run, comparisons, flagged, labelled, figure)


def _check_installed() -> None:
    for package in ("tblite", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependency(f'the demo needs {package}, which is not installed. Run: pip install "ase-uq[all]"')


def _heat(
    atoms: Atoms, steps: tuple[int, int], levels: tuple[float, float], flagged: Path, seed: int, progress: bool
) -> tuple[Run, list[Atoms]]:
    """The run, and the frames of its cold part that were not flagged.

    `steps` are the numbers of cold and of heating steps, `levels` the thresholds for flag and halt.
    """
    (cold_steps, heating_steps), (flag, halt) = steps, levels
    rng = np.random.default_rng(seed)
    set_thermal_momenta(atoms, COLD, rng)
    dynamics = langevin(atoms, timestep=TIMESTEP, temperature=COLD, friction=0.02, rng=rng)
    monitor = UncertaintyMonitor(dynamics, flag=flag, halt=halt, frames=flagged)
    rows: list[tuple[float, float, float]] = []
    cold_frames: list[Atoms] = []

    def record() -> None:
        step = dynamics.nsteps
        kelvin = COLD + (HOT - COLD) * min(1.0, max(0, step - cold_steps) / heating_steps)
        dynamics.set_temperature(temperature_K=kelvin)
        reading = float(atom_norms(_stored_std(atoms)).max())
        rows.append((step * TIMESTEP, kelvin, reading))
        if step <= cold_steps and step % 20 == 0:
            cold_frames.append(annotated(atoms, time_fs=step * TIMESTEP))
        bar.set_postfix_str(f"{kelvin:.0f} K, {reading:.3f} eV/Å", refresh=False)
        bar.update(step - bar.n)

    halted = ""
    # Held hot for as long again: it is a matter of chance where the run halts, but not whether it halts.
    most = cold_steps + 2 * heating_steps
    with progress_bar(total=most, unit="step", show=progress, leave=False) as bar:
        dynamics.attach(record)  # before the monitor, so that the last step is recorded
        dynamics.attach(monitor)
        try:
            dynamics.run(most)
        except UncertaintyHalt as stop:
            halted = (
                f"it halted itself at {rows[-1][0]:.1f} fs, {rows[-1][1]:.0f} K: force uncertainty "
                f"{stop.reading:.2f} eV/Å, halt at {stop.threshold:.2f} eV/Å"
            )
    time, temperature, readings = np.array(rows).T
    run = Run(time, temperature, readings, flag, halt, halted)
    return run, [frame for frame in cold_frames if atom_norms(_stored_std(frame)).max() < flag]


def _compare(frames: Sequence[Atoms], run: Run, labelled: Path, progress: bool) -> list[Comparison]:
    """Labels frames with the reference and writes each to the file at once."""
    from tblite.ase import TBLite

    reference = TBLite(method="GFN2-xTB", verbosity=0)
    rows = []
    for frame in progress_bar(frames, unit="frame", show=progress, leave=False):
        assert frame.calc is not None
        try:
            exact = Atoms(frame.numbers, frame.positions, calculator=reference)
            forces, energy = exact.get_forces(), exact.get_potential_energy()
        except CalculationFailed:
            continue  # the self-consistency cycle does not converge for every broken molecule
        time = float(frame.info.get("flag_time_fs", frame.info.get("time_fs", 0.0)))
        errors = np.linalg.norm(forces - frame.calc.results["forces"], axis=1)
        rows.append(
            Comparison(
                time=time,
                temperature=float(np.interp(time, run.time, run.temperature)),
                predicted=float(atom_norms(_stored_std(frame)).max()),
                largest_error=float(errors.max()),
                rms_error=float(np.sqrt(np.mean(errors**2))),
                is_flagged="flag_reason" in frame.info,
                proton_moved=frame.get_distance(PROTON, ACCEPTOR) < frame.get_distance(PROTON, DONOR),
            )
        )
        copy = annotated(frame, REF_energy=float(energy))
        copy.set_array("REF_forces", forces)
        write_frames(labelled, [copy], append=True)
    return rows


def _table(comparisons: Sequence[Comparison]) -> list[str]:
    """A few flagged and a few cold frames, as lines of a table."""
    flagged = [row for row in comparisons if row.is_flagged]
    cold = [row for row in comparisons if not row.is_flagged]
    head = "   time  thermostat  uncertainty  largest error  RMS error   the proton"
    lines = ["", head, "     fs           K         eV/Å           eV/Å       eV/Å"]
    for rows, count in ((cold, _COLD_LABELS // 2), (flagged, _ROWS)):
        lines += [
            f"{row.time:7.1f}{row.temperature:12.0f}{row.predicted:13.3f}{row.largest_error:15.3f}{row.rms_error:11.3f}"
            f"   {'has moved' if row.proton_moved else 'is at home'}{', flagged' if row.is_flagged else ''}"
            for row in evenly(rows, count)
        ]
    return [*lines, ""]


def _verdict(comparisons: Sequence[Comparison]) -> list[str]:
    lines = []
    for kind, is_flagged in (("not flagged", False), ("flagged", True)):
        rows = [row for row in comparisons if row.is_flagged == is_flagged]
        if rows:
            predicted, true = (
                np.median([getattr(row, name) for row in rows]) for name in ("predicted", "largest_error")
            )
            lines.append(
                f"  {kind + ':':13s}{len(rows):3d} frames, median uncertainty {predicted:.3f}, "
                f"median largest error {true:.3f} eV/Å"
            )
    if len(comparisons) > 2:
        rho = spearman([row.largest_error for row in comparisons], [row.predicted for row in comparisons])
        lines.append(f"  rank correlation of the two over all frames: {rho:.2f}")
    lines.append("  (Far from its data an uncertainty is right within a factor of two more often than not.)")
    return lines


def _draw(run: Run, comparisons: Sequence[Comparison], path: Path) -> None:
    from matplotlib import pyplot as plt

    from ase_uq.report import plots

    errors = np.full(len(run.time), np.nan)
    for row in comparisons:
        errors[np.argmin(np.abs(run.time - row.time))] = row.largest_error
    # Logarithmic, since far from the data errors are many times the uncertainty.
    levels = {"flag": run.flag, "halt": run.halt, "log": True}
    ax = plots.run(run.time, run.readings, errors=errors, temperature=run.temperature, **levels)
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.savefig(path, dpi=200)
    plt.close(figure)


def _stored_std(atoms: Atoms) -> np.ndarray:
    """(n_atoms, 3) standard deviations of the forces in the calculator results of a structure, eV/Å."""
    assert atoms.calc is not None
    return atoms.calc.results["forces_uncertainty"]
