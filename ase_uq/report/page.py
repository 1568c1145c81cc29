"""One page for people: how uncertain a potential was along scored frames, where, and whether to believe it.

The page is one file that needs no network: it contains the pictures, the data and the script that turns structures, and
its content security policy makes browsers refuse anything else.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ase import Atoms

from ase_uq.backends.base import Backend
from ase_uq.diagnostics.latent import LatentMap, evenly, frame_features, principal_plane
from ase_uq.display.representation import Brief
from ase_uq.dynamics.policy import check_order
from ase_uq.io.frames import Frames, read_frames
from ase_uq.report.output import check_outputs, publish
from ase_uq.report.sections import Sections
from ase_uq.report.survey import Survey, survey
from ase_uq.report.template import page_script, rendered
from ase_uq.report.viewer import plotly_script
from ase_uq.report.words import counted
from ase_uq.thresholds.criteria import Criterion
from ase_uq.thresholds.reduction import Reduction
from ase_uq.uncertainty_model.model import UncertaintyModel

_MOST_REFERENCE = 500  # training and calibration frames in the latent map, each


@dataclass(frozen=True, repr=False)
class Report(Brief):
    """A written report.

    Args:
        page: The HTML file.
        pictures: The PNG files.
        survey: Survey of the frames.
        flag: Threshold, eV/Å; None if none was given.
        halt: Threshold, eV/Å; None if none was given.
    """

    page: Path
    pictures: tuple[Path, ...]
    survey: Survey
    flag: float | None
    halt: float | None

    def summary(self) -> str:
        """One line for people."""
        surveyed = self.survey
        text = f"{counted(surveyed.n_frames, 'frame')}, {counted(len(surveyed.numbers), 'atom')}"
        for name, level in (("flag", self.flag), ("halt", self.halt)):
            if level is not None:
                text += f", {int(surveyed.above(level).sum())} at or above {name}"
        if surveyed.n_without:
            text += f"; {surveyed.n_without} without uncertainties left out"
        pictures = counted(len(self.pictures), "picture")
        return f"{text}. Page written to {self.page}, {pictures} to {self.pictures[0].parent}"


def write_report(
    path: str | os.PathLike[str],
    frames: Frames | Iterable[Atoms],
    uncertainty_model: UncertaintyModel,
    *,
    flag: float | str | Criterion | None = None,
    halt: float | str | Criterion | None = None,
    reduction: Reduction | None = None,
    tolerance: float = 0.3,
    label_keys: tuple[str, str, str] | None = None,
    backend: Backend | None = None,
    train: Frames | None = None,
    calibration: Frames | None = None,
    pictures: str | os.PathLike[str] | None = None,
    sources: Mapping[str, str] | None = None,
    batch_atoms: int | None = None,
) -> Report:
    """Writes a page about scored frames, and its pictures as PNG files.

    Args:
        path: HTML file; replaced if it exists.
        frames: Scored frames, as a file or an iterable; read once. Frames of a file that cannot be read, and labels and
            notes that cannot be used, are left out with a warning.
        uncertainty_model: Uncertainty model that the frames were scored with.
        flag: Threshold, eV/Å, or a criterion such as `Quantile(0.99)`.
        halt: Threshold, eV/Å, or a criterion; above `flag`.
        reduction: How a frame becomes a reading; the largest ε_i by default.
        tolerance: Force errors above it count as wrong, eV/Å.
        label_keys: Names of energy, forces and stress of the reference; `REF_energy`, `REF_forces`, `REF_stress` by
            default.
        backend: The potential, for the latent map; without it there is no map.
        train: Training frames, for the latent map.
        calibration: Calibration frames, for the latent map.
        pictures: Folder of the PNG files, created if it is missing; by default `<path>_figures`. Pictures of an
            earlier report in it are replaced, other files are left alone.
        sources: Further lines for the section "Where this comes from", by name; for example the files.
        batch_atoms: Largest number of atoms evaluated together, for the latent map; None for the default of the device.

    Raises:
        InputError: No frame has uncertainties, uncertainties have another shape than their frame or are of another
            uncertainty model, or the potential cannot evaluate a frame.
        LabelError: The labels are the potential's own, or training or calibration frames cannot be read.
        ArtefactError: A file cannot be written; the files that were there before remain.
        FileExistsError: The folder of the pictures is a file, or contains a file that is not ours and that a picture
            would overwrite.
        ValueError: Flag is not below halt, a threshold or the tolerance is not positive, calibration data cannot
            support a criterion, or frames for the latent map were given without the potential.
    """
    path = Path(path)
    folder = path.with_name(f"{path.stem}_figures") if pictures is None else Path(pictures)
    if backend is None and not (train is None and calibration is None):
        raise ValueError(
            "training and calibration frames are for the latent map, which needs the potential: give the backend too."
        )
    if not tolerance > 0:
        raise ValueError(f"the tolerance is {tolerance!r} eV/Å; a positive force error was expected.")
    check_outputs(path, folder)
    reduction = reduction or Reduction()
    flag, halt = _levels(uncertainty_model, flag, halt, reduction)
    shift = uncertainty_model.energy_shift
    surveyed = survey(
        frames,
        reduction=reduction,
        label_keys=label_keys,
        energy_shift=shift,
        scored_with=uncertainty_model.name,
    )
    plane = None
    if backend is not None:
        plane = _plane(backend, surveyed, {"training": train, "calibration": calibration}, batch_atoms)
    sections = Sections(surveyed, uncertainty_model, flag, halt, reduction, dict(sources or {}), tolerance)
    values = sections.values(plane)
    text = rendered("page.html.j2", values | {"script": page_script(), "library": plotly_script()})
    return Report(path, publish(path, text, folder, sections.album.files), surveyed, flag, halt)


def _levels(
    model: UncertaintyModel,
    flag: float | str | Criterion | None,
    halt: float | str | Criterion | None,
    reduction: Reduction,
) -> tuple[float | None, float | None]:
    """Both thresholds as numbers, eV/Å, checked; None if not given."""
    levels = [None if level is None else model.threshold(level, reduction) for level in (flag, halt)]
    for name, level in zip(("flag", "halt"), levels, strict=True):
        if level is not None and not level > 0:
            raise ValueError(f"{name} is {level:g} eV/Å; a positive force uncertainty was expected.")
    flag, halt = levels
    if flag is not None and halt is not None:
        check_order(flag, halt)
    return flag, halt


def _plane(
    backend: Backend, surveyed: Survey, known: Mapping[str, Frames | None], batch_atoms: int | None
) -> LatentMap | None:
    """The latent map of the known and the scored frames; None if no scored frame is finite."""
    groups = {
        name: evenly(read_frames(frames, name=f"{name} frames"), _MOST_REFERENCE)
        for name, frames in known.items()
        if frames is not None
    }
    groups["scored"] = [frame.atoms for frame in surveyed.kept if frame.is_finite]
    if not groups["scored"]:
        return None
    return principal_plane(
        {name: frame_features(backend, frames, batch_atoms=batch_atoms) for name, frames in groups.items()}
    )
