"""Assessments: the numbers of `metrics` on the predictions of `Predictor`, for every method, quantity and element."""

import csv
import dataclasses
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms

from ase_uq import Predictor, UncertainCalculator, UncertaintyModel, evaluate, fit, metrics
from ase_uq.backends import load_backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.diagnostics.assessment import Assessment
from ase_uq.diagnostics.evaluate import evaluate_scored
from ase_uq.errors import ArtefactError, InputError, LabelError, UQWarning
from ase_uq.io.frames import read_frames
from ase_uq.io.labels import labels_of
from ase_uq.scoring.score import score as score_frames
from ase_uq.scoring.shards import Shard
from ase_uq.testing.methods import ELEMENTS, labelled_frames

pytestmark = pytest.mark.filterwarnings("ignore:bll tells nothing about the:ase_uq.errors.UQWarning")
OPTIONS = {"n_bootstrap": 20, "progress": False, "tolerance": 0.1}


@pytest.fixture(scope="module")
def calculator() -> ToyCalculator:
    return ToyCalculator(ELEMENTS)


@pytest.fixture(scope="module")
def model(calculator: ToyCalculator) -> UncertaintyModel:
    """Two methods would be two classes; here one of them is the other under a second name."""
    train, held_out = labelled_frames(40, seed=1, cell=4.5), labelled_frames(40, seed=2, cell=4.5)
    plain = fit(calculator, train, held_out, methods=["bll"], progress=False)
    return dataclasses.replace(plain, methods={"bll": plain.methods["bll"], "second": plain.methods["bll"]})


@pytest.fixture(scope="module")
def predictor(calculator: ToyCalculator, model: UncertaintyModel) -> Predictor:
    return Predictor(load_backend(calculator), model)


@pytest.fixture
def frames() -> list[Atoms]:
    return labelled_frames(25, seed=3, cell=4.5)


@pytest.fixture(scope="module")
def assessment(predictor: Predictor) -> Assessment:
    return evaluate(predictor, labelled_frames(25, seed=3, cell=4.5), **OPTIONS)


def value(assessment: Assessment, metric: str, quantity: str = "forces", element: str = "all", method: str = "bll"):
    (score,) = assessment.select(method=method, quantity=quantity, element=element, metric=metric)
    return score.value


class Altered(Predictor):
    """A predictor whose results somebody changes."""

    def __init__(self, predictor: Predictor, change: Callable[[int, dict], None]) -> None:
        super().__init__(predictor.backend, predictor.uncertainty_model)
        self._change = change

    def predictions(self, forward_pass, *, uncertainties=True):
        predictions = super().predictions(forward_pass, uncertainties=uncertainties)
        for index, prediction in enumerate(predictions):
            self._change(index, prediction.results)
        return predictions


# What is scored


def test_forces_are_judged_by_component_and_ranked_by_norm(assessment, predictor, frames):
    predictions = predictor.predict(frames)
    true = np.concatenate([labels_of(atoms).forces for atoms in frames])
    predicted = np.concatenate([prediction["forces"] for prediction in predictions])
    std = np.concatenate([prediction["forces_uncertainty"] for prediction in predictions])
    numbers = np.concatenate([atoms.numbers for atoms in frames])
    for element, chosen in (("all", numbers > 0), ("C", numbers == 6), ("O", numbers == 8)):
        sample = true[chosen], predicted[chosen], std[chosen]
        for name in ("nll", "crps", "rll", "mean_squared_z", "miscalibration_area", "ence"):
            # Other batches sum in another order.
            assert value(assessment, name, element=element) == pytest.approx(getattr(metrics, name)(*sample), rel=1e-4)
        for level in (0.68, 0.9, 0.95):
            expected = metrics.coverage(*sample, level=level)
            assert value(assessment, f"coverage_{level * 100:.0f}", element=element) == pytest.approx(expected)
        assert value(assessment, "mae", element=element) == pytest.approx(metrics.mae(*sample[:2]))
        assert value(assessment, "rmse", element=element) == pytest.approx(metrics.rmse(*sample[:2]))
        assert value(assessment, "sharpness", element=element) == pytest.approx(metrics.sharpness(sample[2]), rel=1e-4)
        errors, norms = np.linalg.norm(sample[0] - sample[1], axis=1), np.linalg.norm(sample[2], axis=1)
        assert value(assessment, "spearman", element=element) == pytest.approx(metrics.spearman(errors, norms))
        assert value(assessment, "ause", element=element) == pytest.approx(metrics.ause(errors, norms))
        for name in ("auroc", "auprc"):
            expected = getattr(metrics, name)(errors, norms, tolerance=0.1)
            assert value(assessment, name, element=element) == pytest.approx(expected, nan_ok=True)
        ceiling = metrics.attainable_spearman(sample[2])
        assert value(assessment, "attainable_spearman", element=element) == pytest.approx(ceiling)
        (score,) = assessment.select(method="bll", quantity="forces", element=element, metric="rmse")
        assert score.n == chosen.sum()


