"""A comparison has the errors of `gfre`, `gfrd` and `lfre`, by element and frame, and says them in words."""

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule

from ase_uq.backends import load_backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.diagnostics.comparison import Comparison, compare
from ase_uq.diagnostics.features import Latent
from ase_uq.diagnostics.reconstruction import gfrd, gfre, lfre, pointwise_errors, quarter_of
from ase_uq.errors import InputError
from ase_uq.forward_pass import ForwardPass

SHAPE = torch.randn(48, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ODD = 37  # a frame of another molecule


def few(forward_pass: ForwardPass) -> torch.Tensor:
    return (forward_pass.features[:, :48] @ SHAPE)[:, :4]


def more(forward_pass: ForwardPass) -> torch.Tensor:
    return forward_pass.features[:, :48] @ SHAPE


def curved(forward_pass: ForwardPass) -> torch.Tensor:
    return torch.tanh(more(forward_pass))


@pytest.fixture(scope="module")
def frames() -> list[Atoms]:
    rng = np.random.default_rng(0)
    made = []
    for number in range(80):
        atoms = molecule("CO2" if number == ODD else ("H2O", "CH3OH")[number % 2])
        atoms.positions += 0.1 * rng.normal(size=(len(atoms), 3))
        made.append(atoms)
    return made


@pytest.fixture(scope="module")
def latents() -> dict[str, Latent]:
    backend = load_backend(ToyCalculator(("H", "C", "O")))
    features: dict[str, Callable] = {"few": few, "more": more, "curved": curved}
    return {name: Latent(backend, each) for name, each in features.items()}


@pytest.fixture(scope="module")
def comparison(frames: list[Atoms], latents: dict[str, Latent]) -> Comparison:
    return compare(latents, frames, n_neighbours=20, n_bootstrap=20, progress=False)


def test_it_has_the_errors_of_each_pair(comparison: Comparison, frames: list[Atoms], latents: dict[str, Latent]):
    pair = latents["more"], latents["curved"]
    assert comparison.pairs == tuple((a, b) for a in latents for b in latents if a != b)
    there, back = ("more", "curved"), ("curved", "more")
    assert (comparison.gfre[there], comparison.gfre[back]) == pytest.approx(gfre(*pair, frames, progress=False))
    assert (comparison.gfrd[there], comparison.gfrd[back]) == pytest.approx(gfrd(*pair, frames, progress=False))
    found = lfre(*pair, frames, n_neighbours=20, n_bootstrap=20, progress=False)
    np.testing.assert_allclose([comparison.lfre[there], comparison.lfre[back]], found)
    errors = pointwise_errors(*pair, frames, progress=False).errors["first", "second"]
    np.testing.assert_allclose(comparison.pointwise.errors[there], errors, rtol=1e-5)
    assert comparison.gfre["more", "few"] < 1e-6 < 0.05 < comparison.gfre["few", "more"]


def test_elements_add_up_to_the_whole(comparison: Comparison):
    pair = ("few", "curved")
    numbers = comparison.pointwise.numbers
    squares = [
        comparison.error_of_element(pair, s) ** 2 * (numbers == z).sum() for z, s in ((1, "H"), (6, "C"), (8, "O"))
    ]
    assert np.sqrt(sum(squares) / len(numbers)) == pytest.approx(comparison.gfre[pair], rel=1e-5)
    assert comparison.elements == ("H", "C", "O")
    shares = [comparison.beyond_elements(pair, symbol) for symbol in comparison.elements]
    assert min(shares) < comparison.beyond_elements(pair) < max(shares)
    assert comparison.beyond_elements(pair) > comparison.gfre[pair]  # within elements there is less to tell


def test_of_many_elements_the_most_frequent_are_listed(comparison: Comparison, monkeypatch: pytest.MonkeyPatch):
    assert comparison.most_frequent(2) == ("H", "O")
    assert comparison.most_frequent(9) == comparison.elements
    monkeypatch.setattr("ase_uq.diagnostics.comparison._SHOWN", 1)
    assert "2 more elements, with fewer atoms, are not listed here." in comparison.table()


def test_what_no_other_sees_is_the_smallest_error(comparison: Comparison):
    errors = [comparison.pointwise.errors[name, "curved"] for name in ("few", "more")]
    np.testing.assert_array_equal(comparison.seen_by_no_other("curved"), np.minimum(*errors))


def test_the_worst_frames_are_named_once_each_with_their_worst_atom(comparison: Comparison):
    errors = comparison.pointwise.errors["few", "more"]
    worst = comparison.worst(errors, 4)
    assert len({each.frame for each in worst}) == 4
    largest = [errors[comparison.pointwise.frame == frame].max() for frame in range(80)]
    assert [each.frame for each in worst] == np.argsort(largest)[::-1][:4].tolist()
    row = int(errors.argmax())
    assert (worst[0].atom, worst[0].error) == (comparison.pointwise.place[row], pytest.approx(errors[row]))
    assert len(comparison.worst(errors, 500)) == 80


def test_a_frame_that_is_unlike_the_others_is_found(comparison: Comparison):
    assert comparison.worst(comparison.pointwise.errors["few", "more"], 1)[0].frame == ODD


def test_sampled_atoms_are_those_of_the_map(comparison: Comparison, frames: list[Atoms], latents: dict[str, Latent]):
    backend = latents["more"].backend
    rows = more(backend.forward(backend.collate(frames)))[comparison.sampled]
    coordinates = comparison.planes["more"].coordinates["atoms"]
    assert len(comparison.sampled) == len(set(comparison.sampled.tolist())) == len(coordinates)
    centred = (rows - rows.mean(0)).numpy()
    axes = np.linalg.svd(centred, full_matrices=False)[2][:2]
    np.testing.assert_allclose(np.abs(coordinates), np.abs(centred @ axes.T), atol=1e-8)


def test_everything_is_said(comparison: Comparison):
    text = comparison.table()
    assert text.startswith("80 frames, 357 atoms; features: few 4, more 9, curved 9")
    row = next(line for line in text.splitlines() if line.startswith("from few"))
    expected = [f"{comparison.gfre['few', name]:.3f}" for name in ("more", "curved")]
    assert row.split() == ["from", "few", "-", *expected]
    low, high = comparison.lfre["few", "curved"][1:]
    assert f"({low:.3f}-{high:.3f})" in text
    assert f"frame {ODD} (" in text
    assert "The features of few follow best from those of more: GFRE 0.000" in text
    assert max(map(len, text.splitlines())) < 160
    for symbol in comparison.elements:
        assert symbol in text


def test_numbers_are_json(comparison: Comparison):
    found = json.loads(json.dumps(comparison.numbers(), allow_nan=False))
    assert found["n_features"] == {"few": 4, "more": 9, "curved": 9}
    (pair,) = [each for each in found["pairs"] if (each["from"], each["to"]) == ("few", "curved")]
    assert pair["gfre"] == comparison.gfre["few", "curved"]
    assert pair["elements"]["H"]["error"] == comparison.error_of_element(("few", "curved"), "H")
    worst = comparison.worst(comparison.pointwise.errors["few", "curved"])
    assert [each["frame"] for each in pair["worst"]] == [each.frame for each in worst]
    assert pair["lfre_interval"] == list(comparison.lfre["few", "curved"][1:])


def test_few_atoms_have_few_neighbours(frames: list[Atoms], latents: dict[str, Latent]):
    two = {name: latents[name] for name in ("few", "curved")}
    found = compare(two, frames[:20], n_bootstrap=0, progress=False)
    half = quarter_of(torch.from_numpy(found.pointwise.frame), 1) // 2
    assert found.n_neighbours == int(torch.bincount(half).min()) // 2
    assert found.numbers()["pairs"][0]["lfre_interval"] == [None, None]


@pytest.mark.usefixtures("terminal")
def test_bars_are_shown(frames: list[Atoms], latents: dict[str, Latent], capsys: pytest.CaptureFixture):
    compare({name: latents[name] for name in ("few", "curved")}, frames[:20])
    told = capsys.readouterr().err
    for title in ("features", "local maps", "atoms"):
        assert f"{title}: " in told


def test_what_is_refused(frames: list[Atoms], latents: dict[str, Latent]):
    with pytest.raises(ValueError, match="there is 1 potential; give at least two"):
        compare({"few": latents["few"]}, frames)
    with pytest.raises(InputError, match=r"small: frame 1 cannot be used: .*C"):
        compare({"few": latents["few"], "small": ToyCalculator(("H", "O"))}, frames, progress=False)
    with pytest.raises(InputError, match=r"no element in common.*few: H, C, O; other: Si"):
        compare({"few": latents["few"], "other": ToyCalculator(("Si",))}, frames, progress=False)
    with pytest.raises(InputError, match=r"all has 55 features, but a half of the frames has only"):
        compare({"all": ToyCalculator(("H", "C", "O")), "few": latents["few"]}, frames[:8], progress=False)
