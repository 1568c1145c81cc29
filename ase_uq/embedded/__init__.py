"""The embedded default: small potentials, their uncertainty models and the frames they come from.

One molecule, malonaldehyde (C3H4O2, 9 atoms), in vacuum, labelled with GFN2-xTB. The potentials were trained on
`train_300K.xyz`, their uncertainty models calibrated on `calibration_300K.xyz`: Langevin MD at 300 K, from runs of
its own for every file. They serve the demo, the README, the examples and the tests, offline; `embedded:mace`,
`embedded:orb-direct` and `embedded:orb-conservative` name them where a potential is asked for. They know nothing
of any other molecule. The scripts in `potentials/` of the repository made every file here.
"""

from pathlib import Path

_FOLDER = Path(__file__).parent


def path(name: str) -> Path:
    """The file of that name, for example `malonaldehyde.xyz` or `mace.uq.safetensors`.

    Raises:
        FileNotFoundError: There is no such file; the message lists what there is.
    """
    names = sorted(entry.name for entry in _FOLDER.iterdir() if entry.suffix in (".safetensors", ".xyz"))
    if name not in names:
        raise FileNotFoundError(f"ase_uq embeds no file {name!r}. It has {', '.join(names)}.")
    return _FOLDER / name
