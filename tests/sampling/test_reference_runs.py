"""Reference runs: they are what ASE would run, count no step twice, and say what they need."""

import warnings
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.md.langevin import Langevin

from ase_uq.errors import UQWarning
from ase_uq.sampling.momenta import set_thermal_momenta
from ase_uq.sampling.reference_runs import reference_runs
from ase_uq.thresholds.data import ReferenceRuns
from ase_uq.thresholds.reduction import Reduction
from tests.dynamics.builders import crystal

SHORT = {"temperature": 300, "n_runs": 2, "ps": 0.02, "timestep": 2.0, "equilibration": 0.01, "progress": False}


def test_a_run_is_that_of_ase_and_a_reading_that_of_its_steps():
    atoms = crystal()
    found = reference_runs(atoms, **SHORT)
    assert [len(run) for run in found.readings] == [10, 10]
    assert (found.interval, found.conditions) == (2.0, "AlCu3, Langevin 300 K")
    rng = np.random.default_rng([0, 1])
    copy = atoms.copy()
    copy.calc = atoms.calc
    set_thermal_momenta(copy, 300, rng)
    dynamics = Langevin(copy, 2 * units.fs, temperature_K=300, friction=0.01 / units.fs, fixcm=False, rng=rng)
    expected = []
    for step, _ in enumerate(dynamics.irun(15)):
        if step > 5:
            expected.append(np.linalg.norm(copy.calc.results["forces_uncertainty"], axis=1).max())
    np.testing.assert_array_equal(found.readings[1], expected)
    assert not np.array_equal(found.readings[0], found.readings[1])


def test_it_costs_one_calculation_a_step_and_leaves_the_structure_alone():
    atoms = crystal()
    before = atoms.copy()
    reference_runs(atoms, **SHORT)
    assert atoms.calc.n_calls == 2 * 16  # five to equilibrate, ten to read, one to begin with
    assert atoms == before
    np.testing.assert_array_equal(atoms.get_momenta(), before.get_momenta())


def test_the_same_seed_gives_the_same_runs_and_every_nth_step_is_read():
    found = reference_runs(crystal(), **SHORT, seed=3)
    again = reference_runs(crystal(), **SHORT, seed=3, interval=2)
    assert again.interval == 4.0
    for run, thinned in zip(found.readings, again.readings, strict=True):
        np.testing.assert_array_equal(run[1::2], thinned)


def test_the_reduction_is_kept():
    found = reference_runs(crystal(), **SHORT, reduction=Reduction("mean", ("Cu",)))
    assert found.reduction == Reduction("mean", ("Cu",))
    assert not np.array_equal(found.readings[0], reference_runs(crystal(), **SHORT).readings[0])


def test_constraints_are_kept():
    atoms = crystal()
    atoms.set_constraint(FixAtoms([1]))
    # The uncertainty of this potential is how far an atom has moved: the fixed one reads zero, which no reference may.
    with pytest.raises(ValueError, match=r"reference run 0 has readings that are not finite and positive"):
        reference_runs(atoms, **SHORT, reduction=Reduction("max", ("Al",)))


def test_runs_are_added_to_those_made_before_and_none_is_repeated():
    first = reference_runs(crystal(), **SHORT)
    both = reference_runs(crystal(), **SHORT, before=first)
    whole = reference_runs(crystal(), **{**SHORT, "n_runs": 4})
    assert len(both.readings) == 4
    for found, expected in zip(both.readings, whole.readings, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"interval": 2}, r"the time between readings \(fs\) was 2.0 then and is 4.0 now"),
        (
            {"temperature": 400},
            r"conditions was AlCu3, Langevin 300 K then and is AlCu3, Langevin 400 K now",
        ),
        ({"reduction": Reduction("mean")}, r"the reduction was .*'max'.* then and is .*'mean'.* now"),
    ],
)
def test_runs_made_otherwise_are_not_added(change, message):
    first = reference_runs(crystal(), **SHORT)
    with pytest.raises(ValueError, match=message):
        reference_runs(crystal(), **{**SHORT, **change}, before=first)


def test_an_interruption_keeps_the_runs_that_are_whole(monkeypatch):
    atoms = crystal()
    calculate = atoms.calc.calculate

    def interrupted(*arguments, **options):
        if atoms.calc.n_calls == 20:  # in the second run
            raise KeyboardInterrupt
        calculate(*arguments, **options)

    monkeypatch.setattr(atoms.calc, "calculate", interrupted)
    with pytest.warns(UQWarning, match=r"interrupted: 1 of 2 reference runs are complete and are kept"):
        found = reference_runs(atoms, **SHORT)
    assert len(found.readings) == 1
    np.testing.assert_array_equal(found.readings[0], reference_runs(crystal(), **SHORT).readings[0])


