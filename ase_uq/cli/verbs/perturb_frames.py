"""`ase-uq perturb-frames`: deliberately bad variants of frames, for the reference to label."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ase_uq.cli.options import Device, DType, Seed
from ase_uq.cli.outputs import check_inputs, check_outputs, check_xyz_names

if TYPE_CHECKING:
    from ase import Atoms


def perturb_frames(
    frames: Annotated[Path, typer.Argument(metavar="FRAMES", help="Frames in any format that ASE reads.")],
    out: Annotated[Path, typer.Option("--out", metavar="OUT.xyz", help="Extended XYZ file to write.")],
    kinds: Annotated[
        str,
        typer.Option(
            "--kinds",
            metavar="NAMES",
            help="Kinds, separated by commas: rattled, strained, compressed, hot, swapped, substituted.",
        ),
    ] = "rattled,strained,compressed,hot,swapped",
    per_kind: Annotated[int, typer.Option("--per-kind", min=1, help="Number of frames of each kind.")] = 20,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="SPEC", help="The potential for the runs of hot frames; a SPEC as in the other verbs."
        ),
    ] = None,
    temperature_max: Annotated[
        float,
        typer.Option(
            "--temperature-max", help="Highest temperature of hot frames, K; they are run at a quarter of it and above."
        ),
    ] = 2000.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    device: Device = "",
    dtype: DType = "",
    seed: Seed = 0,
) -> None:
    """Make perturbed (deliberately bad) frames from yours, so that missed errors can be counted.

    Frames like the training frames have hardly any large errors, but a threshold such as miss=0.1@0.3 needs some. Label
    OUT with your reference method, then give it to `ase-uq fit` as --perturbed; OUT has no labels of FRAMES. All
    variants of one frame have the same name in info: they do not count as independent if they behave alike.

    [dim]ase-uq perturb-frames train.xyz --model mace:my.model --out perturbed.xyz[/]
    """
    names = [name.strip() for name in kinds.split(",") if name.strip()]
    check_xyz_names({"--out": out})
    check_inputs(frames)
    if "hot" in names and model is None:
        raise typer.BadParameter(
            "hot frames are run with your potential: give it, or leave hot out of --kinds.", param_hint="'--model'"
        )
    check_outputs(out, may_exist=overwrite)
    from ase_uq.cli.potential import load_potential, seed_all
    from ase_uq.io.frames import read_frames, write_frames
    from ase_uq.sampling.perturbed import perturb_frames as make

    seed_all(seed)
    parents = read_frames(frames, name="FRAMES")
    # No other kind needs a potential, and loading one takes seconds.
    calculator = load_potential(model, device, dtype).calculator if "hot" in names and model else None
    made = make(
        parents,
        kinds=names,
        per_kind=per_kind,
        calculator=calculator,
        temperature_max=temperature_max,
        seed=seed,
        progress=True,
    )
    write_frames(out, made)
    typer.echo(_table(made))
    typer.echo(
        f"{len(made)} frames written to {out}; next: label them with your reference (REF_energy, REF_forces), then "
        f"ase-uq fit ... --calibration held_out.xyz --perturbed {out.with_name(out.stem + '_labelled' + out.suffix)}"
    )


def _table(made: "list[Atoms]") -> str:
    from ase_uq.sampling.perturbed import shortest_distance

    lines = [f"{'kind':<12}{'frames':>8}{'of parents':>12}{'shortest distance (Å)':>24}"]
    for kind in dict.fromkeys(atoms.info["perturbed"] for atoms in made):
        variants = [atoms for atoms in made if atoms.info["perturbed"] == kind]
        parents = len({atoms.info["run"] for atoms in variants})
        lines.append(f"{kind:<12}{len(variants):>8}{parents:>12}{min(map(shortest_distance, variants)):>24.2f}")
    return "\n".join(lines)