def test_the_largest_error_of_each_frame_is_ranked(assessment, predictor, frames):
    predictions = predictor.predict(frames)
    largest, readings = [], []
    for atoms, prediction in zip(frames, predictions, strict=True):
        largest.append(np.linalg.norm(labels_of(atoms).forces - prediction["forces"], axis=1).max())
        readings.append(prediction.atom_uncertainty.max())
    assert value(assessment, "spearman", "forces_max") == pytest.approx(metrics.spearman(largest, readings))
    assert value(assessment, "auroc", "forces_max") == pytest.approx(
        metrics.auroc(largest, readings, tolerance=0.1), nan_ok=True
    )
    std = np.concatenate([prediction["forces_uncertainty"] for prediction in predictions])
    owner = np.repeat(np.arange(25), [len(atoms) for atoms in frames])
    ceiling = metrics.attainable_spearman(std, frames=owner)
    assert value(assessment, "attainable_spearman", "forces_max") == pytest.approx(ceiling)
    found = {score.metric for score in assessment.select(quantity="forces_max")}
    assert found == {"spearman", "attainable_spearman", "auroc", "auprc", "ause", "left_out"}


def test_energies_are_judged_per_atom(assessment, predictor, frames):
    counts = np.array([len(atoms) for atoms in frames])
    predictions = predictor.predict(frames)
    true = np.array([labels_of(atoms).energy for atoms in frames]) / counts
    predicted = np.array([prediction["energy"] for prediction in predictions]) / counts
    std = np.array([prediction["energy_uncertainty"] for prediction in predictions]) / counts
    assert value(assessment, "rmse", "energy_per_atom") == pytest.approx(metrics.rmse(true, predicted))
    assert value(assessment, "nll", "energy_per_atom") == pytest.approx(metrics.nll(true, predicted, std), rel=1e-4)
    expected = metrics.spearman(true - predicted, std)
    assert value(assessment, "spearman", "energy_per_atom") == pytest.approx(expected)
    assert not assessment.select(quantity="energy_per_atom", metric="auroc")  # the tolerance is a force


def test_every_method_stands_beside_the_others(assessment):
    assert assessment.methods == ("bll", "second")
    for score in assessment.select(method="bll"):
        (other,) = assessment.select(
            method="second", quantity=score.quantity, element=score.element, metric=score.metric
        )
        np.testing.assert_array_equal(dataclasses.astuple(score)[1:], dataclasses.astuple(other)[1:])


def test_intervals_hold_the_value_and_blocks_are_resampled(predictor, frames, assessment):
    (score,) = assessment.select(method="bll", quantity="forces", element="all", metric="rmse")
    assert score.low < score.value < score.high
    sample = assessment.samples["bll", "forces"]
    for block in (1, 5):
        (score,) = evaluate(predictor, frames, **OPTIONS, block=block).select(
            method="bll", quantity="forces", element="all", metric="rmse"
        )
        expected = metrics.bootstrap(
            lambda rows: metrics.rmse(sample.residuals[rows], np.zeros((len(rows), 3))),
            sample.frame,
            block=block,
            n_resamples=20,
        )
        np.testing.assert_allclose((score.low, score.high), expected)


@pytest.mark.parametrize("options", [{"n_bootstrap": 0}, {"block": 25}])
def test_without_resamples_there_are_no_intervals(predictor, frames, options):
    found = evaluate(predictor, frames, **(OPTIONS | options))
    assert all(math.isnan(score.low) and math.isnan(score.high) for score in found.scores)
    assert "–" not in found.table()


def test_batches_and_order_do_not_matter(predictor, frames, assessment):
    found = evaluate(predictor, frames[::-1], **(OPTIONS | {"n_bootstrap": 0}), batch_atoms=10)
    for one, other in zip(found.scores, assessment.scores, strict=True):
        if one.metric != "attainable_spearman":  # its draws go with the order
            # Other orders of summation, through a solve of condition number 1e9.
            assert one.value == pytest.approx(other.value, rel=1e-3, nan_ok=True), one


