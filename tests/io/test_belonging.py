"""Uncertainties are written, read and reported only as those of the structure that they were calculated for."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from hypothesis import given
from hypothesis import strategies as st

from ase_uq import UncertainCalculator, UncertaintyModel, embedded, load_backend, read_frames, write_frames
from ase_uq.backends.base import Backend
from ase_uq.errors import InputError, UQWarning
from ase_uq.io.results import BELONG_KEY, annotated, drop_uncertainties, has_uncertainties, uncertainties_belong
from ase_uq.properties import UNCERTAINTIES
from ase_uq.report.survey import survey

STD = np.arange(1.0, 13).reshape(4, 3)
RESULTS = {
    "energy": -1.0,
    "forces": STD / 10,
    "energy_uncertainty": 0.5,
    "forces_uncertainty": STD,
    "gamma": np.ones(4),
    "forces_uncertainty_bll": STD,
}
Change = Callable[[Atoms], object]


def crystal() -> Atoms:
    return bulk("Cu", cubic=True)


def labelled_again(atoms: Atoms) -> None:
    atoms.rattle(0.1, seed=1)
    atoms.calc = SinglePointCalculator(atoms, energy=-2.0, forces=np.zeros((4, 3)))


def calculated_bare(atoms: Atoms) -> None:
    atoms.rattle(0.1, seed=1)
    atoms.calc = EMT()
    atoms.get_forces()


CHANGES: dict[str, Change] = {
    "rattled": lambda atoms: atoms.rattle(0.1, seed=1),
    "one atom moved a little": lambda atoms: atoms.positions.__setitem__((2, 1), atoms.positions[2, 1] + 1e-3),
    "translated": lambda atoms: atoms.translate((0.1, 0, 0)),
    "strained": lambda atoms: atoms.set_cell(atoms.cell * 1.01),
    "strained with its atoms": lambda atoms: atoms.set_cell(atoms.cell * 1.01, scale_atoms=True),
    "of another element": lambda atoms: atoms.numbers.__setitem__(0, 79),
    "fewer atoms": lambda atoms: atoms.__delitem__(3),
    "more atoms": lambda atoms: atoms.extend(Atoms("Cu", [(1, 2, 3)])),
    "labelled after a move": labelled_again,
    "calculated without uncertainties after a move": calculated_bare,
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_frames(tmp_path / "first.xyz", [annotated(crystal(), RESULTS)])
    return tmp_path / "first.xyz"


def uncertain(atoms: Atoms) -> set[str]:
    stores = (atoms.info, atoms.arrays, {} if atoms.calc is None else atoms.calc.results)
    return {key for store in stores for key in store if key.startswith(UNCERTAINTIES)}


@pytest.mark.parametrize("reader", [read_frames, lambda path: read(path, ":")], ids=["ours", "ASE's"])
@pytest.mark.parametrize("copied", [True, False], ids=["copied", "itself"])
class TestOfAnotherStructure:
    @pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
    def test_are_not_written(self, reader: Callable, copied: bool, change: Change, file: Path, tmp_path: Path):
        atoms = reader(file)[0].copy() if copied else reader(file)[0]
        change(atoms)
        write_frames(tmp_path / "moved.xyz", [atoms])
        for back in (read(tmp_path / "moved.xyz"), read_frames(tmp_path / "moved.xyz")[0]):
            assert not uncertain(back)
            assert BELONG_KEY not in back.info

    @pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
    @pytest.mark.parametrize("suffix", ["xyz", "traj"])
    def test_are_not_read_or_reported(
        self, reader: Callable, copied: bool, change: Change, suffix: str, file: Path, tmp_path: Path
    ):
        """ASE's writer knows nothing of this."""
        atoms = reader(file)[0].copy() if copied else reader(file)[0]
        change(atoms)
        if len(atoms) != 4:
            atoms.calc = None  # ASE would write the forces of four atoms
        path = tmp_path / f"moved.{suffix}"
        write(path, [crystal(), atoms])
        with pytest.warns(UQWarning, match=r"1 of 2 frames \(the first is frame 1\) have uncertainties of anothe"):
            assert not uncertain(read_frames(path)[1])
        with pytest.raises(InputError, match="none of the 2 frames carries forces_uncertainty"):
            survey(path)


def test_of_the_structure_itself_they_stay(file: Path, tmp_path: Path):
    atoms = read_frames(file)[0].copy()  # without a calculator
    atoms.info["note"], atoms.arrays["tags"] = "mine", np.arange(4)
    write(tmp_path / "again.xyz", atoms)
    write_frames(tmp_path / "last.xyz", read_frames(tmp_path / "again.xyz"))
    (back,) = read_frames(tmp_path / "last.xyz")
    np.testing.assert_allclose(back.calc.results["forces_uncertainty"], STD)
    assert survey(tmp_path / "last.xyz").n_frames == 1


