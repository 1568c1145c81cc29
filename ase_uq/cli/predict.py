"""`ase-uq predict`: finished frames in, the same frames with results and uncertainties out."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from ase_uq.cli.options import UQ, BatchAtoms, Device, DType, Model, Seed, check_xyz_name

if TYPE_CHECKING:
    from ase import Atoms

    from ase_uq.prediction import Prediction


def predict(
    frames: Annotated[Path, typer.Argument(metavar="IN", help="Frames in any format that ASE reads.")],
    model: Model,
    out: Annotated[Path, typer.Option("--out", metavar="OUT.xyz", help="Extended XYZ file to write.")],
    uq: UQ = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT where it exists.")] = False,
    device: Device = "",
    dtype: DType = "",
    batch_atoms: BatchAtoms = 1000,
    seed: Seed = 0,
) -> None:
    """Score finished frames: every energy and force with its calibrated standard deviation.

    OUT has the frames of IN with the potential's results, forces_uncertainty and gamma of every atom in arrays, and
    energy_uncertainty in info. Memory does not grow with the file; OUT appears when all of it is there.

    [dim]ase-uq predict --model mace:my.model --uq my.uq.safetensors run.traj --out scored.xyz[/]
    """
    _check_arguments(frames, out, overwrite)
    from tqdm import tqdm

    from ase_uq.cli.potential import load_calculator, seed_all
    from ase_uq.frames import annotated, write_frames
    from ase_uq.stream import batches_of

    seed_all(seed)
    predictor = load_calculator(model, uq, device, dtype).predictor
    part = out.with_name(out.name + ".part")
    part.unlink(missing_ok=True)
    part.touch()
    tally = _Tally()
    start = perf_counter()
    try:
        with tqdm(desc="predict", unit="frame") as bar:
            for batch in batches_of(_frames(frames), batch_atoms):
                predictions = predictor.predict(batch, first=tally.n_frames)
                scored = [annotated(atoms, p.results) for atoms, p in zip(batch, predictions, strict=True)]
                write_frames(part, scored, append=True)
                tally.add(batch, predictions)
                bar.set_postfix_str(f"largest {tally.largest:.3g} eV/Å", refresh=False)
                bar.update(len(batch))
    except BaseException:
        if tally.n_frames:
            typer.echo(f"stopped early: the first {tally.n_frames} frames are in {part}.", err=True)
        else:
            part.unlink(missing_ok=True)
        raise
    os.replace(part, out)
    typer.echo(tally.summary(out, perf_counter() - start))


@dataclass
class _Tally:
    """What the summary line tells of all frames, without holding them."""

    n_frames: int = 0
    n_atoms: int = 0
    n_beyond: int = 0  # frames with an atom beyond the edge of the calibration data
    largest: float = float("-inf")
    where: str = ""

    def add(self, frames: "list[Atoms]", predictions: "list[Prediction]") -> None:
        for atoms, prediction in zip(frames, predictions, strict=True):
            norms = prediction.atom_uncertainty
            worst = int(norms.argmax())
            if norms[worst] > self.largest:
                self.largest = float(norms[worst])
                self.where = f"frame {self.n_frames}, atom {worst} ({atoms[worst].symbol})"
            self.n_beyond += not prediction["gamma"].max() <= 1  # NaN counts
            self.n_atoms += len(atoms)
            self.n_frames += 1

    def summary(self, out: Path, seconds: float) -> str:
        return (
            f"{self.n_frames} frames, {self.n_atoms} atoms in {seconds:.1f} s, written to {out}: "
            f"largest force uncertainty {self.largest:.3g} eV/Å in {self.where}; "
            f"{self.n_beyond} frames have an atom beyond the calibration data (gamma > 1)"
        )


def _check_arguments(frames: Path, out: Path, overwrite: bool) -> None:
    """Everything that can be refused before seconds are spent on importing a potential."""
    check_xyz_name(out, "--out")
    if not frames.is_file():
        raise FileNotFoundError(f"there is no file {frames}.")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists. Give another name, or --overwrite to replace it.")
    from ase_uq.artefact import check_writable

    check_writable(out)


def _frames(path: Path) -> "Iterator[Atoms]":
    """The frames of a file one by one.

    Raises:
        InputError: The file has none, or cannot be read to its end.
    """
    from ase.io import iread

    from ase_uq.errors import InputError

    count = 0
    reader = iread(path, ":")
    while True:
        try:
            atoms = next(reader, None)
        except Exception as error:  # ASE's readers raise anything from KeyError to UnknownFileTypeError
            raise InputError(
                f"{path} cannot be read after frame {count} ({type(error).__name__}: {error}). "
                "It is truncated or not in a format that ASE knows."
            ) from error
        if atoms is None:
            break
        count += 1
        yield atoms
    if not count:
        raise InputError(f"{path} has no frames.")