def test_seeded(predictor, frames, assessment):
    again = evaluate(predictor, frames, **OPTIONS)
    assert repr(again.scores) == repr(assessment.scores)
    other = evaluate(predictor, frames, **OPTIONS, seed=1)
    assert repr(other.scores) != repr(assessment.scores)


def test_frames_are_not_changed(predictor, frames):
    before = [atoms.copy() for atoms in frames]
    evaluate(predictor, frames, **OPTIONS)
    assert all(atoms == copy and atoms.calc is None for atoms, copy in zip(frames, before, strict=True))


# Ways to say what is scored


def test_potentials_models_and_files(calculator, model, frames, assessment, tmp_path):
    alone = dataclasses.replace(model, methods={"bll": model.methods["bll"]})
    alone.save(tmp_path / "a.uq.safetensors")
    given = (
        (UncertainCalculator(calculator, alone), None),
        (calculator, alone),
        (load_backend(calculator), tmp_path / "a.uq.safetensors"),
    )
    expected = [score.value for score in assessment.select(method="bll")]
    for potential, uncertainty_model in given:
        found = evaluate(potential, frames, uncertainty_model, **OPTIONS)
        assert found.methods == ("bll",)
        assert [score.value for score in found.scores] == pytest.approx(expected, nan_ok=True)


def test_a_model_too_few_or_too_many(calculator, model, predictor, frames):
    with pytest.raises(TypeError, match="ToyCalculator is a bare potential: give the uncertainty_model"):
        evaluate(calculator, frames)
    with pytest.raises(TypeError, match="toy: is a bare potential"):
        evaluate("toy:", frames)
    for owner in (predictor, UncertainCalculator(calculator, model)):
        with pytest.raises(TypeError, match=f"{type(owner).__name__} already has an uncertainty model"):
            evaluate(owner, frames, model)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tolerance": 0}, "the tolerance is 0 eV/Å; a positive"),
        ({"tolerance": math.nan}, "the tolerance is nan eV/Å; a positive"),
        ({"block": 0}, "block is 0, at least 1"),
        ({"n_bootstrap": -1}, "n_bootstrap is -1, at least 0"),
    ],
)
def test_bad_options_are_refused(predictor, frames, options, match):
    with pytest.raises(ValueError, match=match):
        evaluate(predictor, frames, **options)


# Labels


def test_frames_without_forces_count_for_the_energy(predictor, frames):
    for atoms in frames[:5]:
        del atoms.arrays["REF_forces"]
    for atoms in frames[5:8]:
        del atoms.arrays["REF_forces"]
        del atoms.info["REF_energy"]
    with pytest.warns(UQWarning, match="of 25 test frames 3 have no labels and were left out, 5 have no reference"):
        found = evaluate(predictor, frames, **OPTIONS)
    assert found.n_frames == 22
    assert len(found.samples["bll", "energy_per_atom"].frame) == 22
    assert len(found.samples["bll", "forces_max"].frame) == 17


def test_energies_alone_and_forces_alone(predictor, frames):
    energies, forces = frames, [atoms.copy() for atoms in frames]
    for atoms in energies:
        del atoms.arrays["REF_forces"]
        del atoms.info["REF_stress"]
    for atoms in forces:
        del atoms.info["REF_energy"]
        del atoms.info["REF_stress"]
    with pytest.warns(UQWarning, match="25 have no reference forces and are judged by their other labels"):
        assert evaluate(predictor, energies, **OPTIONS).quantities == ("energy_per_atom",)
    assert evaluate(predictor, forces, **OPTIONS).quantities == ("forces", "forces_max")


def test_stress_is_scored_where_there_are_labels(assessment, predictor, frames):
    residuals = [
        labels_of(atoms).stress - prediction["stress"]
        for atoms, prediction in zip(frames, predictor.predict(frames), strict=True)
    ]
    assert value(assessment, "rmse", "stress") == pytest.approx(np.sqrt(np.mean(np.square(residuals))))
    sample = assessment.samples["bll", "stress"]
    assert sample.residuals.shape == sample.std.shape == (25, 6)
    expected = metrics.spearman(np.linalg.norm(residuals, axis=1), sample.uncertainties)
    assert value(assessment, "spearman", "stress") == pytest.approx(expected, nan_ok=True)
    for atoms in frames[5:]:
        del atoms.info["REF_stress"]
    assert len(evaluate(predictor, frames, **OPTIONS).samples["bll", "stress"].frame) == 5


