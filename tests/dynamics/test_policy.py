"""What is watched, as one value: its fields, its rules, their numbers, and those who take it."""

import json
import math
from dataclasses import FrozenInstanceError, dataclass, fields, replace

import numpy as np
import pytest
from ase import units
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS

from ase_uq.dynamics import UncertaintyMonitor, WatchedCalculator, relax
from ase_uq.dynamics.checks import Bonds, Finite
from ase_uq.dynamics.cusum import Cusum
from ase_uq.dynamics.policy import Watch, WatchOptions, WatchPolicy, as_policy, as_rule, check_order
from ase_uq.dynamics.rules import AnyOf, Patience, Refractory, Threshold
from ase_uq.errors import UncertaintyHalt
from ase_uq.thresholds.criteria import FalseAlarms, PerElement, Quantile
from ase_uq.thresholds.data import ReferenceRuns, ThresholdData
from ase_uq.thresholds.reduction import Reduction
from tests.dynamics.builders import crystal

CUSUM = Cusum(FalseAlarms(0.05, steps=100), drift=0.5, mean=0.0, sd=1.0, h=2.0, interval=1.0, memory=1.0)


# --- The value -------------------------------------------------------------------------------------------------------


def test_a_policy_is_a_value():
    policy = WatchPolicy(halt=0.5, elements=["C", "O"], indices=np.array([0, 2]), checks=[Finite()])
    assert policy == WatchPolicy(halt=0.5, elements=("C", "O"), indices=(0, 2), checks=Finite())
    assert hash(policy) == hash(replace(policy))
    assert policy != replace(policy, reduce="mean")
    assert replace(policy, reduce="mean").reduction == Reduction("mean", ("C", "O"), (0, 2))
    assert WatchPolicy(elements="Cu").elements == ("Cu",)
    with pytest.raises(FrozenInstanceError):
        policy.halt = 0.6  # type: ignore[misc]


def test_the_keywords_are_the_fields():
    assert list(WatchOptions.__annotations__) == [field.name for field in fields(WatchPolicy) if field.init]
    assert WatchOptions.__annotations__ == {
        name: WatchPolicy.__annotations__[name] for name in WatchOptions.__annotations__
    }


@pytest.mark.parametrize(
    ("options", "levels"),
    [
        ({}, ()),
        ({"reduce": "mean"}, ()),
        ({"halt": 0.5}, ("halt",)),
        ({"halt": 0.5, "flag": 0.3}, ("flag", "halt")),
        ({"checks": Bonds()}, ("halt",)),
        ({"flag": 0.3, "checks": [Finite()]}, ("flag", "halt")),
    ],
)
def test_the_levels_that_can_be_reached(options, levels):
    assert WatchPolicy(**options).levels == levels


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"halt": 0}, ValueError, r"positive number in eV/Å, not 0"),
        ({"flag": "0.5"}, TypeError, r"a number in eV/Å or a criterion"),
        ({"halt": 0.5, "reduce": "median"}, ValueError, r"a reduction is 'max', 'mean', 'top3' or a quantile"),
        ({"halt": 0.5, "elements": ["Xx"]}, ValueError, r"'Xx' is not a chemical symbol"),
        ({"halt": 0.5, "indices": [True, False]}, TypeError, r"indices are numbers of atoms, not a mask"),
        ({"halt": 0.5, "every": 0}, ValueError, r"every is a number of steps, 1 or more, not 0"),
        ({"halt": 0.5, "checks": ["bonds"]}, TypeError, r"checks are objects such as Finite\(\).*not 'bonds'"),
    ],
)
def test_mistakes_are_told_when_the_policy_is_made(options, error, message):
    with pytest.raises(error, match=message):
        WatchPolicy(**options)


