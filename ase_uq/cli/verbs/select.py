"""`ase-uq select`: takes a pool of frames and writes those worth labelling."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ase_uq.cli.levels import threshold
from ase_uq.cli.options import UQ, BatchAtoms, Device, DType, Seed
from ase_uq.cli.outputs import check_inputs, check_outputs, check_xyz_names

if TYPE_CHECKING:
    from ase_uq.selection.select import Selection

_SHOWN = 20  # rows of the table
_DUPLICATES = 1e-3


def select(
    pool: Annotated[
        list[Path],
        typer.Argument(metavar="POOL...", help="Frames to choose from, in any format that ASE reads."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="OUT.xyz", help="Extended XYZ file to write.")],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="SPEC",
            show_default="none: choose by the uncertainties that stand in the frames",
            help="The potential, as for fit. Not needed for frames that `ase-uq score` wrote, with --uq.",
        ),
    ] = "",
    n: Annotated[int, typer.Option("--n", min=1, help="Number of frames to choose.")] = 100,
    uq: UQ = None,
    train: Annotated[
        Path | None,
        typer.Option(
            "--train", metavar="FILE", help="Frames that are already labelled; frames like them are not chosen."
        ),
    ] = None,
    strategy: Annotated[
        str,
        typer.Option(
            "--strategy",
            metavar="NAME",
            show_default="lcmd; top without --model",
            help="lcmd, maxdet, maxdist, top, bands or random.",
        ),
    ] = "",
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            metavar="NAME",
            help="Fitted method whose features are compared: bll or kernel.",
            show_default="the first with features",
        ),
    ] = None,
    per: Annotated[
        str,
        typer.Option(
            "--per",
            metavar="structure|environment",
            help="Compare structures, or compare each atom with others of its element and take its frame.",
        ),
    ] = "structure",
    cumulants: Annotated[
        int,
        typer.Option(
            "--cumulants",
            min=1,
            max=4,
            metavar="ORDER",
            help="Compare structures by this and all lower cumulants over their atoms; 1 is the mean alone.",
        ),
    ] = 1,
    flag: Annotated[
        Any,
        typer.Option(
            "--flag", metavar="LEVEL", parser=threshold, help="Leave out frames below this uncertainty: trusted."
        ),
    ] = None,
    halt: Annotated[
        Any,
        typer.Option(
            "--halt", metavar="LEVEL", parser=threshold, help="Leave out frames with this uncertainty or more: failed."
        ),
    ] = None,
    duplicates: Annotated[
        float,
        typer.Option("--duplicates", help="Share of the typical distance in POOL below which two frames are the same."),
    ] = _DUPLICATES,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    device: Device = "",
    dtype: DType = "",
    batch_atoms: BatchAtoms = None,
    seed: Seed = 0,
) -> None:
    """Choose the frames that are worth labelling.

    By default it chooses frames that cover what the training frames do not, in dense regions as well as outliers
    (lcmd). The most uncertain frames (top) are often all alike, and outliers (maxdist) may be of no interest. OUT has
    the chosen frames in the order of choice, with selected_rank and source_index in info, and without the energies and
    forces of the potential, which could be mistaken for labels. Label as many as you can afford, from the top.

    Frames that `ase-uq score` wrote, in shards too, can be chosen from without the potential, by their uncertainties
    alone (top, bands, random). Near-duplicates are not recognised then.

    [dim]ase-uq select run.xyz --n 100 --model mace:my.model --uq my.uq.safetensors --train train.xyz --out new.xyz[/]
    """
    check_xyz_names({"--out": out})
    check_inputs(*pool, train)
    if out.exists() and any(file is not None and out.samefile(file) for file in (*pool, train)):
        raise typer.BadParameter(f"{out} is read from: give another name.", param_hint="'--out'")
    check_outputs(out, may_exist=overwrite)
    if not model:
        of_features = {
            "--train": train is not None,
            "--method": method is not None,
            "--per": per != "structure",
            "--cumulants": cumulants != 1,
            "--duplicates": duplicates != _DUPLICATES,
        }
        _check_without_model(uq, [option for option, is_given in of_features.items() if is_given])
    from ase_uq.cli.potential import load_calculator, seed_all
    from ase_uq.errors import InputError
    from ase_uq.io.frames import write_frames
    from ase_uq.selection.scored import select_scored
    from ase_uq.selection.select import select as choose

    seed_all(seed)
    shared: dict[str, Any] = {"flag": flag, "halt": halt, "seed": seed}
    if model:
        selection = choose(
            pool,
            n,
            calculator=load_calculator(model, uq, device, dtype).predictor,
            train=train,
            strategy=strategy or "lcmd",  # pyright: ignore  (checked there, with the message that helps)
            method=method,
            per=per,  # pyright: ignore[reportArgumentType]
            cumulants=cumulants,
            duplicates=duplicates,
            batch_atoms=batch_atoms,
            **shared,
        )
    else:
        assert uq is not None
        selection = select_scored(pool, n, uq, strategy=strategy or "top", **shared)  # pyright: ignore
    if selection.bands is not None:
        typer.echo(selection.bands.describe())
    if not selection.chosen:
        raise InputError(f"no frame of {', '.join(map(str, pool))} was chosen, and {out} is not written.")
    write_frames(out, selection.frames(pool))
    typer.echo(_table(selection, out))
    how = (
        f"in the features of {selection.method}; {selection.near_duplicates} near-duplicates left out"
        if selection.method
        else "from their own uncertainties; near-duplicates were not looked for"
    )
    typer.echo(
        f"{len(selection.chosen)} of {selection.n_pool} frames written to {out}, chosen by {selection.strategy} {how}; "
        "next: label them with your reference (REF_energy, REF_forces)"
    )


def _check_without_model(uq: Path | None, options: Sequence[str]) -> None:
    """Refuses what cannot be done without the potential.

    Args:
        uq: File of the uncertainty model.
        options: Those given that are about features.

    Raises:
        BadParameter: There is no uncertainty model either, or there are such options.
    """
    if uq is None:
        raise typer.BadParameter(
            "give the potential, or only --uq for frames that `ase-uq score` wrote with it.", param_hint="'--model'"
        )
    if options:
        raise typer.BadParameter(
            "it is about features, which scored frames do not hold: give the potential as well (--model).",
            param_hint=f"'{options[0]}'",
        )


def _table(selection: "Selection", out: Path) -> str:
    by_atom = any(one.atom is not None for one in selection.chosen)
    measured = bool(selection.method)
    lines = [
        f"{'rank':>5}{'frame':>8}"
        + (f"{'atom':>6}" if by_atom else "")
        + f"{'uncertainty (eV/Å)':>20}"
        + (f"{'distance':>10}" if measured else "")
        + "  reason"
    ]
    for rank, one in enumerate(selection.chosen[:_SHOWN], 1):
        atom = f"{one.atom:>6}" if by_atom else ""
        distance = f"{one.distance:>10.2f}" if measured else ""
        lines.append(f"{rank:>5}{one.frame:>8}{atom}{one.uncertainty:>20.3g}{distance}  {one.reason}")
    if len(selection.chosen) > _SHOWN:
        lines.append(f"{'...':>5}  {len(selection.chosen) - _SHOWN} more in {out}")
    if measured:
        lines.append("distance: to the nearest training or chosen frame; 1 is typical of two frames of the pool")
    return "\n".join(lines)
