"""Thresholds and reductions as words."""

import math

import pytest
import typer

from ase_uq.cli.levels import check_levels, per_element, reduction, threshold, told, watch_policy
from ase_uq.dynamics.checks import Bonds, MaxTemperature
from ase_uq.dynamics.policy import WatchPolicy
from ase_uq.thresholds.criteria import ErrorBound, FalseAlarms, MissRate, PerElement, Quantile
from ase_uq.thresholds.levels import FORMS
from ase_uq.thresholds.resolved import ResolvedThreshold


class Calibrated:
    """A calculator whose calibration data are resolved as if by themselves."""

    def __init__(self):
        self.asked = []

    def threshold_data(self, reduction):
        self.asked.append(reduction)
        return reduction


class Named(Quantile):
    """A quantile whose number is how often it was asked for, so that no calibration data are needed."""

    def resolve(self, threshold_data):
        return ResolvedThreshold(0.25, criterion=self, promise=f"read as {threshold_data.kind}", n_units=7, needed=3)


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("0.5", 0.5),
        ("1e-3", 1e-3),
        ("inf", math.inf),
        ("q0.99", Quantile(0.99)),
        ("miss=0.1@0.3", MissRate(error=0.3, at_most=0.1)),
        ("miss=0.1@0.3/0.9", MissRate(error=0.3, at_most=0.1, confidence=0.9)),
        ("bound=0.95@0.3", ErrorBound(error=0.3, confidence=0.95)),
        ("alarms=0.05@100ps", FalseAlarms(per_run=0.05, ps=100)),
        ("alarms=0.05@0.5ps", FalseAlarms(per_run=0.05, ps=0.5)),
        ("alarms=0.05@20000", FalseAlarms(per_run=0.05, steps=20000)),
    ],
)
def test_a_word_is_a_number_or_a_meaning(text, level):
    assert threshold(text) == level


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("hot", "'hot' is not a number"),
        ("", "'' is not a number"),
        ("qq", "'q' is not a number"),
        ("q1.5", "a quantile lies between 0 and 1, not at 1.5"),
        ("q99", "a quantile lies between 0 and 1, not at 99.0"),
        ("miss=0.1", "it has none of the known forms"),
        ("miss=0.1@0.3@0.9", "it has none of the known forms"),
        ("0.1@0.3", "it has none of the known forms"),
        ("missing=0.1@0.3", "it has none of the known forms"),
        ("miss=0.1@far", "'far' is not a number"),
        ("miss=10@0.3", "at_most lies between 0 and 1, not at 10.0"),
        ("miss=0.1@-1", "a tolerated force error must be a positive number in eV/Å, not -1.0"),
        ("miss=0.1@0.3/2", "confidence lies between 0 and 1, not at 2.0"),
        ("bound=95@0.3", "confidence lies between 0 and 1, not at 95.0"),
        ("bound=0.95@", "'' is not a number"),
        ("bound=0.95@0.3/0.9", "it has none of the known forms"),
        ("alarms=0.05@100fs", "'100fs' is neither a time like 100ps nor a number of readings like 20000"),
        ("alarms=0.05@2e4", "'2e4' is neither a time like 100ps nor a number of readings like 20000"),
        ("alarms=5@100ps", "per_run lies between 0 and 1, not at 5.0"),
        ("alarms=0.05@0", "the length of a run must be positive, not 0"),
        ("alarms=0.05@-1ps", "the length of a run must be positive, not -1.0"),
    ],
)
def test_another_word_is_refused_with_what_is_wrong_and_all_forms(text, what):
    with pytest.raises(typer.BadParameter) as caught:
        threshold(text)
    assert str(caught.value) == f"{text!r} is neither a number in eV/Å nor a criterion: {what}. Give one of {FORMS}."


@pytest.mark.parametrize("text", ["0", "-1", "nan", "-inf"])
def test_a_number_is_positive(text):
    with pytest.raises(typer.BadParameter, match=f"a threshold is a positive number in eV/Å, not {text}"):
        threshold(text)


