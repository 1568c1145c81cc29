"""What is watched, as one value: the same whoever takes it, checked once, and given once."""

from dataclasses import replace

import numpy as np
import pytest
from ase import units
from ase.md.verlet import VelocityVerlet

from ase_uq import WatchedCalculator, WatchPolicy, relax
from ase_uq.dynamics.checks import Bonds, Finite
from ase_uq.dynamics.monitor import UncertaintyMonitor
from ase_uq.dynamics.policy import check_flag_below_halt
from ase_uq.dynamics.rules import Patience, Refractory, Threshold
from ase_uq.errors import UncertaintyHalt
from ase_uq.thresholds.reduction import Reduction
from tests.dynamics.builders import Uncertain, crystal

FIELDS = {
    "halt": 0.5,
    "flag": 0.3,
    "reduce": "mean",
    "elements": "Cu",
    "indices": [0, 2],
    "checks": Finite(),
}


def test_it_holds_rules_reduction_and_checks():
    policy = WatchPolicy(**FIELDS, patience=20, refractory=50)
    assert policy.rules == {"flag": Refractory(Threshold(0.3), 50), "halt": Patience(0.5, 20)}
    assert list(policy.rules) == ["flag", "halt"]
    assert policy.reduction == Reduction("mean", ("Cu",), (0, 2))
    assert policy.checks == (Finite(),)
    assert replace(policy, patience=None, halt=0.4).rules["halt"] == Threshold(0.4)


def test_checks_alone_are_enough():
    assert WatchPolicy(checks=[Bonds(), Finite()]).rules == {}


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({}, ValueError, "the monitor has nothing to watch for"),
        ({"flag": 0.3, "patience": 20}, ValueError, "patience belongs to halt, which is not given"),
        ({"halt": Threshold(0.5), "patience": 20}, ValueError, "halt is already a rule"),
        ({"halt": 0.5, "at_once": 1.0}, ValueError, "no patience is given"),
        ({"halt": 0.5, "refractory": 9}, ValueError, "refractory belongs to flag"),
        ({"halt": "high"}, TypeError, "high"),
        ({"halt": 0.5, "checks": [0.3]}, TypeError, r"checks are objects such as Finite\(\)"),
        ({"halt": 0.5, "indices": np.array([True, False])}, TypeError, "not a mask"),
        ({"halt": 0.5, "every": 0}, ValueError, "every is a number of steps, 1 or more, not 0"),
        ({"halt": 0.5, "every": 1.5}, ValueError, "every is a number of steps, 1 or more, not 1.5"),
        ({"hlat": 0.5}, TypeError, "hlat"),
    ],
)
def test_mistakes_are_told_when_it_is_made(fields: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        WatchPolicy(**fields)


def test_a_flag_is_below_the_halt():
    check_flag_below_halt(0.3, 0.5)
    for flag, halt in ((0.5, 0.5), (0.6, 0.5), (float("nan"), 0.5)):
        with pytest.raises(ValueError, match=r"is 0\.5 eV/Å for Cu, so no frame could be flagged\..*halt\. Hm"):
            check_flag_below_halt(flag, halt, " for Cu", " Hm")


class TestTakers:
    """Each takes a policy or its fields, never both."""

    def uncertain(self):
        atoms = crystal()
        atoms.calc = Uncertain(atoms, script=[1.0])
        return atoms

    def monitor(self, *policy, **fields):
        return UncertaintyMonitor(VelocityVerlet(self.uncertain(), units.fs), *policy, **fields)

    def watched(self, *policy, **fields):
        return WatchedCalculator(self.uncertain().calc, *policy, **fields)

    def relaxation(self, *policy, **fields):
        return relax(self.uncertain(), *policy, steps=1, **fields)

    @pytest.mark.parametrize("taker", ["monitor", "watched"])
    def test_a_policy_is_its_fields(self, taker: str):
        take = getattr(self, taker)
        assert take(WatchPolicy(**FIELDS)).watches == take(**FIELDS).watches

    def test_a_relaxation_is_stopped_by_either(self):
        found = [self.relaxation(WatchPolicy(halt=1e-6)), self.relaxation(halt=1e-6)]
        assert [one.status for one in found] == ["uncertain", "uncertain"]
        assert found[0].reason == found[1].reason

    @pytest.mark.parametrize("taker", ["monitor", "watched", "relaxation"])
    def test_not_both(self, taker: str):
        with pytest.raises(TypeError, match="given twice, as a policy and as halt"):
            getattr(self, taker)(WatchPolicy(halt=0.5), halt=0.4)

    def test_one_policy_serves_many(self):
        policy = WatchPolicy(halt=1e-6)
        atoms = self.uncertain()
        atoms.calc = WatchedCalculator(atoms.calc, policy)
        with pytest.raises(UncertaintyHalt):
            atoms.get_forces()
        assert self.monitor(policy).halt == Threshold(1e-6)
