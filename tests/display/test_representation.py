"""What a notebook shows of an object fits on a few lines, whatever the object holds."""

import dataclasses
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ase_uq import Predictor, Quantile, ReferenceRuns, UncertainCalculator, UncertaintyModel, select
from ase_uq.backends import load_backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.diagnostics.evaluate import evaluate
from ase_uq.display.representation import Brief, html_table
from ase_uq.errors import UQWarning
from ase_uq.fitting.fit import fit
from ase_uq.testing.methods import labelled_frames

LONGEST = 700  # characters


@pytest.fixture(scope="module")
def model() -> UncertaintyModel:
    train, held_out = labelled_frames(30, seed=1), labelled_frames(40, seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UQWarning)  # made-up labels make the fit complain
        return fit(ToyCalculator(), train, held_out, methods=["bll", "kernel"], progress=False)


@pytest.fixture(scope="module")
def shown(model: UncertaintyModel) -> dict[str, Any]:
    frames = labelled_frames(12, seed=3)
    predictor = Predictor(load_backend(ToyCalculator()), model)
    assessment = evaluate(predictor, frames, n_bootstrap=0, progress=False)
    calculator = UncertainCalculator(ToyCalculator(), model)
    selection = select(frames, 3, calculator=calculator, progress=False)
    return {
        "model": model,
        "its record": model.record,
        "its identity": model.identity,
        "a method": model.methods["bll"],
        "threshold data": model.threshold_data(),
        "a threshold": model.threshold(Quantile(0.5)),
        "reference runs": ReferenceRuns(tuple(np.ones((50, 900))), 1.0),
        "predictor": predictor,
        "calculator": calculator,
        "prediction": predictor.predict(frames[:1])[0],
        "assessment": assessment,
        "sample": next(iter(assessment.samples.values())),
        "selection": selection,
    }


def test_each_is_short_and_says_what_it_is(shown):
    for name, thing in shown.items():
        assert len(repr(thing)) <= LONGEST, name
        assert "\n" not in repr(thing), name
    model = shown["model"]
    assert repr(model).startswith(f"<UncertaintyModel: toy, {model.identity.fingerprint[:12]}; bll, kernel")
    assert "fitted on 30, calibrated on 40 frames" in repr(model)


def test_tables_for_notebooks(shown):
    table = shown["model"]._repr_html_()
    assert table.count("<tr>") == 4
    assert "calibrated on 40 frames" in table
    assert "RMSE" in shown["assessment"]._repr_html_()
    assert "&lt;b&gt;" in html_table("<b>", {"a": "<i>"})
    assert "<i>" not in html_table("<b>", {"a": "<i>"})


@dataclasses.dataclass(repr=False)
class Anything(Brief):
    value: Any


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=300) | st.integers(0, 30).map(np.zeros),
    lambda inner: (
        st.lists(inner, max_size=40) | st.dictionaries(st.text(max_size=20), inner, max_size=40) | inner.map(Anything)
    ),
    max_leaves=60,
)


@given(VALUES)
def test_whatever_is_in_it(value):
    text = repr(Anything(value))
    assert text.startswith("Anything(value=")
    assert len(text) <= LONGEST