@pytest.mark.parametrize("form", ["0.5", "q0.99", "miss=0.1@0.3", "miss=0.1@0.3/0.9", "bound=0.95@0.3"])
def test_the_forms_that_are_named_are_forms(form):
    assert form in FORMS
    threshold(form)


@pytest.mark.parametrize(
    ("text", "kind"), [("max", "max"), ("mean", "mean"), ("top3", "top3"), ("0.9", 0.9), (".9", 0.9)]
)
def test_a_reduction(text, kind):
    assert reduction(text) == kind


@pytest.mark.parametrize("text", ["median", "0", "0.x", "1", ""])
def test_what_is_no_reduction(text):
    with pytest.raises(typer.BadParameter, match=f"'{text}' is not a reduction. Give max, mean, top3 or a quantile"):
        reduction(text)


@pytest.mark.parametrize("flag", [0.3, 0.2])
def test_a_flag_at_or_above_the_halt_is_refused(flag):
    with pytest.raises(typer.BadParameter, match=f"flag is {flag} eV/Å and halt is 0.2 eV/Å, so no") as caught:
        check_levels(flag, 0.2)
    assert caught.value.param_hint == "'--flag'"


def test_levels_in_order_and_meanings_pass():
    check_levels(0.1, 0.2)
    check_levels(None, 0.2)
    check_levels(0.3, Quantile(0.99))


def test_meanings_are_had_for_each_element():
    assert per_element(Quantile(0.9), "--flag") == PerElement(Quantile(0.9))
    assert per_element(None, "--flag") is None


def test_a_number_is_the_same_for_all_elements():
    with pytest.raises(
        typer.BadParameter, match=r"--per-element needs a criterion.*0.5 eV/Å would be the same"
    ) as caught:
        per_element(0.5, "--halt")
    assert caught.value.param_hint == "'--halt'"


def test_false_alarms_are_not_counted_by_element():
    with pytest.raises(typer.BadParameter, match=r"FalseAlarms\(per_run=0.05, ps=100\) counts alarms of whole runs"):
        per_element(FalseAlarms(per_run=0.05, ps=100), "--halt")


def test_what_the_options_ask_to_watch_for():
    assert watch_policy(0.3, 0.5, quantity="forces", each_element=False, bonds=False) == WatchPolicy(flag=0.3, halt=0.5)
    policy = watch_policy(
        None,
        Quantile(0.9),
        quantity="forces",
        each_element=True,
        bonds=True,
        max_temperature=900,
        patience=2,
        at_once=0.8,
        reduce="mean",
    )
    assert policy == WatchPolicy(
        halt=PerElement(Quantile(0.9)),
        patience=2,
        at_once=0.8,
        reduce="mean",
        checks=(MaxTemperature(900), Bonds()),
    )


def test_options_that_ask_for_what_cannot_be_are_refused():
    with pytest.raises(typer.BadParameter, match=r"flag is 0.5 eV/Å and halt is 0.3 eV/Å"):
        watch_policy(0.5, 0.3, quantity="forces", each_element=False, bonds=False)
    with pytest.raises(typer.BadParameter, match="--per-element needs a criterion"):
        watch_policy(0.3, None, quantity="forces", each_element=True, bonds=False)
    with pytest.raises(ValueError, match="patience belongs to halt"):
        watch_policy(0.3, None, quantity="forces", each_element=False, bonds=False, patience=2)


def test_what_a_meaning_comes_to_is_told_and_numbers_are_not():
    calculator = Calibrated()
    policy = WatchPolicy(flag=Named(0.9), halt=0.5, patience=1, at_once=Named(0.99), reduce="top3")
    assert list(told(policy, calculator, ["C", "H", "H"])) == [
        "flag: 0.25 eV/Å by Quantile(0.9): read as top3 (7 units, 3 needed)",
        "at once: 0.25 eV/Å by Quantile(0.99): read as top3 (7 units, 3 needed)",
    ]


def test_of_each_element_it_is_told_once():
    lines = list(told(WatchPolicy(halt=PerElement(Named(0.9))), Calibrated(), ["C", "H", "H"]))
    assert [line.split(":")[0] for line in lines] == ["halt of C", "halt of H"]
    assert all("0.25 eV/Å by Quantile(0.9)" in line for line in lines)
