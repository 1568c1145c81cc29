import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.constraints import FixAtoms, MirrorForce

from ase_uq import Reduction, UQWarning, write_frames
from ase_uq.errors import InputError, LabelError
from ase_uq.io.results import annotated
from ase_uq.report.survey import survey


def scored(readings, **notes) -> list[Atoms]:
    """Water molecules whose oxygen has the given uncertainty, the hydrogens a tenth of it."""
    frames = []
    for reading in readings:
        atoms = molecule("H2O")
        std = np.array([1, 0.1, 0.1])[:, None] * np.full(3, reading / np.sqrt(3))
        frames.append(annotated(atoms, {"forces": np.zeros((3, 3)), "forces_uncertainty": std}, **notes))
    return frames


def test_readings_and_atoms_of_all_frames():
    found = survey(scored([0.1, 0.4, 0.2]))
    np.testing.assert_allclose(found.reading, [0.1, 0.4, 0.2])
    np.testing.assert_allclose(found.uncertainty, np.outer([0.1, 0.4, 0.2], [1, 0.1, 0.1]).ravel(), rtol=1e-6)
    np.testing.assert_array_equal(found.numbers, [8, 1, 1] * 3)
    assert found.compositions == {"H2O": 3}
    assert np.isnan(found.gamma).all()
    assert found.n_beyond == 0
    np.testing.assert_array_equal(found.above(0.2), [False, True, True])


def test_the_reduction_makes_the_readings():
    found = survey(scored([0.1, 0.4]), reduction=Reduction("max", elements=("H",)))
    np.testing.assert_allclose(found.reading, [0.01, 0.04])


def test_frames_are_beyond_where_an_atom_is():
    frames = scored([0.1, 0.1, 0.1])
    for atoms, gamma in zip(frames, ([0.2, 0.3, 0.9], [1.1, 2, 0], [np.inf, 0, 0]), strict=True):
        atoms.calc.results["gamma"] = np.array(gamma)
    assert survey(frames).n_beyond == 2


@pytest.mark.parametrize(
    ("times", "known"), [([0, 5, 10], True), ([0, 5, 5], False), ([5, 0, 1], False), ([0, None, 10], False)]
)
def test_time_is_taken_where_every_frame_knows_it_and_it_grows(times, known):
    frames = scored([0.1] * 3)
    for atoms, time in zip(frames, times, strict=True):
        if time is not None:
            atoms.info["flag_time_fs"] = time
    found = survey(frames)
    np.testing.assert_array_equal(found.along, times if known else [0, 1, 2])
    assert (found.time is not None) == known


def test_errors_are_references_less_predictions():
    rng = np.random.default_rng(0)
    frames, residuals, shifts = scored([0.1, 0.2, 0.3]), rng.normal(size=(2, 3, 3)), [0.3, -0.6]
    for atoms, residual, shift in zip(frames, residuals, shifts, strict=False):
        atoms.calc.results["forces"] = np.full((3, 3), 7.0)
        atoms.calc.results |= {"energy": 5.0, "energy_uncertainty": 0.9}
        atoms.set_array("REF_forces", residual + 7)
        atoms.info["REF_energy"] = 5 + shift
    found = survey(frames)
    forces, energy = found.samples["forces"], found.samples["energy_per_atom"]
    np.testing.assert_allclose(forces.residuals, residuals.reshape(-1, 3))
    np.testing.assert_allclose(forces.uncertainties, np.outer([0.1, 0.2], [1, 0.1, 0.1]).ravel())
    np.testing.assert_array_equal(forces.frame, [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(forces.numbers, [8, 1, 1] * 2)
    np.testing.assert_allclose(energy.residuals.ravel(), [0.1, -0.2])
    np.testing.assert_allclose(energy.std.ravel(), [0.3, 0.3])


def test_the_potentials_own_forces_are_no_labels():
    frames = scored([0.1, 0.2])
    assert not survey(frames).samples
    for atoms in frames:
        atoms.calc.results["forces"] = np.ones((3, 3))
        atoms.set_array("REF_forces", np.ones((3, 3)))
    with pytest.raises(LabelError, match=r"REF_forces\) are the potential's own forces"):
        survey(frames)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("REF_forces", np.full((3, 3), np.nan), "REF_forces of frame 1 is not finite: it is left out"),
        ("REF_forces", np.ones((2, 3)), r"REF_forces of frame 1 has shape \(2, 3\), \(3, 3\) was expected: it is left"),
        ("REF_energy", "n/a", "REF_energy of frame 1 is 'n/a', a number was expected: it is left out"),
        ("forces", np.ones((2, 3)), r"forces of frame 1 has shape \(2, 3\), \(3, 3\) was expected: it is left out"),
        ("energy_uncertainty", "?", "energy_uncertainty of frame 1 is '.', a number was expected"),
    ],
)
def test_a_label_that_cannot_be_used_is_named_and_left_out_with_its_frame(key, value, message):
    frames = scored([0.1, 0.2, 0.3], REF_energy=1.0)
    for atoms in frames:
        atoms.calc.results |= {"energy": 0.5, "energy_uncertainty": 0.1}
        atoms.info["REF_forces"] = np.ones((3, 3))
    (frames[1].info if key.startswith("REF") else frames[1].calc.results)[key] = value
    with pytest.warns(UQWarning, match=message) as told:
        found = survey(frames)
    assert len(told) == 1
    damaged, whole = ("energy_per_atom", "forces") if "energy" in key else ("forces", "energy_per_atom")
    assert set(found.samples[damaged].frame) == {0, 2}
    assert set(found.samples[whole].frame) == {0, 1, 2}
    np.testing.assert_allclose(found.reading, [0.1, 0.2, 0.3])