def test_a_policy_and_its_fields_are_not_given_both():
    policy = WatchPolicy(halt=0.5)
    assert as_policy(policy) is policy
    assert as_policy(None, halt=0.5) == policy
    with pytest.raises(TypeError, match=r"a policy and halt and flag were given.*replace\(policy, halt=...\)"):
        as_policy(policy, halt=0.5, flag=0.3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'stop'"):
        as_policy(None, stop=0.5)  # type: ignore[call-arg]


def test_a_flag_is_below_the_halt():
    check_order(0.3, 0.5)
    check_order(-math.inf, 0.5)
    for flag, halt in ((0.5, 0.5), (0.6, 0.5), (math.nan, 0.5)):
        with pytest.raises(ValueError, match=rf"^flag is {flag} eV/Å and halt is 0.5 eV/Å, so no .* below the halt\.$"):
            check_order(flag, halt)
    with pytest.raises(ValueError, match=r"halt is 0.5 eV/Å for C, so no frame.*below the halt\. Or both\."):
        check_order(0.5, 0.5, " for C", " Or both.")


# --- Those who take it -----------------------------------------------------------------------------------------------

# Readings are half of the script: of atom 1, aluminium, and of atom 0, which has none.
OPTIONS = {
    "halt": 0.5,
    "flag": Quantile(0.15),
    "reduce": "mean",
    "elements": ["Al", "Cu"],
    "indices": [0, 1],
    "checks": Finite(),
}
OVER_TIME = {"patience": 2, "at_once": 0.92, "refractory": 5}
SCRIPT = [0.1, 0.4, 0.45, 0.2, 1.8, 1.7, 1.9, 1.8, 0.1]


def monitored(options, log):
    dynamics = VelocityVerlet(crystal(SCRIPT), 0.5 * units.fs)
    monitor = UncertaintyMonitor(dynamics, log=log, **options)
    dynamics.attach(monitor)
    with pytest.raises(UncertaintyHalt):
        dynamics.run(20)
    return monitor.policy, monitor.watches, json.dumps(monitor.state())


def watched(options, log):
    atoms = crystal(SCRIPT)
    atoms.calc = WatchedCalculator(atoms.calc, log=log, **options)
    with pytest.raises(UncertaintyHalt):
        VelocityVerlet(atoms, 0.5 * units.fs).run(20)
    return atoms.calc.policy, atoms.calc.watches, atoms.calc.records


def relaxed(options, log):
    atoms = crystal(SCRIPT)
    atoms.rattle(0.1, seed=1)
    found = relax(atoms, fmax=1e-6, steps=20, log=log, **options)
    assert found.status == "uncertain"
    return str(found)


@pytest.mark.parametrize(
    ("run", "options"), [(monitored, OPTIONS), (monitored, OPTIONS | OVER_TIME), (watched, OPTIONS), (relaxed, OPTIONS)]
)
def test_a_policy_and_its_fields_are_the_same_to_those_who_watch(run, options, tmp_path):
    by_fields = run(options, tmp_path / "fields.csv")
    by_policy = run({"policy": WatchPolicy(**options)}, tmp_path / "policy.csv")
    assert by_fields == by_policy
    lines = (tmp_path / "policy.csv").read_text()
    assert lines == (tmp_path / "fields.csv").read_text()
    assert "flag" in lines
    assert "halt" in lines


@pytest.mark.parametrize("run", [monitored, watched, relaxed])
def test_those_who_watch_refuse_a_policy_with_fields(run, tmp_path):
    with pytest.raises(TypeError, match="a policy and flag were given"):
        run({"policy": WatchPolicy(halt=0.5), "flag": 0.3}, tmp_path / "log.csv")


def test_those_who_watch_refuse_a_policy_of_nothing():
    atoms, policy = crystal(SCRIPT), WatchPolicy(reduce="mean")
    with pytest.raises(ValueError, match=r"nothing to watch for\. Give halt, flag or both.*, or a log"):
        UncertaintyMonitor(VelocityVerlet(atoms, units.fs), policy=policy)
    with pytest.raises(ValueError, match=r"nothing to watch for\. Give halt, flag or both.*, or a log"):
        WatchedCalculator(atoms.calc, policy=policy)


def test_a_relaxation_may_be_watched_for_nothing():
    assert relax(crystal(), policy=WatchPolicy(reduce="mean")).status == "converged"


@pytest.mark.parametrize("options", [{"halt": 0.5, "patience": 2}, {"flag": 0.5, "refractory": 2}])
def test_what_needs_time_is_refused_where_there_is_none(options):
    policy = WatchPolicy(**options)
    with pytest.raises(ValueError, match="and an optimiser has none"):
        UncertaintyMonitor(BFGS(crystal(), logfile=None), policy=policy)
    with pytest.raises(ValueError, match="and an optimiser has none"):
        relax(crystal(), policy=policy)
    with pytest.raises(ValueError, match="needs simulated time, and there is none between the calculations"):
        WatchedCalculator(crystal().calc, policy=policy)


# --- Its rules -------------------------------------------------------------------------------------------------------


def test_levels_are_given_as_numbers_meanings_or_rules():
    assert as_rule(0.5) == Threshold(0.5)
    assert as_rule(Quantile(0.9)) == Threshold(Quantile(0.9))
    assert as_rule(PerElement(Quantile(0.9))) == Threshold(PerElement(Quantile(0.9)))
    assert as_rule(Patience(0.5, 3)) == Patience(0.5, 3)
    assert WatchPolicy(halt=0.5, flag=0.3, patience=20).rules == {"flag": Threshold(0.3), "halt": Patience(0.5, 20)}
    assert list(WatchPolicy(halt=0.5, flag=0.3).rules) == ["flag", "halt"]


def test_patience_at_once_and_refractory_time_are_put_around_the_levels():
    element = PerElement(Quantile(0.9))
    assert WatchPolicy(halt=0.5, flag=0.3, patience=20, at_once=1.5, refractory=50).rules == {
        "flag": Refractory(Threshold(0.3), 50),
        "halt": AnyOf(Patience(0.5, 20), Threshold(1.5)),
    }
    assert WatchPolicy(halt=element, flag=element, patience=20, at_once=Quantile(0.99), refractory=50).rules == {
        "flag": Refractory(Threshold(element), 50),
        "halt": AnyOf(Patience(element, 20), Threshold(Quantile(0.99))),
    }
    assert WatchPolicy(flag=CUSUM, refractory=50).rules == {"flag": Refractory(CUSUM, 50)}


def test_levels_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"patience belongs to halt, which is not given.*flag=Patience"):
        WatchPolicy(flag=0.3, patience=20)
    with pytest.raises(ValueError, match=r"halt is already a rule, a threshold of 0.5\. Leave patience out"):
        WatchPolicy(halt=Threshold(0.5), patience=20)
    with pytest.raises(ValueError, match=r"refractory belongs to flag, which is not given"):
        WatchPolicy(halt=0.5, refractory=20)
    with pytest.raises(ValueError, match=r"at_once is the threshold of a halt without patience, but patience is"):
        WatchPolicy(halt=0.5, at_once=1.5)
    with pytest.raises(ValueError, match=r"0.4 eV/Å triggers at once and is not above 0.5 eV/Å.*Give at_once above"):
        WatchPolicy(halt=0.5, patience=20, at_once=0.4)


