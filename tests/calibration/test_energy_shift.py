"""A constant offset of reference energies is named, and is not taken for uncertainty."""

import json
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from ase import Atoms
from hypothesis import given
from hypothesis import strategies as st

from ase_uq import Predictor, UncertaintyModel, evaluate, fit
from ase_uq.backends import load_backend
from ase_uq.calibration.energy_shift import EnergyShift, energy_shift
from ase_uq.communicator import Serial
from ase_uq.errors import UQWarning
from ase_uq.io.entries import Entries, WrongEntry
from ase_uq.io.results import annotated
from ase_uq.methods.pdrum.rows import RowStore
from ase_uq.report.survey import survey
from ase_uq.stream.labelled import LabelledStream
from ase_uq.testing.methods import labelled_frames

Shift = Callable[[Atoms], float]
OF_ELEMENT = {1: -13.6, 6: 1029.0, 8: 2041.0, 14: 7.0}
SHIFTS: dict[str, Shift] = {
    "one constant": lambda atoms: 100.0,
    "one constant below": lambda atoms: -3.0,
    "E0 of another functional": lambda atoms: sum(OF_ELEMENT.get(z, 5.0) for z in atoms.numbers.tolist()),
    "an energy per atom": lambda atoms: 0.7 * len(atoms),
    "both": lambda atoms: 20.0 + sum(OF_ELEMENT.get(z, 5.0) for z in atoms.numbers.tolist()),
}


