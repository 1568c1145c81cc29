"""A script for LAMMPS, as it is: the potential comes in as soon as the box is there, and before it moves an atom."""

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ase_uq.errors import InputError

# Before there is a box these would lead to lines that were given to LAMMPS already, or not yet.
_LEAPS = re.compile(r"\s*(jump|label|next)\b")
# Atoms are not copied any more once they have uncertainties.
_COPIES = re.compile(r"\s*(replicate\b|#|$)")
_RESET = re.compile(r"^\s*reset_timestep\b", re.MULTILINE)
_RESTART = re.compile(r"^\s*restart\s+(\d+)\b", re.MULTILINE)
_CLEAR = re.compile(r"^\s*clear\b", re.MULTILINE)


def make_box(lammps: Any, script: str | os.PathLike[str]) -> str:
    """Gives LAMMPS the commands of a script up to the one that makes the box, and copies of it that follow at once.

    Args:
        lammps: An instance of LAMMPS.
        script: Its script.

    Returns:
        The rest of the script.

    Raises:
        InputError: No command makes a box, or a loop does, or the box would be cleared later.
    """
    text = Path(script).read_text(encoding="utf-8")
    if _CLEAR.search(text):
        raise InputError(f"{script} has the command `clear`, after which LAMMPS has no potential. Use two scripts.")
    done, has_box = 0, False
    for command in _commands(text):
        if has_box and not _COPIES.match(command):
            return text[done:]
        if leap := _LEAPS.match(command):
            raise InputError(
                f"{script} has the command `{leap[1]}` before the one that makes the box. Put it after read_data, "
                "create_box or read_restart."
            )
        lammps.commands_string(command)
        done += len(command)
        has_box = has_box or bool(lammps.extract_setting("box_exist"))
    if has_box:
        return ""
    raise InputError(f"{script} makes no box. It needs read_data, create_box or read_restart.")


def steps_between_restarts(script: str | os.PathLike[str]) -> set[int]:
    """The numbers N of the commands `restart N ...` of a script: LAMMPS writes restart files at their multiples."""
    return {int(number) for number in _RESTART.findall(Path(script).read_text(encoding="utf-8"))} - {0}


def check_steps_rise(script: str | os.PathLike[str]) -> None:
    """Refuses a script that counts steps anew.

    Raises:
        InputError: It has the command `reset_timestep`.
    """
    if _RESET.search(Path(script).read_text(encoding="utf-8")):
        raise InputError(
            f"{script} has the command `reset_timestep`, and a saved run knows its steps by their number. Leave it "
            "out, or give what comes before it a script of its own."
        )


@contextmanager
def its_own_errors() -> Iterator[None]:
    """Turns what LAMMPS raises, for which it has no class, into an InputError."""
    try:
        yield
    except Exception as error:
        if type(error) is Exception or type(error).__module__.startswith("lammps."):
            raise InputError(f"LAMMPS: {error}") from error
        raise


def execute_rest(execute_file: Callable[[str], None], rest: str) -> None:
    """Executes the rest of a script from a file of its own, in which `jump SELF` works.

    Args:
        execute_file: Function of a path.
        rest: As `make_box` returned it.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".lammps", encoding="utf-8") as file:
        file.write(rest)
        file.flush()
        execute_file(file.name)


def _commands(text: str) -> Iterator[str]:
    """The lines of a script, those together that make one command: continued by & or inside triple quotes."""
    command = ""
    for line in text.splitlines(keepends=True):
        command += line
        if not (line.rstrip().endswith("&") or command.count('"""') % 2):
            yield command
            command = ""
    if command:
        yield command
