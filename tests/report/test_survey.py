import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule

from ase_uq import Reduction
from ase_uq.errors import InputError, LabelError
from ase_uq.frames import annotated
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


def test_labels_that_are_not_finite_are_named():
    frames = scored([0.1, 0.2])
    frames[1].set_array("REF_forces", np.full((3, 3), np.nan))
    with pytest.raises(LabelError, match="frame 1 has a reference forces that is not finite"):
        survey(frames)


def test_frames_without_uncertainties_are_counted_and_keep_their_number():
    found = survey([molecule("H2O"), *scored([0.1, 0.5]), molecule("H2O")])
    assert (found.n_frames, found.n_without) == (2, 2)
    np.testing.assert_array_equal(found.place, [1, 2])


def test_nothing_to_report_on():
    with pytest.raises(InputError, match="there are no frames to report on"):
        survey([])
    with pytest.raises(InputError, match=r"none of the 2 frames carries forces_uncertainty.*ase-uq predict"):
        survey([molecule("H2O")] * 2)


def test_uncertainties_of_another_shape():
    frames = scored([0.1, 0.2])
    frames[1].calc.results["forces_uncertainty"] = np.ones(3)
    with pytest.raises(InputError, match=r"frame 1 has shape \(3,\); its 3 atoms want \(3, 3\)"):
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
