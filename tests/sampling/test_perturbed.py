import warnings
from itertools import pairwise

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, fcc111, molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.data import covalent_radii
from ase.io import read

from ase_uq.backends.toy import ToyCalculator
from ase_uq.errors import InputError, LabelError, UQWarning
from ase_uq.io.frames import read_frames, write_frames
from ase_uq.io.labels import labels_of
from ase_uq.sampling.perturbed import KINDS, perturb_frames, shortest_distance

COLD = ("rattled", "strained", "compressed", "swapped")


@pytest.fixture
def frames() -> list[Atoms]:
    rng = np.random.default_rng(1)
    made = []
    for _ in range(30):
        atoms = molecule("CH3CH2OH")
        atoms.positions += 0.02 * rng.standard_normal((9, 3))
        made.append(atoms)
    return made


def alloy(n: int = 3) -> Atoms:
    atoms = bulk("Cu", cubic=True).repeat(n)
    atoms.symbols[::3] = "Au"
    return atoms


def of_kind(made: list[Atoms], kind: str) -> list[Atoms]:
    return [atoms for atoms in made if atoms.info["perturbed"] == kind]


def closest_share(atoms: Atoms) -> float:
    """Oracle: the smallest distance over the sum of covalent radii, by all pairs and minimum images."""
    distances = atoms.get_all_distances(mic=bool(atoms.pbc.any()))
    radii = covalent_radii[atoms.numbers]
    upper = np.triu_indices(len(atoms), 1)
    return float((distances / np.add.outer(radii, radii))[upper].min())


def test_every_kind_is_made_as_often_as_asked(frames):
    made = perturb_frames(frames, per_kind=4, calculator=ToyCalculator(), steps=20)
    assert {kind: len(of_kind(made, kind)) for kind in KINDS} == dict.fromkeys(KINDS, 4)
    assert len(made) == 20


def test_the_same_seed_gives_the_same_frames_and_another_one_others(frames):
    def positions(seed):
        made = perturb_frames(frames, per_kind=3, calculator=ToyCalculator(), steps=20, seed=seed)
        return np.array([atoms.positions for atoms in made])

    np.testing.assert_array_equal(positions(0), positions(0))
    assert not np.isclose(positions(0), positions(1)).all(axis=(1, 2)).any()


def test_the_global_random_state_is_neither_read_nor_changed(frames):
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    perturb_frames(frames, kinds=COLD, per_kind=3)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_a_kind_comes_out_the_same_beside_other_kinds_of_one_parent():
    alone = perturb_frames([alloy()], kinds=["rattled"], per_kind=3)
    among = of_kind(perturb_frames([alloy()], kinds=COLD, per_kind=3), "rattled")
    np.testing.assert_array_equal([a.positions for a in alone], [a.positions for a in among])


def test_amplitudes_cover_the_range_of_their_kind(frames):
    made = perturb_frames(frames, kinds=COLD, per_kind=20, shortest=0.01)
    for kind, key, low, high in (("rattled", "displacement", 0.05, 0.3), ("strained", "strain", 0.02, 0.1)):
        found = np.sort([atoms.info[key] for atoms in of_kind(made, kind)])
        # One in each twentieth of the range.
        np.testing.assert_array_equal(np.floor((found - low) / (high - low) * 20), np.arange(20))
    scales = [atoms.info["scale"] for atoms in of_kind(made, "compressed")]
    assert 0.85 <= min(scales) < 0.86
    assert 0.96 < max(scales) <= 0.97


def test_rattled_atoms_move_as_far_as_is_said():
    parent = alloy(5)
    for atoms in perturb_frames([parent], kinds=["rattled"], per_kind=5, shortest=0.1):
        moves = atoms.positions - parent.positions
        # 1500 Gaussian components: their spread is known to 1/sqrt(2·1500) = 2 %; five of those.
        assert moves.std() == pytest.approx(atoms.info["displacement"], rel=0.1)
        np.testing.assert_array_equal(atoms.numbers, parent.numbers)
        np.testing.assert_array_equal(atoms.cell.array, parent.cell.array)


