"""`ase-uq compare`: takes several potentials and frames, and shows what each sees of what the others see."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ase_uq.cli.options import JSON, BatchAtoms, Device, DType, Seed
from ase_uq.cli.outputs import check_inputs


def compare(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="A B [C ...] FRAMES", help="The potentials, each a SPEC as in `ase-uq score`, then the frames."
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="HTML page to write; replaced if it exists.")
    ] = Path("comparison.html"),
    plots: Annotated[
        Path | None,
        typer.Option(
            "--plots", metavar="FOLDER", show_default="OUT_figures", help="Folder for PNG figures; created if missing."
        ),
    ] = None,
    block: Annotated[
        int,
        typer.Option(
            "--block", min=1, help="Number of consecutive frames that stay together: as many as are correlated."
        ),
    ] = 1,
    as_json: JSON = False,
    device: Device = "",
    dtype: DType = "",
    batch_atoms: BatchAtoms = None,
    seed: Seed = 0,
) -> None:
    """Show how much of what one potential sees of atoms another sees too, without any labels.

    Features of each potential are reconstructed from those of each other one, on frames that the reconstruction was
    not fitted on: by one linear map (GFRE) and by maps around each atom (LFRE). The page has the errors of all pairs
    and of each element, the atoms and frames that one potential sees and another does not, and maps of the atoms. Of a
    potential and a fine-tuned one it also says how far the features moved.

    [dim]ase-uq compare mace:old.model mace:new.model frames.xyz --out comparison.html[/]
    """
    if len(words) < 3:
        raise typer.BadParameter(
            "give at least two potentials and then the frames: ase-uq compare A B FRAMES.", param_hint="'A B FRAMES'"
        )
    *specs, last = words
    frames = Path(last)
    if repeated := {spec for spec in specs if specs.count(spec) > 1}:
        raise typer.BadParameter(f"{min(repeated)} is given twice: compare it with others.", param_hint="'A B'")
    if out.suffix not in (".html", ".htm"):
        raise typer.BadParameter(f"{out} is an HTML page: give a name that ends in .html.", param_hint="'--out'")
    check_inputs(frames)
    from ase_uq.report.output import check_outputs

    check_outputs(out, out.with_name(f"{out.stem}_figures") if plots is None else plots)
    from ase_uq.cli.potential import load_potential, seed_all
    from ase_uq.diagnostics.comparison import compare as compared
    from ase_uq.report.comparison import write_comparison

    seed_all(seed)
    potentials = {name: load_potential(spec, device, dtype) for name, spec in _named(specs).items()}
    comparison = compared(potentials, frames, block=block, seed=seed, batch_atoms=batch_atoms)
    sources = {
        "frames": last,
        **{f"{name} is" if name != spec else "potential": spec for name, spec in _named(specs).items()},
    }
    pictures = write_comparison(out, comparison, frames, pictures=plots, sources=sources)
    typer.echo(json.dumps(comparison.numbers(), indent=2) if as_json else comparison.table())
    typer.echo(f"Page written to {out}, {len(pictures)} pictures to {pictures[0].parent}", err=as_json)


def _named(specs: list[str]) -> dict[str, str]:
    """SPECs by short names: what follows the prefix and the folders, or all of it where that would name two."""
    short = [Path(spec.partition(":")[2] or spec).name.removesuffix(".model") or spec for spec in specs]
    return {spec if short.count(name) > 1 else name: spec for name, spec in zip(short, specs, strict=True)}
