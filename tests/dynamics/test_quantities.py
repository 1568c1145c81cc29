"""Thresholds on gamma, energy and stress as on forces, wherever something is watched; and runs that only log."""

import csv
import json
import math

import numpy as np
import pytest
from ase import units
from ase.md.verlet import VelocityVerlet

from ase_uq.dynamics.monitor import UncertaintyMonitor
from ase_uq.dynamics.policy import WatchPolicy
from ase_uq.dynamics.quantities import QUANTITIES
from ase_uq.dynamics.relaxation import relax
from ase_uq.dynamics.watched import WatchedCalculator
from ase_uq.errors import UncertaintyHalt
from ase_uq.thresholds.criteria import FalseAlarms, PerElement, Quantile
from tests.dynamics.builders import EXTRA, Uncertain, crystal

# What the reading is where the values below are given; EMT gives the stress of a crystal.
GIVEN = {
    "forces": ("forces_uncertainty", np.array([[0.0, 0, 0], [0, 0.3, 0.4], [0, 0, 0.1], [0, 0, 0]]), 0.5),
    "gamma": ("gamma", np.array([0.2, 0.4, 3.0, 0.1]), 3.0),
    "energy": ("energy_uncertainty", 0.7, 0.7),
    "stress": ("stress_uncertainty", np.array([0.1, 0.2, 0.05, 0, 0, 0.15]), 0.2),
}


class Given(Uncertain):
    """Gives the same uncertainties at each step; from call `since` on, else a hundredth of them."""

    implemented_properties = [*Uncertain.implemented_properties, "stress_uncertainty"]  # noqa: RUF012

    def __init__(self, atoms, since=0, left_out=()):
        super().__init__(atoms)
        self.since, self.left_out = since, left_out

    def calculate(self, atoms=None, properties=("energy",), system_changes=("positions",)):
        super().calculate(atoms, properties, system_changes)
        share = 1.0 if self.n_calls > self.since else 0.01
        self.results |= {key: share * value for key, value, _ in GIVEN.values()}
        for key in self.left_out:
            del self.results[key]


def structure(**options):
    atoms = crystal()
    atoms.calc = Given(atoms, **options)
    return atoms


def monitored(atoms, **options):
    dynamics = VelocityVerlet(atoms, 0.5 * units.fs)
    monitor = UncertaintyMonitor(dynamics, **options)
    dynamics.attach(monitor)
    return dynamics, monitor


@pytest.mark.parametrize("quantity", GIVEN)
def test_a_run_is_halted_by_each_quantity(quantity, tmp_path):
    reading = GIVEN[quantity][2]
    dynamics, monitor = monitored(structure(since=3), quantity=quantity, flag=0.5 * reading, halt=0.9 * reading)
    with pytest.raises(UncertaintyHalt, match=QUANTITIES[quantity].meaning) as halt:
        dynamics.run(10)
    assert (halt.value.step, halt.value.reading) == (3, pytest.approx(reading))
    reason = monitor.last.reason
    assert f"{reading:.4g}" in reason
    assert reason.isascii()
    assert ("worst atom" in reason) == QUANTITIES[quantity].per_atom
    unit = {"forces": "eV/A", "gamma": "", "energy": "eV", "stress": "eV/A^3"}[quantity]
    assert f"{reading:.4g} {unit}".rstrip() + " reached halt" in reason
    dynamics, monitor = monitored(structure(), quantity=quantity, flag=0.5 * reading, halt=1.1 * reading)
    dynamics.run(2)
    assert (monitor.n_flagged, monitor.n_halted) == (3, 0)


@pytest.mark.parametrize("quantity", GIVEN)
def test_relaxations_and_watched_calculators_know_each_quantity(quantity):
    reading = GIVEN[quantity][2]
    atoms = structure()
    atoms.rattle(0.05, rng=np.random.default_rng(0))
    assert relax(atoms, fmax=1e-3, quantity=quantity, halt=0.9 * reading).status == "uncertain"
    atoms = structure()
    atoms.calc = WatchedCalculator(atoms.calc, quantity=quantity, halt=0.9 * reading)
    with pytest.raises(UncertaintyHalt):
        atoms.get_forces()
    assert atoms.calc.records[-1].reading == pytest.approx(reading)


def test_gamma_knows_atoms_and_reductions():
    for options, expected in (
        ({}, 3.0),
        ({"reduce": "mean"}, 0.925),
        ({"elements": ["Al"]}, 0.4),
        ({"indices": [0, 3]}, 0.2),
    ):
        dynamics, monitor = monitored(structure(), quantity="gamma", flag=1e-6, **options)
        dynamics.run(1)
        assert monitor.last.reading == pytest.approx(expected)