def test_a_strain_is_symmetric_moves_atoms_with_the_cell_and_is_as_large_as_is_said():
    parent = alloy()
    parent.set_cell(parent.cell.array @ np.array([[1, 0.2, 0], [0, 1, 0.1], [0, 0, 1]]), scale_atoms=True)
    made = perturb_frames([parent], kinds=["strained"], per_kind=6)
    for atoms in made:
        strain = np.linalg.solve(parent.cell.array, atoms.cell.array) - np.eye(3)
        np.testing.assert_allclose(strain, strain.T, atol=1e-12)
        assert np.abs(np.linalg.eigvalsh(strain)).max() == pytest.approx(atoms.info["strain"])
        assert np.linalg.det(atoms.cell.array) / np.linalg.det(parent.cell.array) > 0.7
        np.testing.assert_allclose(atoms.get_scaled_positions(False), parent.get_scaled_positions(False), atol=1e-12)
    assert len({tuple(np.round(atoms.cell.array.ravel(), 6)) for atoms in made}) == 6


def test_a_molecule_is_strained_about_its_centre_and_keeps_its_box():
    parent = molecule("CH3CH2OH", cell=[20, 20, 20])
    parent.translate([3, 4, 5])
    for atoms in perturb_frames([parent], kinds=["strained", "compressed"], per_kind=3):
        np.testing.assert_allclose(atoms.positions.mean(0), parent.positions.mean(0))
        np.testing.assert_array_equal(atoms.cell.array, parent.cell.array)
        assert not np.allclose(atoms.positions, parent.positions)


def test_compression_scales_all_distances_alike():
    parent = molecule("CH3CH2OH")
    for atoms in perturb_frames([parent], kinds=["compressed"], per_kind=4):
        np.testing.assert_allclose(atoms.get_all_distances(), atoms.info["scale"] * parent.get_all_distances())
    crystal = alloy()
    for atoms in perturb_frames([crystal], kinds=["compressed"], per_kind=4):
        assert atoms.get_volume() == pytest.approx(atoms.info["scale"] ** 3 * crystal.get_volume())


def test_a_slab_without_a_third_lattice_vector_can_be_strained():
    slab = fcc111("Cu", (2, 2, 3))
    assert not slab.cell.array[2].any()
    for atoms in perturb_frames([slab], kinds=["strained", "compressed"], per_kind=3):
        assert not atoms.cell.array[2].any()
        assert not np.allclose(atoms.cell.array, slab.cell.array)


def test_swapped_atoms_of_different_elements_change_places_and_keep_what_is_theirs():
    parent = alloy()
    parent.set_initial_magnetic_moments(np.where(parent.numbers == 79, 1.0, 2.0))
    made = perturb_frames([parent], kinds=["swapped"], per_kind=10)
    counts = []
    for atoms in made:
        np.testing.assert_array_equal(atoms.numbers, parent.numbers)
        moved = np.flatnonzero((atoms.positions != parent.positions).any(1))
        counts.append(len(moved))
        assert len(moved) == atoms.info["n_exchanged"]
        # The same places, and on each of those that changed the other element with its moment.
        where = [int(np.flatnonzero((parent.positions == p).all(1))[0]) for p in atoms.positions]
        assert sorted(where) == list(range(len(parent)))
        assert all(parent.numbers[i] != parent.numbers[where[i]] for i in moved)
        np.testing.assert_array_equal(atoms.get_initial_magnetic_moments(), parent.get_initial_magnetic_moments())
    assert min(counts) == 2
    assert max(counts) >= 8  # a tenth of 108 atoms is the most


def test_no_element_comes_in_unless_asked(frames):
    made = perturb_frames(frames, kinds=["swapped", "substituted"], per_kind=10)
    assert {symbol for atoms in made for symbol in atoms.symbols} == {"C", "H", "O"}
    asked = perturb_frames(frames, kinds=["substituted"], per_kind=10, elements=["N"])
    assert {symbol for atoms in asked for symbol in atoms.symbols} == {"C", "H", "O", "N"}


def test_substituted_atoms_stay_where_they_are_and_have_the_mass_of_their_new_element():
    parent = alloy()
    parent.set_masses(np.full(len(parent), 100.0))
    for atoms in perturb_frames([parent], kinds=["substituted"], per_kind=4):
        np.testing.assert_array_equal(atoms.positions, parent.positions)
        assert (atoms.numbers != parent.numbers).sum() == atoms.info["n_exchanged"] > 0
        assert set(np.round(atoms.get_masses())) == {64, 197}


