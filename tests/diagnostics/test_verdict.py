"""The sentences at the end of an assessment: a table of what numbers say."""

import json
import math

import pytest

from ase_uq.diagnostics.table import MetricValue
from ase_uq.diagnostics.verdict import as_json, sentences

GOOD = {"rmse": 0.1, "mean_squared_z": 1.0, "coverage_90": 0.9, "spearman": 0.5, "attainable_spearman": 0.55}
GOOD |= {"auroc": 0.9, "nll": -1.0}


def scores(forces, *, method="bll", **others):
    made = []
    for quantity, values in {"forces": forces, **others}.items():
        made += [MetricValue(method, quantity, "all", name, x, x, x, 9) for name, x in values.items()]
    return made


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({}, "Uncertainties of forces (bll) are as large as the errors; 90 % intervals hold 90% of the errors."),
        ({"mean_squared_z": 4.0}, "Uncertainties of forces (bll) are 2 times too small"),
        ({"mean_squared_z": 0.25}, "Uncertainties of forces (bll) are 2 times too large"),
        ({"mean_squared_z": math.nan}, "cannot be judged: none is finite and positive"),
        ({}, "They are larger where the errors are larger (rank correlation 0.50), as far as that is possible."),
        ({"spearman": 0.2}, "They tell large errors from small ones in part (rank correlation 0.20 of 0.55)."),
        ({"spearman": -0.1}, "They do not tell large errors from small ones"),
        ({"spearman": math.nan}, "Whether they are larger where the errors are cannot be said."),
        ({}, "An atom with an error above 0.3 eV/Å has the larger uncertainty in 90% of pairs."),
        ({"auroc": math.nan}, "No or all force errors are above 0.3 eV/Å"),
        ({}, "Of energies and stresses nothing can be said"),
        ({}, "Next: use it, for frames like these"),
        ({"mean_squared_z": 4.0}, "Next: these frames are unlike the calibration frames."),
    ],
)
def test_what_numbers_say(changed, part):
    assert part in " ".join(sentences(scores(GOOD | changed), 50, 0.3))


def test_energies_are_judged_where_there_are_some():
    said = " ".join(sentences(scores(GOOD, energy_per_atom=GOOD | {"mean_squared_z": 9.0}), 50, 0.3))
    assert "Uncertainties of energies (bll) are 3 times too small" in said
    assert "Of stresses nothing can be said" in said


def test_a_better_method_and_too_few_frames_are_named():
    both = [*scores(GOOD, method="combined"), *scores(GOOD | {"nll": -2.0}, method="kernel")]
    assert "Next: kernel has the better likelihood here" in sentences(both, 50, 0.3)[-1]
    assert "Next: 5 frames say little" in sentences(both, 5, 0.3)[-1]
    assert sentences([], 0, 0.3) == []


def test_programs_get_none_where_a_number_is_not_defined():
    found = json.loads(json.dumps(as_json(scores(GOOD | {"auroc": math.nan}), 50, 0.3), allow_nan=False))
    (area,) = [row for row in found["scores"] if row["metric"] == "auroc"]
    assert area["value"] is None
    assert found["verdict"][-1].startswith("Next: ")