# --- Settled by a calculator -----------------------------------------------------------------------------------------


@dataclass
class Calibrated:
    """A calculator whose calibration frames hold 200 readings of carbon, of hydrogen twice as large, one of oxygen."""

    runs: ReferenceRuns | None = None
    asked: int = 0

    def threshold_data(self, reduction: Reduction) -> ThresholdData:
        self.asked += 1
        carbon = np.linspace(0.1, 0.3, 200)
        readings = {"C": carbon, "H": 2 * carbon, "O": np.array([1.0])}
        if reduction.elements in (None, ("C", "H", "O")):
            found = 2.5 * carbon
        else:
            (element,) = reduction.elements
            found = readings.get(element, np.empty(0))
        return ThresholdData(found, found, np.arange(len(found)), reduction, self.runs)


class Bare:
    """A calculator without calibration data."""


SYMBOLS = ["C", "H", "H", "O", "N"]


def test_numbers_need_no_calibration_data():
    found = WatchPolicy(halt=0.5, flag=0.3, patience=20, at_once=1.5, refractory=50, reduce="mean").settled(
        Bare(), SYMBOLS, 0.0
    )
    assert found == {
        "flag": (Watch(Refractory(Threshold(0.3), 50), Refractory(Threshold(0.3), 50), Reduction("mean")),),
        "halt": (
            Watch(
                AnyOf(Patience(0.5, 20), Threshold(1.5)), AnyOf(Patience(0.5, 20), Threshold(1.5)), Reduction("mean")
            ),
        ),
    }