def test_hot_frames_take_temperatures_up_to_the_highest_and_move(frames):
    made = perturb_frames(frames, kinds=["hot"], per_kind=4, calculator=ToyCalculator(), temperature_max=1200, steps=30)
    kelvin = sorted(atoms.info["temperature_K"] for atoms in made)
    assert 300 <= kelvin[0] < 525
    assert 975 < kelvin[-1] <= 1200
    for atoms in made:
        assert atoms.info["md_steps"] == 30
        moves = np.linalg.norm(atoms.positions - frames[atoms.info["parent"]].positions, axis=1)
        assert moves.max() > 0.02
        assert not atoms.has("momenta")


def test_hot_crystals_reach_their_temperature():
    """Two equal harmonic reservoirs: half of 2 T of a crystal started at rest in its minimum goes into the potential.

    With the momenta drawn at T and a thermostat at T the potential energy lies between half of 3/2 N kT and all of it.
    """
    parent = bulk("Cu", cubic=True).repeat(2)
    parent.calc = EMT()
    ground = parent.get_potential_energy()
    made = perturb_frames([parent], kinds=["hot"], per_kind=1, calculator=EMT(), temperature_max=800, steps=150)
    for atoms in made:
        kelvin = atoms.info["temperature_K"]
        atoms.calc = EMT()
        share = (atoms.get_potential_energy() - ground) / (1.5 * len(atoms) * units.kB * kelvin)
        assert 0.4 < share < 1.3


