"""Whether stresses need a far field, and where it ends: cells of stress components, before and after.

    python benchmarks/far_field_stress.py [--data ../shared/data] [--methods bll kernel] [--frames 60]
                                          [--out benchmarks/results/far_field_stress]

One set has stress labels, mp_pbe: 200 frames of MPtrj to fit on and 125 to calibrate on, with SevenNet-0, and alkali
compounds at high temperature and pressure far from both. They are judged in three bins of the DFT pressure, since the
errors of the last are hundreds of times those of the first. Ways to calibrate the stress scores of a method:

    affine or power   the better of the two on left-out calibration frames, which says nothing of what is far away
    far field         the law of `ase_uq.calibration.far_field` with one of these σ∞, all coherent sums over atoms (N/V
                      times a mean):
        bonds               forces at bonds, Σ_i σ∞,i d_i / √10 V, and the predicted stress (`stress_variance`)
        bonds alone         the first of these
        predicted alone     the second, and a tenth of the next
        virial of training  what a component of the virial per atom of training frames is, and the predicted stress
        energy              σ∞ of the energy per volume, ℓ Σ_i σ∞,i / V, and the predicted stress

With one set nothing can be chosen by leaving one out: the table is all there is. Writes OUT.md.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from far_field import BATCH_ATOMS, fitted, streams
from far_field_energies import Cell, text_of
from quality import SETS, frames_of
from scipy.stats import spearmanr

from ase_uq import load_backend
from ase_uq.backends.base import Backend
from ase_uq.calibration import Calibrator, Residuals, fit_calibrator, fit_far_field
from ase_uq.fitting.know_nothing import parents_of
from ase_uq.forward_pass import ForwardPass
from ase_uq.io.source import Source
from ase_uq.methods.base import Head
from ase_uq.stream.labelled import LabelledStream
from ase_uq.stream.passes import Pass, passes
from ase_uq.uncertainty_model.far_field import FarField

SET = "mp_pbe"
PRESSURES = (10.0, 50.0)  # GPa
BEFORE, DEFAULT = "affine or power", "bonds"
ENDS = (DEFAULT, "bonds alone", "predicted alone", "virial of training", "energy")


@dataclass(frozen=True)
class Frames:
    """Frames of a split.

    Args:
        residuals: (n_frames, 6) errors, eV/Å³.
        stress: (n_frames,) root mean square component of the predicted stress, eV/Å³.
        density: (n_frames,) atoms per volume, 1/Å³.
        bonds: (n_frames,) Σ_i σ∞,i d_i / √10 V, eV/Å³.
        energy: (n_frames,) σ∞ of the energy per atom, eV.
        scores: (n_frames, n_scores) of the stress, by method.
    """

    residuals: np.ndarray
    stress: np.ndarray
    density: np.ndarray
    bonds: np.ndarray
    energy: np.ndarray
    scores: Mapping[str, np.ndarray]

    def limits(self, end: str, virial: float) -> np.ndarray:
        """(n_frames,) σ∞², (eV/Å³)²; `virial` is that of the training frames, eV."""
        parts = {
            "bonds": (self.bonds, self.stress),
            "bonds alone": (self.bonds,),
            "predicted alone": (self.stress, 0.1 * virial * self.density),
            "virial of training": (virial * self.density, self.stress),
            "energy": (self.energy * self.density, self.stress),
        }[end]
        return sum((part**2 for part in parts), start=np.zeros(len(self.stress)))

    def rows(self, method: str, limits: np.ndarray | None) -> Residuals:
        squares = (self.residuals**2).sum(1)
        return Residuals(self.scores[method], squares, 6, np.arange(len(squares)), limits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--methods", nargs="+", default=["bll", "kernel"])
    parser.add_argument("--frames", type=int, default=60, help="most frames of a split, evenly spread over it")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/far_field_stress"))
    arguments = parser.parse_args()
    data = SETS[SET]
    frames = frames_of(data.folder, arguments.data)
    backend = load_backend(data.potential)
    heads, nothing = fitted(backend, arguments.methods, train := frames.pop("train"), SET)
    binned = {title: part for split, atoms in frames.items() for title, part in by_pressure(split, atoms).items()}
    splits = {
        split: frames_in(heads, nothing.far_field, batches)
        for split, batches in streams(backend, binned, arguments.frames, SET).items()
    }
    virial = virial_of(backend, [parent.atoms for parent in parents_of(train, backend.cutoff)])
    calibration = splits.pop("calib")
    cells: dict[str, dict[str, list[Cell]]] = {}
    for method in heads:
        calibrators: dict[str, Calibrator | None] = {
            end: fit_far_field(
                calibration.rows(method, calibration.limits(end, virial)), nothing.scores[method]["stress"]
            )
            for end in ENDS
        }
        calibrators[BEFORE] = fit_calibrator(calibration.rows(method, None)).calibrator
        cells[method] = {
            end: [judged(split, of_split, method, end, calibrator, virial) for split, of_split in splits.items()]
            for end in (BEFORE, *ENDS)
            if (calibrator := calibrators[end]) is not None
        }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    counts = {split: len(of_split.stress) for split, of_split in splits.items()}
    arguments.out.with_suffix(".md").write_text(text := markdown(cells, counts, arguments))
    print(text)


def by_pressure(split: str, frames: Sequence[Atoms]) -> dict[str, list[Atoms]]:
    """Splits out of distribution in bins; all others whole."""
    if not split.startswith("ood"):
        return {split: list(frames)}
    low, high = PRESSURES
    titles = (f"below {low:g} GPa", f"{low:g} to {high:g} GPa", f"above {high:g} GPa")
    bins: dict[str, list[Atoms]] = {f"{split}, {title}": [] for title in titles}
    for atoms in frames:
        bins[f"{split}, {titles[np.searchsorted(PRESSURES, atoms.info['pressure_GPa'], side='right')]}"].append(atoms)
    return bins


def frames_in(heads: Mapping[str, Head], far_field: FarField, batches: LabelledStream) -> Frames:
    columns: list[list[torch.Tensor]] = []
    scores: dict[str, list[torch.Tensor]] = {method: [] for method in heads}
    for forward_pass, targets in batches:
        assert forward_pass.stress is not None
        assert forward_pass.volumes is not None
        assert targets.stress is not None
        limits = far_field.limits(forward_pass)
        assert limits.stress is not None
        stress = forward_pass.stress.double()
        square = stress.square().mean(1)
        bonds = (limits.stress - square).clamp(min=0).sqrt()
        density = forward_pass.n_atoms_of_frame / forward_pass.volumes
        columns.append([targets.stress - stress, square.sqrt(), density, bonds, limits.energy.sqrt()])
        for method, head in heads.items():
            with torch.no_grad():
                scores[method].append(head(forward_pass).stress)
    joined = [torch.cat(column).cpu().numpy() for column in zip(*columns, strict=True)]
    return Frames(*joined, {method: torch.cat(parts).cpu().numpy() for method, parts in scores.items()})


def virial_of(backend: Backend, frames: Sequence[Atoms]) -> float:
    """Root mean square component of the predicted virial per atom, eV."""

    def virials(forward_pass: ForwardPass) -> torch.Tensor:
        assert forward_pass.stress is not None
        assert forward_pass.volumes is not None
        volumes = forward_pass.volumes / forward_pass.n_atoms_of_frame
        return (forward_pass.stress.double() * volumes[:, None]).cpu()

    events = passes(backend, Source(list(frames)), virials, batch_atoms=BATCH_ATOMS)
    return float(torch.cat([event.value for event in events if isinstance(event, Pass)]).square().mean().sqrt())


def judged(split: str, frames: Frames, method: str, end: str, calibrator: Calibrator, virial: float) -> Cell:
    limits = None if end == BEFORE else torch.from_numpy(frames.limits(end, virial))
    variance = calibrator.variance(torch.from_numpy(frames.scores[method]), limits).numpy()
    squares = (frames.residuals**2).mean(1)
    nll = 0.5 * np.mean(np.log(variance) + squares / variance)
    constant = 0.5 * (np.log(squares.mean()) + 1)
    rank = float(spearmanr(squares, variance)[0]) if len(np.unique(variance)) > 1 else float("nan")
    return Cell(split, float(np.sqrt(squares.mean())), float(nll - constant), float((squares / variance).mean()), rank)


def markdown(
    cells: Mapping[str, Mapping[str, Sequence[Cell]]], counts: Mapping[str, int], arguments: argparse.Namespace
) -> str:
    lines = [
        "# The far field of stresses",
        "",
        f"`python benchmarks/far_field_stress.py --frames {arguments.frames}`: SevenNet-0 on mp_pbe. In a cell NLL of "
        "a stress component above the best constant told the truth, mean z² and Spearman of frames. "
        f"`{DEFAULT}` is the default.",
        "",
        f"| method | σ∞ | {' | '.join(f'{split} ({count})' for split, count in counts.items())} |",
        "|---|---|" + "---|" * len(counts),
    ]
    first = next(iter(cells.values()))[BEFORE]
    lines.append(f"| RMSE, eV/Å³ | | {' | '.join(f'{cell.rmse:.4f}' for cell in first)} |")
    for method, by_end in cells.items():
        for end, of_end in by_end.items():
            title = f"{end} (default)" if end == DEFAULT else end
            lines.append(f"| {method} | {title} | {' | '.join(text_of(cell) for cell in of_end)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