def test_an_interruption_before_there_is_anything_is_one(monkeypatch):
    atoms = crystal()

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(atoms.calc, "calculate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reference_runs(atoms, **SHORT)


@pytest.mark.parametrize("name", ["temperature", "n_runs", "ps", "timestep", "interval"])
def test_numbers_that_are_not_positive_are_refused(name):
    with pytest.raises(ValueError, match=rf"{name} of reference runs must be a positive number, not 0"):
        reference_runs(crystal(), **{**SHORT, name: 0})


def test_a_calculator_without_uncertainties_is_refused():
    atoms = crystal()
    atoms.calc = EMT()
    with pytest.raises(ValueError, match=r"whose calculator gives forces_uncertainty.*UncertainCalculator"):
        reference_runs(atoms, **SHORT)
    atoms.calc = None
    with pytest.raises(ValueError, match=r"whose calculator gives forces_uncertainty"):
        reference_runs(atoms, **SHORT)


def test_a_run_that_left_the_realm_of_finite_uncertainties_is_no_reference():
    atoms = crystal(script=[0.1] * 8 + [np.inf])
    with pytest.raises(ValueError, match=r"reference run 0 has no finite uncertainty after 4 fs: at 300 K"):
        reference_runs(atoms, **SHORT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"equilibration": -0.01}, "equilibration of reference runs must be 0 or more, not -0.01"),
        ({"friction": -1}, "friction of reference runs must be 0 or more, not -1"),
        ({"friction": np.nan}, "friction of reference runs must be 0 or more, not nan"),
        ({"interval": 0.5}, "interval of reference runs must be a whole number, not 0.5"),
        ({"n_runs": 1.5}, "n_runs of reference runs must be a whole number, not 1.5"),
        ({"ps": 0.0001}, "0.0001 ps are shorter than the 2 fs from one reading to the next"),
        ({"interval": 11}, "0.02 ps are shorter than the 22 fs from one reading to the next"),
    ],
)
def test_numbers_that_make_no_runs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        reference_runs(crystal(), **SHORT | options)


def trusted(largest: float, n_atoms: int = 4, gamma: float = 0.5, **options) -> Atoms:
    """A crystal whose readings are 0.1 eV/Å, and whose calibration frames had readings up to `largest`."""
    atoms = crystal(script=[0.1], readings=np.linspace(0, largest, 1001), **options)
    calculator = cast(Any, atoms.calc)
    calculator.gamma = np.array([gamma, 0.1, 0.1, 0.1])
    record = SimpleNamespace(n_atoms_of_frame=np.full(1001, n_atoms))
    calculator.uncertainty_model = SimpleNamespace(threshold_data=calculator.threshold_data, record=record)
    return atoms


class TestOutsideOfTheCalibrationData:
    def test_runs_inside_are_taken_without_a_word(self):
        assert len(reference_runs(trusted(1.0), **SHORT).readings) == 2

    @pytest.mark.parametrize(
        ("atoms", "message"),
        [
            (trusted(0.05), r"1 of the readings are above 0\.0495 eV/Å, the 99 % quantile of the calibration; 0 have"),
            (
                trusted(1.0, gamma=6.0),
                r"0 of the readings are above 0\.99 eV/Å, .*; 1 have an atom with gamma above 1, .* 6",
            ),
            (trusted(1.0, gamma=np.inf), "gamma above 1, the largest inf"),
        ],
        ids=["readings", "gamma", "an element that was not fitted"],
    )
    def test_others_are_refused_after_the_first_run(self, atoms: Atoms, message: str):
        with pytest.raises(ValueError, match=rf"\(AlCu3, .* 300 K\) are not to be trusted: .*{message}.*; beyond=1"):
            reference_runs(atoms, **SHORT)
        assert cast(Any, atoms.calc).n_calls == 16
        with pytest.warns(UQWarning, match=rf"leave the calibration data: .*{message}"):
            assert len(reference_runs(atoms, **SHORT, beyond=1).readings) == 2

    @pytest.mark.parametrize(
        ("share", "limit", "told"), [(0.1, 0.2, True), (0.3, 0.2, None), (0.3, 0.4, True), (0.0, 0, False)]
    )
    def test_the_share_decides(self, share: float, limit: float, told: bool | None):
        """Of ten readings that follow five steps and the first calculation."""
        script = [0.1] * 6 + [0.9] * round(10 * share) + [0.1] * 100
        atoms = trusted(0.5)
        cast(Any, atoms.calc).script = script
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if told is None:
                with pytest.raises(ValueError, match=f"{share:g} of the readings are above"):
                    reference_runs(atoms, **{**SHORT, "n_runs": 1}, beyond=limit)
            else:
                reference_runs(atoms, **{**SHORT, "n_runs": 1}, beyond=limit)
        ours = [str(one.message) for one in caught if one.category is UQWarning]
        assert [f"{share:g} of the readings are above" in message for message in ours] == [True] * bool(told)

    def test_the_largest_of_more_atoms_is_larger(self):
        """Four atoms, in calibration frames of one: some readings above the quantile are to be expected."""
        for n_atoms, allowed in ((4, False), (0.01, True)):
            atoms = trusted(0.5, n_atoms=n_atoms)
            cast(Any, atoms.calc).script = [0.1] * 6 + [0.9] * 3 + [0.1] * 100
            if allowed:
                reference_runs(atoms, **{**SHORT, "n_runs": 1})
            else:
                with pytest.raises(ValueError, match="not to be trusted"):
                    reference_runs(atoms, **{**SHORT, "n_runs": 1})

    def test_atoms_that_are_not_looked_at_do_not_count(self):
        atoms = trusted(1.0)
        cast(Any, atoms.calc).gamma = np.where(atoms.numbers == 29, 9.0, 0.5)
        reference_runs(atoms, **SHORT, reduction=Reduction("max", ("Al",)))
        with pytest.raises(ValueError, match="the largest 9"):
            reference_runs(atoms, **SHORT)

    def test_runs_made_before_count_with_them(self):
        before = ReferenceRuns((np.full(10, 0.9), np.full(10, 0.1)), 2.0, conditions="AlCu3, Langevin 300 K")
        with pytest.raises(ValueError, match=r"0\.33 of the readings are above"):
            reference_runs(trusted(0.5), **SHORT, before=before)

    @pytest.mark.parametrize("beyond", [-0.1, 1.1, np.nan])
    def test_a_share_that_is_none(self, beyond: float):
        with pytest.raises(ValueError, match=r"beyond is a share of the readings .*, between 0 and 1, not"):
            reference_runs(crystal(), **SHORT, beyond=beyond)