def test_gamma_of_another_shape_is_named_and_left_out():
    frames = scored([0.1, 0.2])
    for atoms, gamma in zip(frames, (np.full(3, 2.0), np.full(2, 2.0)), strict=True):
        atoms.calc.results["gamma"] = gamma
    with pytest.warns(UQWarning, match=r"gamma of frame 1 has shape \(2,\), \(3,\) was expected: it is left out"):
        found = survey(frames)
    assert found.n_beyond == 1
    assert np.isnan(found.gamma[3:]).all()


@pytest.mark.parametrize("time", ["abc", np.nan, np.array([1.0, 2.0])])
def test_a_time_that_is_no_number_leaves_the_frames_their_numbers(time):
    frames = scored([0.1, 0.2], time_fs=1.0)
    frames[1].info["time_fs"] = time
    with pytest.warns(UQWarning, match="time_fs of frame 1 .*: it is left out"):
        found = survey(frames)
    assert found.time is None
    assert [frame.time for frame in found.kept] == [1.0, pytest.approx(np.nan, nan_ok=True)]


def test_of_many_frames_with_the_same_defect_ten_are_named():
    frames = scored([0.1] * 30, REF_energy="n/a")
    with pytest.warns(UQWarning) as told:
        survey(frames)
    messages = [str(each.message) for each in told]
    assert len(messages) == 11
    assert messages[9].startswith("REF_energy of frame 9 is")
    assert messages[10] == "further frames whose REF_energy cannot be used are not named."


def test_frames_without_uncertainties_are_counted_and_keep_their_number():
    found = survey([molecule("H2O"), *scored([0.1, 0.5]), molecule("H2O")])
    assert (found.n_frames, found.n_without) == (2, 2)
    np.testing.assert_array_equal(found.place, [1, 2])
    assert (found.counts_source, found.n_missing) == (False, 0)


def sourced(numbers) -> list[Atoms]:
    frames = scored([0.1, 0.5, 0.3])
    for atoms, number in zip(frames, numbers, strict=True):
        if number is not None:
            atoms.info["source_frame"] = number
    return frames


def test_frames_have_their_number_in_the_trajectory_that_was_scored():
    found = survey([*sourced([2, np.int64(3), 6]), *sourced([8, 9, 11])])
    assert (found.counts_source, found.n_missing) == (True, 6)
    np.testing.assert_array_equal(found.place, [2, 3, 6, 8, 9, 11])
    np.testing.assert_array_equal(found.along, found.place)
    assert [frame.place for frame in found.kept] == [2, 3, 6, 8, 9, 11]


@pytest.mark.parametrize("numbers", [[2, None, 6], [2, 6, 3], [2, 2, 6], [2, "3", 6], [-1, 3, 6]])
def test_without_a_number_for_every_frame_that_grows_they_have_that_in_what_was_read(numbers):
    found = survey(sourced(numbers))
    assert (found.counts_source, found.n_missing) == (False, 0)
    assert [frame.place for frame in found.worst(3)] == [1, 2, 0]


def test_frames_without_uncertainties_are_not_missing():
    bare = molecule("H2O")
    bare.info["source_frame"] = 1
    frames = sourced([0, 2, 4])
    assert survey([frames[0], bare, *frames[1:]]).n_missing == 1  # frame 3


def test_frames_of_a_file_keep_their_number_where_one_cannot_be_read(tmp_path):
    write_frames(tmp_path / "in.xyz", scored([0.1, 0.2, 0.5, 0.3]))
    lines = (tmp_path / "in.xyz").read_text().splitlines(keepends=True)
    lines[5 + 3] = "H not a number\n"  # 3 atoms and two lines of heading
    (tmp_path / "in.xyz").write_text("".join(lines))
    with pytest.warns(UQWarning, match=r"frame 1 of .*in.xyz is left out"):
        found = survey(tmp_path / "in.xyz")
    np.testing.assert_array_equal(found.place, [0, 2, 3])
    assert (found.counts_source, found.n_missing) == (False, 1)
    assert found.worst(1)[0].place == 2


def test_messages_say_both_numbers_where_they_differ():
    frames = sourced([0, 2, 4])
    frames[1].calc.results["forces_uncertainty"] = np.ones(3)
    with pytest.raises(InputError, match=r"forces_uncertainty of frame 1 \(source_frame 2\) has shape \(3,\)"):
        survey(frames)