def test_other_names_of_labels(predictor, frames, assessment):
    for atoms in frames:
        atoms.info["E"] = atoms.info.pop("REF_energy")
        atoms.set_array("F", atoms.arrays.pop("REF_forces"))
    found = evaluate(predictor, frames, **OPTIONS, label_keys=("E", "F", "S"))
    assert value(found, "rmse") == pytest.approx(value(assessment, "rmse"))
    with pytest.raises(LabelError, match=r"none of the 25 test frames has .* Looked for A, B, C; .*\['E'"):
        evaluate(predictor, frames, label_keys=("A", "B", "C"))


def test_no_labels_at_all(predictor, frames):
    for atoms in frames:
        atoms.info.clear()
        del atoms.arrays["REF_forces"]
    with pytest.raises(LabelError, match=r"Looked for REF_energy, REF_forces, energy, forces; .* name the labels"):
        evaluate(predictor, frames)


def test_energies_without_an_energy_uncertainty(predictor, model, frames):
    alone = model.methods["bll"]
    forces_only = {name: c for name, c in alone.calibrators.items() if name == "forces"}
    bare = dataclasses.replace(model, methods={"bll": dataclasses.replace(alone, calibrators=forces_only)})
    for atoms in frames:
        del atoms.arrays["REF_forces"]
    with (
        pytest.warns(UQWarning, match="have no reference forces"),
        pytest.raises(LabelError, match="no reference forces, and the uncertainty model has no energy uncertainty"),
    ):
        evaluate(Predictor(predictor.backend, bare), frames, progress=False)


def test_bad_labels_are_named(predictor, frames):
    frames[7].arrays["REF_forces"][0, 0] = np.nan
    with pytest.raises(LabelError, match="test frame 7 has non-finite values in its reference forces"):
        evaluate(predictor, frames)
    del frames[7].arrays["REF_forces"]
    frames[7].info["REF_forces"] = np.zeros(3)
    frames[3].info["REF_energy"] = np.inf
    with pytest.raises(LabelError, match="test frame 3 has non-finite values in its reference energy"):
        evaluate(predictor, frames)


def test_forces_of_another_shape_are_refused(predictor, frames):
    n_atoms = len(frames[2])
    frames[2].set_array("REF_forces", None)
    frames[2].set_array("REF_forces", np.zeros((n_atoms, 2)))
    with pytest.raises(LabelError, match=rf"test frame 2 has forces of shape \({n_atoms}, 2\)"):
        evaluate(predictor, frames)


def test_the_potentials_own_forces_are_no_labels(calculator, predictor, frames):
    for atoms in frames:
        atoms.arrays["REF_forces"] = calculator.get_property("forces", atoms)
    with pytest.raises(LabelError, match="the labels are the potential's own forces"):
        evaluate(predictor, frames)


def test_structures_that_cannot_be_evaluated_are_named_before_the_work(predictor, frames):
    frames[20].numbers[0] = 79
    with pytest.raises(InputError, match="labelled test frame 20"):
        evaluate(predictor, frames)


# Uncertainties that are none


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_uncertainties_that_are_none_are_left_out_and_counted(predictor, frames, bad, assessment):
    def change(index: int, results: dict) -> None:
        if index == 0:  # of every batch, which are single frames here
            hydrogen = np.flatnonzero(frames[0].numbers == 1)[:1]
            if len(results["forces"]) == len(frames[0]):
                results["forces_uncertainty"][hydrogen] = bad
                results["energy_uncertainty"] = bad

    alike = sum(len(atoms) == len(frames[0]) for atoms in frames)
    found = evaluate(Altered(predictor, change), frames, **OPTIONS, batch_atoms=1)
    assert value(found, "left_out") == value(found, "left_out", element="H") == alike
    assert value(found, "left_out", element="O") == value(found, "left_out", method="second") == 0
    assert value(found, "left_out", "energy_per_atom") == alike
    # A largest uncertainty of 0 is not the one of the atom with 0.
    assert value(found, "left_out", "forces_max") == (0 if bad == 0 else alike)
    assert all(math.isfinite(score.value) for score in found.select(metric="nll"))
    assert value(found, "nll", method="second") == pytest.approx(value(assessment, "nll"), rel=1e-3)
    (score,) = found.select(method="bll", quantity="forces", element="all", metric="nll")
    n_atoms = sum(map(len, frames))
    assert score.n == n_atoms - alike
    assert f"bll: {alike} of {n_atoms} have no finite, positive uncertainty and are left out." in found.table()