def compositions(n_frames: int, kinds: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of all atoms, and of atoms of each frame; `kinds` different compositions of H, C and O."""
    rng = np.random.default_rng(seed)
    of_kind = [np.repeat([1, 6, 8], rng.integers(1, 12, 3)) for _ in range(kinds)]
    frames = [of_kind[number % kinds] for number in range(n_frames)]
    return np.concatenate(frames), np.array([len(frame) for frame in frames])


def totals(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.array([part.sum() for part in np.split(values, np.cumsum(counts)[:-1])])


@given(
    n_frames=st.integers(20, 80),
    kinds=st.integers(1, 7),
    seed=st.integers(0, 1000),
    constant=st.sampled_from([0.0, 100.0, -30.0]),
    of_hydrogen=st.sampled_from([0.0, 13.6, -400.0]),
    unlabelled=st.integers(0, 3),
)
def test_any_constant_is_found_and_leaves_the_spread(
    n_frames: int, kinds: int, seed: int, constant: float, of_hydrogen: float, unlabelled: int
):
    numbers, counts = compositions(n_frames, kinds, seed)
    noise = np.random.default_rng(seed).normal(scale=0.01, size=n_frames)
    shift = constant + totals(np.where(numbers == 1, of_hydrogen, 0.0), counts)
    residuals = noise + shift / counts
    residuals[:unlabelled] = np.nan
    found = energy_shift(residuals, numbers, counts)
    if not constant and not of_hydrogen:
        assert found is None
        return
    assert found is not None
    # What the noise moves the constants by is of the size of the noise.
    left = found.taken_out(residuals, numbers, counts)
    np.testing.assert_allclose((residuals - left)[unlabelled:], (shift / counts)[unlabelled:], atol=0.06)
    assert 0.2 * 0.01 < found.inflation * np.sqrt(np.mean(left[unlabelled:] ** 2)) < 2 * 0.01
    assert np.isnan(left[:unlabelled]).all()
    # It is the same shift of frames that it was not fitted to, and after it was written down.
    again = EnergyShift.from_json(json.loads(json.dumps(found.as_json())))
    assert again == found
    order = np.random.default_rng(seed).permutation(kinds)
    of_kind = np.split(numbers, np.cumsum(counts)[:-1])[:kinds]
    mixed = np.concatenate([of_kind[kind] for kind in order]), counts[:kinds][order]
    np.testing.assert_allclose(
        again.taken_out(np.zeros(kinds), *mixed), found.taken_out(np.zeros(n_frames), numbers, counts)[:kinds][order]
    )


@given(n_frames=st.integers(1, 60), kinds=st.integers(1, 6), seed=st.integers(0, 1000), bias=st.floats(-0.01, 0.01))
def test_ordinary_errors_have_no_shift(n_frames: int, kinds: int, seed: int, bias: float):
    """A bias as large as the spread is an error like others."""
    numbers, counts = compositions(n_frames, kinds, seed)
    residuals = bias + np.random.default_rng(seed).normal(scale=0.01, size=n_frames)
    assert energy_shift(residuals, numbers, counts) is None


def test_what_it_says():
    numbers, counts = compositions(40, 1, seed=0)
    noise = np.random.default_rng(0).normal(scale=0.002, size=40)
    found = energy_shift(noise + 100 / counts, numbers, counts)
    assert found is not None
    assert found.describe().startswith("+100 eV (reference - prediction), with a spread of 0.00")
    numbers, counts = compositions(40, 6, seed=0)
    found = energy_shift(noise + totals(np.where(numbers == 1, -13.6, 2.0), counts) / counts, numbers, counts)
    assert found is not None
    assert "eV, as of H -13.6, C +2, O +2 eV an atom (reference" in found.describe()


@pytest.mark.parametrize("kinds", [1, 3])
def test_half_of_the_frames_shifted_is_no_constant(kinds: int):
    numbers, counts = compositions(40, kinds, seed=1)
    residuals = np.random.default_rng(1).normal(scale=0.01, size=40) + (np.arange(40) // 20) * 100 / counts
    assert energy_shift(residuals, numbers, counts) is None


def frames(n: int, seed: int, shift: Shift | None = None) -> list[Atoms]:
    found = labelled_frames(n, seed=seed, cell=4.5)
    for atoms in found:
        atoms.info["REF_energy"] += 0.0 if shift is None else shift(atoms)
    return found


def quick(shift: Shift | None) -> UncertaintyModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "bll", UQWarning)
        return fit("toy:", frames(40, 1), frames(60, 2, shift), methods=["bll"], progress=False)


@pytest.fixture(scope="module")
def model() -> UncertaintyModel:
    return quick(None)


@pytest.fixture(scope="module")
def shifted(shift: Shift) -> UncertaintyModel:
    with pytest.warns(UQWarning, match="energies of the calibration frames have an offset of .*another E0 or"):
        return quick(shift)


@pytest.mark.parametrize("shift", SHIFTS.values(), ids=SHIFTS, scope="module")
class TestEverywhere:
    def test_the_fit_names_it_and_calibrates_on_what_is_left(self, shifted: UncertaintyModel, model: UncertaintyModel):
        test = frames(10, 3)
        plain, found = (Predictor(load_backend("toy:"), m).predict(test) for m in (model, shifted))
        for one, other in zip(plain, found, strict=True):
            # The constants take a part of the errors with them.
            assert 0.5 < other["energy_uncertainty"] / one["energy_uncertainty"] < 2
            np.testing.assert_array_equal(one["forces_uncertainty"], other["forces_uncertainty"])
        assert "  energies       offset of " in shifted.summary()
        assert "offset" not in model.summary()

    def test_the_offset_of_the_calibration_is_taken_out_of_test_frames(
        self, shift: Shift, shifted: UncertaintyModel, model: UncertaintyModel
    ):
        """However few they are."""
        options = {"n_bootstrap": 0, "progress": False}
        plain = evaluate("toy:", frames(3, 4), model, **options)
        found = evaluate("toy:", frames(3, 4, shift), shifted, **options)
        (one,), (other,) = (a.select(quantity="energy_per_atom", metric="rmse") for a in (plain, found))
        assert 0.3 < other.value / one.value < 3
        assert plain.energy_offset == ""
        assert "the\noffset of the calibration frames, " + found.energy_offset in found.table()
        assert "offset" not in plain.table()

    def test_an_offset_of_test_frames_alone_counts_as_an_error(self, shift: Shift, model: UncertaintyModel):
        test = frames(60, 4, shift)
        with pytest.warns(UQWarning, match="that the calibration frames do not have: another E0 or functional, or an"):
            found = evaluate("toy:", test, model, n_bootstrap=0, progress=False)
        (score,) = found.select(quantity="energy_per_atom", metric="rmse")
        size = np.sqrt(np.mean([(shift(atoms) / len(atoms)) ** 2 for atoms in test]))
        assert score.value == pytest.approx(size, rel=0.1)
        assert found.energy_offset == ""

    def test_a_report_shows_what_is_left(self, shift: Shift, shifted: UncertaintyModel):
        test = frames(60, 4, shift)
        predictions = Predictor(load_backend("toy:"), shifted).predict(test)
        scored = [annotated(a, p.results) for a, p in zip(test, predictions, strict=True)]
        found = survey(scored, energy_shift=shifted.energy_shift)
        assert np.abs(found.samples["energy_per_atom"].residuals).max() < 0.5
        assert shifted.energy_shift is not None
        assert found.energy_offset == shifted.energy_shift.describe()
        with pytest.warns(UQWarning, match="that the calibration frames do not have"):
            assert survey(scored).energy_offset == ""

    def test_networks_for_energies_learn_what_is_left(self, shift: Shift):
        rows = {}
        for name, shifted in (("plain", None), ("shifted", shift)):
            store = RowStore()
            training = frames(40, 1, shifted)
            stream = LabelledStream(load_backend("toy:"), training, Serial(), batch_atoms=None, forces=True)
            for forward_pass, targets in stream:
                store.add(forward_pass, targets)
            rows[name] = store.finish(Serial()).with_energy()
        plain, left = (rows[name].energy.square().mean().sqrt() for name in ("plain", "shifted"))
        assert 0.3 < left / plain < 1.5


def test_the_entries_of_a_file_are_checked():
    numbers, counts = compositions(40, 3, seed=0)
    found = energy_shift(np.full(40, 2.0), numbers, counts)
    assert found is not None
    whole = found.as_json()
    EnergyShift.check(Entries(whole, "shift"))
    for wrong in (
        {"of_element": {"Q": 1.0}},
        {"of_element": {"H": "1"}},
        {"spread": -1.0},
        {"inflation": 0.5},
        {"of_frame": np.inf},
        {"determined": 1},
        {"more": 1},
    ):
        with pytest.raises(WrongEntry, match=f"shift.*{next(iter(wrong))}|shift has 'more'"):
            EnergyShift.check(Entries(whole | wrong, "shift"))