def test_a_meaning_is_settled_by_the_calibration_data_of_the_calculator():
    calculator = Calibrated()
    found = WatchPolicy(halt=Quantile(0.99), flag=Quantile(0.9)).settled(calculator, SYMBOLS, None)
    (flag,), (halt,) = found["flag"], found["halt"]
    pooled = 2.5 * np.linspace(0.1, 0.3, 200)
    assert (flag.rule.threshold, halt.rule.threshold) == pytest.approx(tuple(np.quantile(pooled, [0.9, 0.99])))
    assert flag.asked == Threshold(Quantile(0.9))
    assert halt.rule.value.promise.startswith("0.99 of frames")
    assert calculator.asked == 1


def test_each_element_has_a_watch_of_its_own():
    rule = PerElement(Quantile(0.9))
    found = WatchPolicy(halt=rule, patience=20, at_once=1.5, indices=(0, 1)).settled(Calibrated(), SYMBOLS, 0.0)
    watches = {watch.reduction.elements: watch for watch in found["halt"]}
    assert list(watches) == [("C",), ("H",), ("O",), ("N",)]
    carbon = np.quantile(np.linspace(0.1, 0.3, 200), 0.9)
    thresholds = [watch.rule.threshold for watch in found["halt"]]
    # Oxygen has one frame and nitrogen none: both get the number of all atoms.
    assert thresholds == pytest.approx([carbon, 2 * carbon, 2.5 * carbon, 2.5 * carbon])
    shared = ["from all atoms together" in watch.rule.rules[0].value.describe() for watch in found["halt"]]
    assert shared == [False, False, True, True]
    for watch in found["halt"]:
        assert watch.asked == AnyOf(Patience(rule, 20), Threshold(1.5))
        assert watch.rule == AnyOf(Patience(watch.rule.threshold, 20), Threshold(1.5))
        assert watch.reduction.indices == (0, 1)


def test_elements_that_are_not_looked_at_have_no_watch():
    found = WatchPolicy(flag=Threshold(PerElement(Quantile(0.5))), elements=("C", "H", "O")).settled(
        Calibrated(), SYMBOLS, None
    )
    assert [watch.reduction.elements for watch in found["flag"]] == [("C",), ("H",), ("O",)]


def test_too_few_data_of_all_atoms_are_an_error():
    with pytest.raises(ValueError, match=r"Quantile\(0.999\) needs at least 1000 calibration frames"):
        WatchPolicy(halt=PerElement(Quantile(0.999))).settled(Calibrated(), SYMBOLS, None)


def test_a_cusum_is_settled_by_reference_runs():
    readings = (np.exp(np.random.default_rng(8).normal(size=3000)),)
    calculator = Calibrated(ReferenceRuns(readings, 0.5))
    (watch,) = WatchPolicy(flag=Cusum(FalseAlarms(0.1, steps=500))).settled(calculator, SYMBOLS, 0.0)["flag"]
    assert watch.rule.h > 0
    with pytest.raises(ValueError, match=r"adds up over simulated time"):
        WatchPolicy(flag=Cusum(FalseAlarms(0.1, steps=500))).settled(calculator, SYMBOLS, None)
    with pytest.raises(ValueError, match=r"counts alarms in reference runs, but the uncertainty model has none"):
        WatchPolicy(flag=Cusum(FalseAlarms(0.1, steps=500))).settled(Calibrated(), SYMBOLS, 0.0)