def test_a_method_without_any_number(predictor, frames):
    def change(_: int, results: dict) -> None:
        results["forces_uncertainty"][:] = np.inf

    found = evaluate(Altered(predictor, change), frames, **OPTIONS)
    assert {score.metric for score in found.select(method="bll", quantity="forces")} == {"left_out"}
    assert value(found, "left_out", "forces_max") == 25
    assert value(found, "rmse", method="second") > 0
    (row,) = [line for line in found.table().splitlines() if line.split()[:2] == ["bll", "0"] and "-" in line][:1]
    assert set(row.split()[2:]) == {"-"}


def test_one_frame(predictor, frames):
    found = evaluate(predictor, frames[:1], **OPTIONS)
    assert value(found, "rmse") > 0
    assert math.isnan(value(found, "spearman", "energy_per_atom"))
    assert isinstance(found.table(), str)


# For people and programs


def test_table(assessment):
    text = assessment.table()
    blocks = [block.splitlines() for block in text.split("\n\n")]
    assert [block[0] for block in blocks[:5]] == [
        "forces (eV/Å)",
        "forces by element (eV/Å)",
        "largest force error of each frame (eV/Å)",
        "energy per atom (eV)",
        "stress (eV/Å³)",
    ]
    header, first, second = blocks[0][1:]
    assert header.split()[:3] == ["method", "n", "RMSE"]
    assert (first.split()[0], second.split()[0]) == ("bll", "second")
    low, high = (getattr(assessment.select(quantity="forces", metric="spearman")[0], end) for end in ("low", "high"))
    spearman, ceiling = value(assessment, "spearman"), value(assessment, "attainable_spearman")
    assert f"{spearman:.2f} ({low:.2f}–{high:.2f})  {ceiling:.2f}" in first
    for block in blocks[:5]:
        # Columns end at the same place.
        assert len({len(line) for line in block[1:]}) == 1
    elements = [line.split()[:2] for line in blocks[1][2:]]
    assert elements == [[method, symbol] for method in ("bll", "second") for symbol in ("H", "C", "O")]
    assert "25 frames" in text
    assert "above 0.1 eV/Å" in text


def test_select(assessment):
    assert assessment.select() == assessment.scores
    chosen = assessment.select(quantity="forces", element="O", metric="rmse")
    assert [score.method for score in chosen] == ["bll", "second"]
    assert assessment.select(method="none") == ()