def test_what_they_were_made_with_stays_with_them(file: Path, tmp_path: Path):
    """And goes with them: where there are others, it is not known."""
    write_frames(tmp_path / "scored.xyz", [annotated(crystal(), RESULTS, scored_with="uq-1")])
    write_frames(tmp_path / "again.xyz", read_frames(tmp_path / "scored.xyz"))
    (atoms,) = read_frames(tmp_path / "again.xyz")
    assert atoms.info["scored_with"] == "uq-1"
    assert "scored_with" not in annotated(atoms, RESULTS).info
    drop_uncertainties(atoms)
    assert "scored_with" not in atoms.info


@given(
    n_atoms=st.integers(1, 60),
    size=st.sampled_from([1.0, 30.0, 1e4]),
    seed=st.integers(0, 1000),
    atom=st.integers(0, 59),
    move=st.floats(2e-4, 10),
)
def test_rounding_in_files_is_told_from_a_move(n_atoms: int, size: float, seed: int, atom: int, move: float):
    rng = np.random.default_rng(seed)
    atoms = annotated(
        Atoms(rng.integers(1, 90, n_atoms), rng.uniform(-size, size, (n_atoms, 3)), cell=rng.normal(size=(3, 3))),
        {"energy_uncertainty": 1.0},
    )
    rounded = atoms.copy()
    rounded.positions = rounded.positions.round(8)
    assert uncertainties_belong(rounded)
    rounded.positions[atom % n_atoms, seed % 3] += move
    assert not uncertainties_belong(rounded)


@pytest.mark.parametrize("noted", ["text", 3.0, [1, 2], {"a": 1}])
def test_a_note_of_that_name_that_is_none_of_ours(noted: object):
    atoms = crystal()
    atoms.info[BELONG_KEY] = noted
    assert not uncertainties_belong(atoms)


@pytest.fixture(scope="module")
def potential() -> tuple[Backend, UncertaintyModel]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UQWarning)
        return load_backend("embedded:mace"), UncertaintyModel.load(embedded.path("mace.uq.safetensors"))


@pytest.mark.parametrize("reader", [read_frames, lambda path: read(path, ":")], ids=["ours", "ASE's"])
@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize("every", [1, 2])
def test_a_calculation_takes_the_place_of_what_a_file_held(
    reader: Callable, moved: bool, every: int, potential: tuple[Backend, UncertaintyModel], tmp_path: Path
):
    calculator = UncertainCalculator(*potential, every=every)
    start = molecule("CH3CHO")
    write_frames(tmp_path / "a.xyz", [annotated(start, {"forces_uncertainty": np.full((len(start), 3), 99.0)})])
    (atoms,) = reader(tmp_path / "a.xyz")
    if moved:
        atoms.rattle(0.05, seed=2)
    if every == 2:
        calculator.get_property("forces", molecule("H2O"))  # the next calculation has no uncertainties
    atoms.calc = calculator
    atoms.get_forces()
    write(tmp_path / "b.xyz", atoms)
    assert not uncertain(read(tmp_path / "b.xyz"))
    write_frames(tmp_path / "c.xyz", [atoms])
    (back,) = read_frames(tmp_path / "c.xyz")
    found, expected = (calc.results.get("forces_uncertainty") for calc in (back.calc, calculator))
    assert (found is None) == (expected is None) == (every == 2)
    if found is not None:
        np.testing.assert_allclose(found, expected, atol=1e-8)


def test_what_is_the_users_own_stays():
    atoms = molecule("H2O")
    atoms.info |= {"contact_id": "me", "gamma_only": True, "contact": "me", "energy_uncertainty": 0.1}
    atoms.arrays["contact_angle"] = np.ones(3)
    atoms.arrays["gamma_fit"] = np.ones(3)
    atoms.arrays["gamma"] = np.ones(3)
    atoms.arrays["forces_uncertainty_bll"] = np.ones((3, 3))
    drop_uncertainties(atoms)
    assert set(atoms.info) == {"contact_id", "gamma_only", "contact"}
    assert set(atoms.arrays) == {"numbers", "positions", "contact_angle", "gamma_fit"}


def test_a_note_of_the_users_is_no_uncertainty():
    atoms = molecule("H2O")
    atoms.info["contact"] = "me"
    atoms.arrays["gamma"] = np.ones(3)
    assert not has_uncertainties(atoms)
    atoms.arrays["forces_uncertainty"] = np.ones((3, 3))
    assert has_uncertainties(atoms)
