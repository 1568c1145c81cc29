"""Options that verbs share: each has one name, one meaning and one help text."""

from collections.abc import Collection
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ase_uq.cli.levels import reduction, threshold

_SPECS, _METHODS = "{specs}", "{methods}"  # in help: what is installed
_LEVEL: dict[str, Any] = {"metavar": "LEVEL", "parser": threshold}

Model = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="SPEC",
        help=f"The potential: {_SPECS}, or FILE.py:FUNCTION or package.module:FUNCTION that returns an ASE calculator; "
        "?head=NAME at its end chooses one head of a MACE that has several, ?blip=FILE what `ase-uq blip` trained. "
        "The embedded ones are to try things on.",
    ),
]
Methods = Annotated[
    str,
    typer.Option("--methods", metavar="NAMES", help=f"Methods, with commas between: {_METHODS}. Several are combined."),
]
UQ = Annotated[
    Path | None,
    typer.Option(
        "--uq",
        metavar="FILE",
        help="Uncertainty model that `ase-uq fit` made for this potential. Not needed for embedded potentials.",
    ),
]
ForceProbes = Annotated[
    int,
    typer.Option(
        "--force-probes",
        metavar="K",
        help="Estimate variances of an exact posterior of forces (bll.conservative=exact) from K backward passes.",
    ),
]
Device = Annotated[
    str, typer.Option("--device", show_default="a GPU if there is one", help="Where to run, for example cpu or cuda:1.")
]
DType = Annotated[
    str, typer.Option("--dtype", show_default="the potential's own", help="Precision: float32 or float64.")
]
BatchAtoms = Annotated[
    int | None,
    typer.Option(
        "--batch-atoms",
        min=1,
        show_default="150 on a CPU, else 8000",
        help="Largest number of atoms evaluated together; reduced if memory runs out.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random: the same seed, the same result.")]
JSON = Annotated[bool, typer.Option("--json", help="Print numbers as JSON, for programs, instead of text.")]
EnergyKey = Annotated[
    str | None, typer.Option("--energy-key", show_default="REF_energy, else energy", help="Key of the energy in info.")
]
ForcesKey = Annotated[
    str | None,
    typer.Option("--forces-key", show_default="REF_forces, else forces", help="Key of the forces in arrays."),
]
StressKey = Annotated[
    str | None, typer.Option("--stress-key", show_default="REF_stress, else stress", help="Key of the stress in info.")
]

# Options of the verbs that move atoms.
Flag = Annotated[Any, typer.Option("--flag", help="Save frames with this uncertainty or more.", **_LEVEL)]
Halt = Annotated[Any, typer.Option("--halt", help="Halt at this uncertainty.", **_LEVEL)]
EachElement = Annotated[
    bool,
    typer.Option(
        "--per-element",
        help="Use a separate threshold for each element; --flag and --halt must then be criteria, like q0.99.",
    ),
]


class WatchedQuantity(StrEnum):
    """The quantities that thresholds are set on."""

    forces = "forces"
    gamma = "gamma"
    energy = "energy"
    stress = "stress"


Quantity = Annotated[
    WatchedQuantity,
    typer.Option(
        "--quantity",
        help="What --flag and --halt are compared with: force uncertainty (eV/Å); gamma, 1 at the edge of the "
        "calibration data; energy uncertainty (eV); stress uncertainty (eV/Å³). Criteria are for forces only.",
    ),
]
Reduce = Annotated[
    Any,
    typer.Option(
        "--reduce",
        metavar="max|mean|top3|Q",
        parser=reduction,
        help="How the atoms of a frame become one reading: max, mean, top3, or a quantile like 0.9.",
    ),
]
Bonds = Annotated[bool, typer.Option("--bonds", help="Halt if a bond of the start breaks or atoms fuse.")]
FlaggedFrames = Annotated[
    Path | None,
    typer.Option("--frames", metavar="FILE", help="Flagged frames are added to this .xyz file; empty if none is."),
]
Before = Annotated[
    int, typer.Option("--before", min=0, help="Number of frames before a flagged frame that are saved with it.")
]

# Those of verbs that make steps in time.
Every = Annotated[int, typer.Option("--every", min=1, help="Calculate uncertainties only every so many steps.")]
Patience = Annotated[
    float | None, typer.Option("--patience", help="Halt only after this long above --halt without a break, fs.")
]
AtOnce = Annotated[
    Any, typer.Option("--at-once", help="Halt at this uncertainty without --patience; above --halt.", **_LEVEL)
]
Refractory = Annotated[
    float | None, typer.Option("--refractory", help="After a flagged frame, save no other for this long, fs.")
]
StepLog = Annotated[
    Path | None,
    typer.Option("--log", metavar="FILE", help="CSV file for step, time, reading and level of each step."),
]


def label_keys(energy: str | None, forces: str | None, stress: str | None) -> tuple[str, str, str] | None:
    """Keys of the labels; a key that was not given has its first default. None if no key was given."""
    from ase_uq.io.labels import LABEL_KEYS

    if not (energy or forces or stress):
        return None
    defaults = LABEL_KEYS[0]
    return energy or defaults[0], forces or defaults[1], stress or defaults[2]


def given_options(context: typer.Context, but: Collection[str]) -> dict[str, str]:
    """The values of a verb's options by name, as text; those that were not given have their defaults.

    Args:
        context: Context of the verb.
        but: Names to leave out.
    """
    options = {parameter.opts[0]: parameter.name for parameter in context.command.params if parameter.opts}
    return {
        option: str(context.params[name])
        for option, name in options.items()
        if option.startswith("--") and option not in but and name in context.params
    }


def check_before(before: int, frames: Path | None) -> None:
    """Refuses `--before` without `--frames`: the frames before a flagged one would not be written anywhere."""
    if before and frames is None:
        raise typer.BadParameter(
            "the frames before a flagged one are saved to --frames: give it too.", param_hint="'--before'"
        )


class Verb(TyperCommand):
    """A verb. Its help names what is installed, which is looked up only where somebody asks for the help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Writes the help of the verb."""
        from ase_uq.backends.registry import spec_forms
        from ase_uq.methods import available_methods

        for parameter in self.params:
            if text := getattr(parameter, "help", None):
                text = text.replace(_SPECS, ", ".join(spec_forms()))
                parameter.help = text.replace(_METHODS, ", ".join(available_methods()))  # pyright: ignore
        super().format_help(ctx, formatter)