def test_csv(assessment, tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text("old")
    assessment.to_csv(path)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(assessment.scores)
    for row, score in zip(rows, assessment.scores, strict=True):
        assert (row["method"], row["quantity"], row["element"], row["metric"]) == dataclasses.astuple(score)[:4]
        for name in ("value", "low", "high"):
            np.testing.assert_equal(float(row[name]), float(getattr(score, name)))
        assert int(row["n"]) == score.n
    assert [entry.name for entry in tmp_path.iterdir()] == ["scores.csv"]


def test_a_csv_that_cannot_be_written_leaves_nothing(assessment, tmp_path, monkeypatch):
    with pytest.raises(ArtefactError, match=r"cannot write .* Choose a folder that exists"):
        assessment.to_csv(tmp_path / "missing" / "scores.csv")
    path = tmp_path / "scores.csv"
    path.write_text("precious")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        assessment.to_csv(path)
    assert path.read_text() == "precious"
    assert [entry.name for entry in tmp_path.iterdir()] == ["scores.csv"]


def test_samples_are_what_was_scored(assessment):
    sample = assessment.samples["bll", "forces"]
    # Summed in another order: equal up to rounding, which depends on the processor.
    rmse = metrics.rmse(sample.residuals, np.zeros_like(sample.residuals))
    assert rmse == pytest.approx(value(assessment, "rmse"), rel=1e-14)
    np.testing.assert_allclose(sample.uncertainties, np.sqrt((sample.std**2).sum(1)))
    assert all(a <= b for a, b in pairwise(sample.frame))


def test_progress_is_shown_when_asked_for(predictor, frames, terminal, capsys):
    evaluate(predictor, frames, **(OPTIONS | {"n_bootstrap": 0}))
    assert capsys.readouterr().err == ""
    evaluate(predictor, frames, **(OPTIONS | {"n_bootstrap": 0, "progress": True}))
    assert "evaluate" in capsys.readouterr().err


def test_files_are_read(predictor, assessment, tmp_path: Path):
    from ase.io import write

    write(tmp_path / "test.xyz", labelled_frames(25, seed=3, cell=4.5))
    found = evaluate(predictor, tmp_path / "test.xyz", **OPTIONS)
    assert value(found, "rmse") == pytest.approx(value(assessment, "rmse"), rel=1e-4)
    with pytest.raises(LabelError, match="test frames: there is no file"):
        evaluate(predictor, tmp_path / "none.xyz")


class TestScored:
    """What stands in frames that `score` wrote is judged without the potential."""

    def test_gives_what_the_potential_gives_again(self, predictor, model, frames, assessment, tmp_path: Path):
        score_frames(frames, predictor, out=tmp_path / "scored.xyz", progress=False)
        found = evaluate_scored(tmp_path / "scored.xyz", model, **OPTIONS)
        assert found.n_frames == assessment.n_frames
        for one, other in zip(found.scores, assessment.scores, strict=True):
            assert dataclasses.astuple(one)[:4] == dataclasses.astuple(other)[:4]
            # Files hold eight digits; ranks of near ties may change.
            assert one.value == pytest.approx(other.value, rel=2e-3, abs=2e-3, nan_ok=True)

    def test_takes_the_shards_of_a_trajectory(self, predictor, model, frames, assessment, tmp_path: Path):
        shards = [tmp_path / f"{number}.xyz" for number in (1, 2)]
        for number, out in enumerate(shards, 1):
            score_frames(frames, predictor, out=out, shard=Shard(number, 2), batch_atoms=20, progress=False)
        found = evaluate_scored(shards, model, **OPTIONS)
        assert found.n_frames == assessment.n_frames
        assert value(found, "mean_squared_z") == pytest.approx(value(assessment, "mean_squared_z"), rel=1e-5)

    def test_refuses_frames_that_have_no_results_of_this_model(self, predictor, model, frames, tmp_path: Path):
        with pytest.raises(InputError, match=r"frame 0 has no forces_uncertainty, which frames have that `score` wro"):
            evaluate_scored(frames, model, **OPTIONS)
        out = tmp_path / "scored.xyz"
        one = dataclasses.replace(model, methods={"bll": model.methods["bll"]})
        score_frames(frames, predictor.backend, one, out=out, progress=False)
        with pytest.raises(InputError, match="frame 0 has no forces_uncertainty_"):
            evaluate_scored(out, model, **OPTIONS)

    def test_refuses_frames_of_another_model(self, predictor, model, frames, tmp_path: Path):
        record = dataclasses.replace(model.record, uncertainty=model.record.uncertainty * 1.1)
        other = dataclasses.replace(model, record=record)
        out = tmp_path / "scored.xyz"
        score_frames(frames, predictor, out=out, progress=False)
        assert {atoms.info["scored_with"] for atoms in read_frames(out)} == {model.name}
        assert model.name in model.summary(details=True)
        with pytest.raises(
            InputError,
            match=rf"test frame 0 was scored with another uncertainty model \({model.name}\) than the one that is "
            rf"given \({other.name}\)\. Give the one",
        ):
            evaluate_scored(out, other, **OPTIONS)
        # Reference runs do not change what is scored.
        evaluate_scored(out, dataclasses.replace(model, reference=None), **OPTIONS)
        # Files of older versions and of other tools do not tell.
        untold = read_frames(out)
        for atoms in untold:
            del atoms.info["scored_with"]
        assert evaluate_scored(untold, other, **OPTIONS).n_frames == len(untold)

    def test_does_not_take_the_results_for_labels(self, predictor, model, frames, tmp_path: Path):
        for atoms in frames:
            for name in ("REF_energy", "REF_stress"):
                atoms.info.pop(name, None)
            atoms.arrays.pop("REF_forces", None)
            atoms.calc = None
        score_frames(frames, predictor, out=tmp_path / "scored.xyz", progress=False)
        with pytest.raises(LabelError, match="none of the 25 test frames has reference energies or forces"):
            evaluate_scored(tmp_path / "scored.xyz", model, **OPTIONS)