def test_nothing_to_report_on():
    with pytest.raises(InputError, match="there are no frames to report on"):
        survey([])
    with pytest.raises(InputError, match=r"none of the 2 frames carries forces_uncertainty.*ase-uq score"):
        survey([molecule("H2O")] * 2)


def test_uncertainties_of_another_shape():
    frames = scored([0.1, 0.2])
    frames[1].calc.results["forces_uncertainty"] = np.ones(3)
    with pytest.raises(InputError, match=r"frame 1 has shape \(3,\); its 3 atoms need \(3, 3\)"):
        survey(frames)


# The worst frames


def test_what_is_not_a_number_is_worse_than_any_number():
    assert [frame.place for frame in survey(scored([0.1, np.nan, 5.0])).worst(3)] == [1, 2, 0]


def test_neighbours_of_a_worse_frame_are_left_out():
    readings = np.full(400, 0.1)
    readings[100:104] = [5, 4, 3, 2]  # one event, within a hundredth of the frames
    readings[300] = 0.5
    assert [frame.place for frame in survey(scored(readings)).worst(2)] == [100, 300]
    frames = scored([1, 0.9, 0.8, 0.1])
    for atoms, time in zip(frames, [0, 0.5, 90, 1000], strict=True):
        atoms.info["time_fs"] = time
    assert [frame.place for frame in survey(frames).worst(3)] == [0, 2, 3]


def test_what_is_near_is_a_hundredth_of_all_in_one_digit():
    assert survey(scored([0.1] * 600)).gap == 6  # 599 frames from the first to the last
    frames = scored([0.1] * 3)
    for atoms, time in zip(frames, [0, 1, 299.5], strict=True):
        atoms.info["time_fs"] = time
    assert survey(frames).gap == 3


def test_few_structures_are_held_and_none_of_the_worst_is_lost():
    rng = np.random.default_rng(0)
    readings = rng.random(3000)
    found = survey(iter(scored(readings)), keep=20)
    assert 20 <= len(found.kept) <= 40
    stretches = np.arange(3000) // found.stretch
    expected = [max(np.flatnonzero(stretches == s), key=lambda i: readings[i]) for s in np.unique(stretches)]
    assert [frame.place for frame in found.kept] == expected
    assert found.worst(1)[0].place == readings.argmax()


def test_kept_structures_are_without_results():
    frames = scored([0.1], flag_reason="hot", energies_of_others=np.ones(4))
    (frame,) = survey(frames).kept
    assert set(frame.atoms.arrays) == {"numbers", "positions"}
    assert frame.atoms.info == {"flag_reason": "hot"}
    assert frame.atoms.calc is None
    assert frame.worst_atom == 0


def test_true_errors_are_reduced_as_the_readings_are():
    frames = scored([0.1, 0.2, 0.3])
    for atoms, size in zip(frames[:2], (3.0, 5.0), strict=True):
        atoms.set_array("REF_forces", size * np.array([[1.0, 0, 0], [0, 0.5, 0], [0, 0, 0.1]]))
    np.testing.assert_allclose(survey(frames).error, [3.0, 5.0, np.nan])
    hydrogen = Reduction("mean", elements=("H",))
    np.testing.assert_allclose(survey(frames, reduction=hydrogen).error, [0.9, 1.5, np.nan])


def test_predictions_stand_beside_their_residuals():
    bare = molecule("H2O")
    frames = [bare, *scored([0.1, 0.2])]
    for size, atoms in enumerate(frames[1:]):
        atoms.calc.results |= {"forces": np.full((3, 3), size + 1.0), "energy": 3.0, "energy_uncertainty": 0.1}
        atoms.set_array("REF_forces", np.full((3, 3), 5.0))
        atoms.info["REF_energy"] = 6.0 + size
    found = survey(frames)
    for quantity, reference in (("forces", np.full((6, 3), 5.0)), ("energy_per_atom", [[2.0], [7 / 3]])):
        np.testing.assert_allclose(found.predicted[quantity] + found.samples[quantity].residuals, reference)
    np.testing.assert_array_equal(found.samples["energy_per_atom"].frame, [0, 1])


def test_temperature_gamma_and_reason_of_each_frame():
    frames = scored([0.1, 0.2, 0.3])
    frames[0].set_momenta(np.ones((3, 3)))
    frames[1].set_momenta(np.zeros((3, 3)))
    frames[1].calc.results["gamma"] = np.array([0.5, np.nan, 2.0])
    frames[2].info["flag_reason"] = "hot"
    found = survey(frames)
    np.testing.assert_allclose(found.temperature, [frames[0].get_temperature(), np.nan, np.nan])
    np.testing.assert_array_equal(found.gamma_of_frame, [np.nan, 2.0, np.nan])
    assert found.reason == ("", "", "hot")


@pytest.mark.parametrize("constraint", [FixAtoms([0, 1, 2]), MirrorForce(0, 1)])
def test_there_is_no_temperature_where_no_atom_moves_or_a_constraint_does_not_say_what_it_fixes(constraint):
    (atoms,) = scored([0.1])
    atoms.set_momenta(np.ones((3, 3)))
    atoms.set_constraint(constraint)
    assert np.isnan(survey([atoms]).temperature).all()
