"""The embedded potentials: small, with their uncertainty models and the frames they were made from.

All frames show one molecule, malonaldehyde (C3H4O2, 9 atoms), in vacuum, labelled with GFN2-xTB. The potentials were
trained on `train_300K.xyz`, and their uncertainty models were calibrated on `calibration_300K.xyz`; these two come
from separate runs of Langevin MD at 300 K. The demo, the README, the examples and the tests use them offline. Where a
potential is asked for, their names are `embedded:mace`, `embedded:orb-direct` and `embedded:orb-conservative`. They
know nothing of any other molecule. The scripts in `potentials/` of the repository made every file here.
"""

from pathlib import Path

_FOLDER = Path(__file__).parent


def path(name: str) -> Path:
    """The path of an embedded file, for example `malonaldehyde.xyz` or `mace.uq.safetensors`.

    Raises:
        FileNotFoundError: There is no such file; the message lists what there is.
    """
    names = sorted(entry.name for entry in _FOLDER.iterdir() if entry.suffix in (".safetensors", ".xyz"))
    if name not in names:
        raise FileNotFoundError(f"there is no embedded file {name!r}. There are {', '.join(names)}.")
    return _FOLDER / name