@pytest.mark.parametrize("quantity", GIVEN)
@pytest.mark.parametrize(("unseen", "broken"), [(True, False), (False, True)])
def test_an_unseen_element_and_a_broken_structure_trigger_each(quantity, unseen, broken):
    atoms = structure()
    results = {key: value for key, value, _ in GIVEN.values()}
    if unseen:
        results |= {"gamma": np.array([0.1, math.inf, 0.2, 0.3])}
    if broken:
        atoms.positions[2, 1] = math.nan
    watched = QUANTITIES[quantity]
    policy = WatchPolicy(quantity=quantity, halt=1e9)
    reading = watched.reading(watched.values(atoms, results), atoms.numbers, policy.reduction)
    assert (reading == math.inf) == unseen
    assert math.isnan(reading) == broken


@pytest.mark.parametrize("quantity", GIVEN)
def test_without_thresholds_readings_are_logged_and_nothing_else(quantity, tmp_path):
    log = tmp_path / "log.csv"
    dynamics, monitor = monitored(structure(), quantity=quantity, log=log)
    dynamics.run(3)
    with open(log) as file:
        rows = list(csv.DictReader(file))
    assert [row["level"] for row in rows] == ["ok"] * 4
    assert {float(row["reading"]) for row in rows} == {GIVEN[quantity][2]}
    assert (monitor.n_flagged, monitor.n_halted) == (0, 0)
    again = UncertaintyMonitor(dynamics, quantity=quantity, log=log)
    again.restore(json.loads(json.dumps(monitor.state())))


def test_a_watched_calculator_logs_without_thresholds(tmp_path):
    atoms = structure()
    atoms.calc = WatchedCalculator(atoms.calc, log=tmp_path / "log.csv")
    atoms.get_forces()
    assert [(record.level, record.reading) for record in atoms.calc.records] == [("ok", 0.5)]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"quantity": "force"}, r"thresholds are set on forces, gamma, energy, stress, not on 'force'\. Did you mean"),
        ({"quantity": "energy", "elements": ["Cu"]}, "is one number of the whole structure, so there are no atoms"),
        ({"quantity": "stress", "indices": [0]}, "is one number of the whole structure"),
        ({"quantity": "energy", "reduce": "mean"}, "is one number of the whole structure"),
        ({"quantity": "gamma", "halt": Quantile(0.9)}, r"it is no threshold of gamma\. Give a number such as 1, the"),
        ({"quantity": "energy", "flag": PerElement(Quantile(0.9))}, r"no threshold of energy\. Give a number in eV\."),
        ({"quantity": "stress", "flag": FalseAlarms(0.1, steps=9)}, r"no threshold of stress\. Give a number in eV/Å³"),
        (
            {"quantity": "gamma", "halt": 2.0, "patience": 5, "at_once": Quantile(0.9)},
            "it is no threshold of gamma",
        ),
    ],
)
def test_what_a_quantity_cannot_have_is_refused(options, part):
    with pytest.raises(ValueError, match=part):
        WatchPolicy(**{"halt": 1.0, **options})


def test_levels_in_the_wrong_order_are_told_in_their_unit():
    with pytest.raises(ValueError, match=r"flag is 2 and halt is 1, so no frame"):
        monitored(structure(), quantity="gamma", flag=2.0, halt=1.0)
    with pytest.raises(ValueError, match=r"flag is 2 eV/Å³ and halt is 1 eV/Å³"):
        monitored(structure(), quantity="stress", flag=2.0, halt=1.0)


def test_a_quantity_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"Uncertain gives no stress_uncertainty, so there is nothing to watch"):
        monitored(crystal(), quantity="stress", halt=1.0)
    dynamics, _ = monitored(structure(left_out=["stress_uncertainty"]), quantity="stress", halt=1.0)
    with pytest.raises(ValueError, match="promises stress_uncertainty but its results of the structure at step 0 lack"):
        dynamics.run(1)
    assert "stress_uncertainty" not in EXTRA


def test_a_state_of_another_quantity_is_refused():
    _, monitor = monitored(structure(), quantity="gamma", halt=1.0)
    _, other = monitored(structure(), quantity="energy", halt=1.0)
    with pytest.raises(ValueError, match="the state is one of gamma, but this monitor watches energy"):
        other.restore(monitor.state())