@pytest.mark.parametrize("value", [Quantile(0.9), PerElement(Quantile(0.9))])
def test_a_meaning_without_calibration_data_is_refused(value):
    with pytest.raises(ValueError, match=r"Bare has no calibration data to turn .*Quantile\(0.9\).* into a number"):
        WatchPolicy(halt=value).settled(Bare(), SYMBOLS, None)


def test_meanings_in_the_wrong_order_are_named_with_what_to_do():
    with pytest.raises(ValueError, match=r"Here flag is .*Quantile\(0.9\) and halt .*Quantile\(0.5\): exchange them"):
        WatchPolicy(halt=Quantile(0.5), flag=Quantile(0.9)).settled(Calibrated(), SYMBOLS, None)


def test_a_flag_that_is_not_below_the_halt_is_refused():
    with pytest.raises(ValueError, match=r"flag is 0.5 eV/Å and halt is 0.5 eV/Å, so no frame lies between"):
        WatchPolicy(halt=0.5, flag=0.5, elements=("C",)).settled(Bare(), ["C"], None)
    with pytest.raises(ValueError, match=r"flag is .* and halt is .*so no frame lies between.*below the halt"):
        WatchPolicy(halt=Quantile(0.9), flag=Quantile(0.99)).settled(Calibrated(), SYMBOLS, None)


def test_a_flag_is_below_the_halt_for_each_element():
    each = PerElement(Quantile(0.9))
    # Carbon has 0.28, hydrogen 0.56, all atoms 0.7.
    assert WatchPolicy(halt=PerElement(Quantile(0.99)), flag=each).settled(Calibrated(), ["C", "H"], None)
    assert WatchPolicy(halt=each, flag=0.2).settled(Calibrated(), ["C", "H"], None)
    with pytest.raises(ValueError, match=r"flag is 0.3 eV/Å and halt is 0.28 eV/Å for C, so no frame"):
        WatchPolicy(halt=each, flag=0.3).settled(Calibrated(), ["C", "H"], None)
    with pytest.raises(ValueError, match=r"flag is 0.56 eV/Å and halt is 0.5 eV/Å for H, so no frame"):
        WatchPolicy(halt=0.5, flag=each).settled(Calibrated(), ["C", "H"], None)


def test_meanings_that_turn_out_in_the_wrong_order_are_refused():
    with pytest.raises(ValueError, match=r"0.4 eV/Å triggers at once and is not above .* which has patience"):
        WatchPolicy(halt=Quantile(0.9), patience=20, at_once=0.4).settled(Calibrated(), SYMBOLS, 0.0)


@pytest.mark.parametrize(
    "halt",
    [CUSUM, Patience(0.3, fs=20), AnyOf(Patience(0.2, fs=20), Threshold(1.0)), AnyOf(CUSUM, Threshold(1.0))],
)
def test_a_flag_may_stand_where_a_halt_still_waits(halt):
    runs = tuple(np.exp(np.random.default_rng(0).normal(-3, 0.1, size=(10, 500))))
    found = WatchPolicy(flag=Threshold(0.3), halt=halt).settled(Calibrated(ReferenceRuns(runs, 1.0)), SYMBOLS, 0)
    assert found["halt"][0].rule.threshold < 0.3 or halt == Patience(0.3, fs=20)
    assert found["flag"][0].rule == Threshold(0.3)


def test_a_flag_above_a_patient_halt_is_a_mistake_all_the_same():
    with pytest.raises(ValueError, match=r"flag is 0\.4 eV/Å and halt is 0\.3 eV/Å, so no frame lies between"):
        WatchPolicy(flag=Threshold(0.4), halt=Patience(0.3, fs=20)).settled(None, SYMBOLS, 0.0)