class Exploding(Calculator):
    """Free atoms, until the nth calculation has a force that throws one far away, or that is not finite."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012 (as ASE has it)

    def __init__(self, at: int, force: float) -> None:
        super().__init__()
        self.at, self.force, self.count = at, force, 0

    def calculate(self, atoms=None, properties=("energy",), system_changes=tuple(all_changes)):
        super().calculate(atoms, properties, system_changes)
        assert np.isfinite(self.atoms.positions).all(), "the run went on after it had exploded"
        forces = np.zeros((len(self.atoms), 3))
        self.count += 1
        if self.count >= self.at:
            forces[0, 0] = self.force
        self.results = {"energy": 0.0, "forces": forces}


@pytest.mark.parametrize("force", [np.nan, np.inf, 1e4])
def test_a_run_that_explodes_gives_a_frame_from_before(force):
    parent = alloy(2)
    (atoms,) = perturb_frames(
        [parent], kinds=["hot"], per_kind=1, calculator=Exploding(40, force), temperature_max=300, steps=100
    )
    # The 40th calculation is that of step 39; a large force of that step is seen in the step after.
    assert atoms.info["md_steps"] == (39 if np.isfinite(force) else 38)
    assert np.linalg.norm(atoms.positions - parent.positions, axis=1).max() < 1


def test_a_run_that_explodes_at_once_is_left_out_and_said(frames):
    with pytest.warns(UQWarning, match=r"^2 of 2 hot frames were left out: .*runs exploded at once"):
        made = perturb_frames(frames, kinds=["hot", "rattled"], per_kind=2, calculator=Exploding(1, np.nan), steps=50)
    assert [atoms.info["perturbed"] for atoms in made] == ["rattled"] * 2


@pytest.mark.parametrize("share", [0.6, 0.8])
def test_no_atoms_are_closer_than_allowed(frames, share):
    made = perturb_frames(frames, per_kind=6, calculator=ToyCalculator(), steps=20, shortest=share)
    assert len(made) == 30
    assert min(map(closest_share, made)) >= share


def test_what_comes_too_close_is_drawn_again_with_less(frames):
    loose, strict = (perturb_frames(frames, kinds=["rattled"], per_kind=20, shortest=s) for s in (0.01, 0.75))
    assert min(map(closest_share, loose)) < 0.75
    before, after = ([atoms.info["displacement"] for atoms in made] for made in (loose, strict))
    assert np.all(np.array(after) <= before)
    assert np.any(np.array(after) < before)


def test_frames_that_are_too_close_themselves_are_told():
    parent = Atoms("H2", [[0, 0, 0], [0, 0, 0.3]])
    with pytest.raises(
        InputError,
        match=r"no perturbed frame could be made: even with .* atoms stayed closer than 0\.6",
    ):
        perturb_frames([parent], kinds=["compressed"], per_kind=3)


def test_nothing_of_the_parent_stands_beside_other_positions(frames):
    parent = frames[0]
    parent.info |= {"REF_energy": -1.0, "dft": 2.0, "energy_uncertainty": 0.1, "charge": 1, "spin": 2, "time_fs": 3.0}
    for key in ("REF_forces", "forces_uncertainty", "my_forces"):
        parent.set_array(key, np.ones((9, 3)))
    parent.set_array("gamma", np.ones(9))
    parent.set_momenta(np.ones((9, 3)))
    parent.set_tags(range(9))
    parent.set_constraint(FixAtoms([0]))
    parent.calc = SinglePointCalculator(parent, energy=-1.0, forces=np.ones((9, 3)))
    for atoms in perturb_frames([parent], per_kind=2, calculator=ToyCalculator(), steps=20):
        assert atoms.calc is None
        assert not atoms.constraints
        assert set(atoms.arrays) == {"numbers", "positions", "tags"}
        own = {"perturbed", "parent", "run"}
        amplitude = {"displacement", "strain", "scale", "temperature_K", "md_steps", "n_exchanged"}
        assert own <= set(atoms.info) <= own | amplitude | {"charge", "spin"}
        assert (atoms.info["charge"], atoms.info["spin"]) == (1, 2)
        assert labels_of(atoms).energy is None
        assert labels_of(atoms).stress is None
        # A fixed atom would stay where the reference had it.
        assert atoms.info["perturbed"] != "rattled" or not np.allclose(atoms.positions[0], parent.positions[0])


def test_the_frames_given_are_not_changed(frames):
    frames[0].calc = calculator = ToyCalculator()
    before = [atoms.positions.copy() for atoms in frames]
    perturb_frames(frames, per_kind=6, calculator=calculator, steps=20)
    np.testing.assert_array_equal([atoms.positions for atoms in frames], before)
    assert frames[0].calc is calculator
    assert all(not atoms.info for atoms in frames)


def test_with_enough_frames_every_variant_has_a_parent_of_its_own(frames):
    made = perturb_frames(frames, kinds=COLD, per_kind=7)
    parents = [atoms.info["parent"] for atoms in made]
    assert len(set(parents)) == len({atoms.info["run"] for atoms in made}) == 28
    assert parents == sorted(parents)
    for kind in COLD:
        # Over all of the frames, not over the first ones.
        own = [atoms.info["parent"] for atoms in of_kind(made, kind)]
        assert max(own) >= 25
        assert min(own) <= 4


def test_variants_of_one_parent_stand_together_under_one_name(frames):
    made = perturb_frames(frames[:4], kinds=COLD, per_kind=8)
    runs = [atoms.info["run"] for atoms in made]
    assert len(set(runs)) == 4
    assert sum(a != b for a, b in pairwise(runs)) == 3
    for run in set(runs):
        assert {a.info["perturbed"] for a in made if a.info["run"] == run} == set(COLD)


def test_kinds_are_mixed_evenly_along_the_list(frames):
    made = perturb_frames(frames, kinds=COLD, per_kind=10)
    for quarter in range(4):
        part = made[10 * quarter : 10 * quarter + 10]
        assert {len(of_kind(part, kind)) for kind in COLD} <= {2, 3}


def test_a_parent_has_the_same_name_in_another_call_and_after_a_file(frames, tmp_path):
    write_frames(tmp_path / "frames.xyz", frames)
    one = perturb_frames(frames, kinds=["rattled"], per_kind=30, seed=0)
    other = perturb_frames(tmp_path / "frames.xyz", kinds=["strained"], per_kind=30, seed=5)
    assert [atoms.info["run"] for atoms in one] == [atoms.info["run"] for atoms in other]


def test_perturbed_frames_survive_a_file_and_can_be_labelled(frames, tmp_path):
    made = perturb_frames(frames, per_kind=3, calculator=ToyCalculator(), steps=20)
    for atoms in made:
        atoms.calc = ToyCalculator()
        atoms.get_forces()
    write_frames(tmp_path / "labelled.xyz", made)
    for atoms, original in zip(read_frames(tmp_path / "labelled.xyz"), made, strict=True):
        assert {k: v for k, v in atoms.info.items() if isinstance(v, str)} == {
            k: v for k, v in original.info.items() if isinstance(v, str)
        }
        labels = labels_of(atoms)
        np.testing.assert_allclose(labels.forces, original.get_forces(), atol=1e-7)
        assert labels.energy == pytest.approx(original.get_potential_energy())


def test_one_kind_may_be_given_as_a_word(frames):
    assert len(of_kind(perturb_frames(frames, kinds="rattled", per_kind=2), "rattled")) == 2


def test_real_molecules(shared_data):
    frames = read(shared_data / "acac" / "train_300K.xyz", ":100")
    made = perturb_frames(frames, kinds=COLD, per_kind=25)
    assert len(made) == len({atoms.info["run"] for atoms in made}) == 100
    assert min(map(closest_share, made)) >= 0.6
    # They are worse than what is there: even the closest real pair is not as close as the closest of these.
    assert min(map(shortest_distance, made)) < min(map(shortest_distance, frames))


def test_real_crystals_of_one_element_cannot_be_swapped(shared_data):
    frames = read(shared_data / "si_mlearn" / "train.xyz", ":")
    with pytest.warns(UQWarning, match=r"^kinds left out, since no frame allows them: swapped needs two elements"):
        made = perturb_frames(frames, kinds=COLD, per_kind=10)
    assert {atoms.info["perturbed"] for atoms in made} == {"rattled", "strained", "compressed"}
    assert len(made) == 30
    assert all(np.linalg.det(atoms.cell.array) > 0 for atoms in made)


def test_real_frames_of_many_elements_and_sizes(shared_data):
    frames = read(shared_data / "mp_pbe" / "calib_mptrj.xyz", ":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UQWarning)  # a few may be left out
        made = perturb_frames(frames, kinds=COLD, per_kind=20)
    assert len(made) > 70
    for atoms in of_kind(made, "swapped"):
        assert len(set(frames[atoms.info["parent"]].numbers)) > 1


def test_isolated_atoms_are_not_parents(frames):
    made = perturb_frames([Atoms("O"), *frames[:2], Atoms("H")], kinds=COLD, per_kind=4)
    assert {atoms.info["parent"] for atoms in made} == {1, 2}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"frames": []}, LabelError, "frames: the list has no structures"),
        (
            {"kinds": []},
            ValueError,
            r"no kind of perturbed frames was given\. There are rattled, strained, compressed",
        ),
        (
            {"kinds": ["ratled"]},
            ValueError,
            r"there is no kind of perturbed frames 'ratled'\. There are rattled, strained, compressed, hot, swapped",
        ),
        ({"kinds": ["hot"]}, ValueError, "hot frames come from dynamics with your potential: give a calculator"),
        ({"per_kind": 0}, ValueError, "per_kind must be 1 or more, not 0"),
        ({"steps": 0}, ValueError, "steps must be 1 or more, not 0"),
        ({"temperature_max": 0.0}, ValueError, "temperature_max must be a positive temperature in K, not 0.0"),
        ({"temperature_max": np.nan}, ValueError, "temperature_max must be a positive temperature in K, not nan"),
        ({"shortest": 1.5}, ValueError, "shortest must be a share of the bond length between 0 and 1, not 1.5"),
        ({"elements": ["N"]}, ValueError, "elements are for the kind 'substituted', which is not among rattled"),
        ({"kinds": ["substituted"], "elements": ["Xy"]}, ValueError, "'Xy' is not the symbol of an element"),
        (
            {"frames": [Atoms("Cu2", [[0, 0, 0], [0, 0, 2.3]])], "kinds": ["swapped"]},
            InputError,
            "none of the 1 frames can be perturbed: swapped needs two elements in a frame",
        ),
        ({"frames": [Atoms("H2", [[0, 0, 0], [0, 0, np.nan]])]}, InputError, "positions or cell of frame 0 are not"),
    ],
)
def test_bad_input(frames, change, error, message):
    arguments = {"frames": frames, "kinds": ["rattled"], **change}
    with pytest.raises(error, match=message):
        perturb_frames(arguments.pop("frames"), **arguments)


def test_the_shortest_distance_counts_periodic_images():
    assert shortest_distance(Atoms("H", cell=[1.1, 5, 5], pbc=True)) == pytest.approx(1.1)
    assert shortest_distance(Atoms("H2", [[0, 0, 0], [0, 0, 0.75]])) == pytest.approx(0.75)
    assert shortest_distance(Atoms("H")) == np.inf
