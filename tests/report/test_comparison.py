"""What the page of a comparison says and shows, and that it asks nobody."""

import re

import matplotlib as mpl
import numpy as np
import pytest

mpl.use("Agg")

import torch
from ase import Atoms
from ase.build import bulk, molecule
from matplotlib import pyplot as plt
from PIL import Image

from ase_uq.backends import load_backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.diagnostics.comparison import Comparison, compare
from ase_uq.diagnostics.features import Latent
from ase_uq.errors import InputError
from ase_uq.forward_pass import ForwardPass
from ase_uq.report.comparison import write_comparison
from ase_uq.report.comparison_plots import _folded, error_table, latent_maps

EVIL = "<script>alert(1)</script>"


def some(forward_pass: ForwardPass) -> torch.Tensor:
    return forward_pass.features[:, ::5] @ torch.randn(
        forward_pass.features[:, ::5].shape[1], 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )


def curved(forward_pass: ForwardPass) -> torch.Tensor:
    return torch.tanh(some(forward_pass))


def compared(frames: list[Atoms], *names: str) -> Comparison:
    backend = load_backend(ToyCalculator(("H", "C", "O", "Si")))
    pair = {name: Latent(backend, each) for name, each in zip(names, (some, curved), strict=True)}
    return compare(pair, frames, n_neighbours=12, n_bootstrap=5, progress=False)


@pytest.fixture(scope="module")
def frames() -> list[Atoms]:
    rng = np.random.default_rng(0)
    made = [molecule(("H2O", "CH3OH")[number % 2]) for number in range(40)]
    for atoms in made:
        atoms.positions += 0.1 * rng.normal(size=(len(atoms), 3))
    return made


@pytest.fixture(scope="module")
def comparison(frames: list[Atoms]) -> Comparison:
    return compared(frames, "one", EVIL)


@pytest.fixture(scope="module")
def page(frames: list[Atoms], comparison: Comparison, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("page") / "comparison.html"
    pictures = write_comparison(path, comparison, frames, sources={"frames": "frames.xyz"})
    return path, pictures, path.read_text("utf-8")


def test_numbers_are_those_of_the_comparison(page, comparison: Comparison):
    text = page[2]
    pair = ("one", EVIL)
    value, low, high = comparison.lfre[pair]
    row = rf">one to .*?<td>{comparison.gfre[pair]:.3f}</td><td>{comparison.beyond_elements(pair):.3g}</td>"
    assert re.search(row + rf"<td>{value:.3f} \({low:.3f} to {high:.3f}\)</td><td>{comparison.gfrd[pair]:.3f}", text)
    assert "<dd>40<small>180 atoms</small></dd>" in text
    for symbol in ("H", "C", "O"):
        error, share = comparison.error_of_element(pair, symbol), comparison.beyond_elements(pair, symbol)
        assert f"<td>{error:.3f}, {share:.3g}</td>" in text
    worst = comparison.worst(comparison.pointwise.errors[pair], 1)[0]
    assert f'<th scope="row">{worst.frame}</th><td>{worst.symbol} {worst.atom}</td><td>{worst.error:.2f}</td>' in text
    assert "frames.xyz" in text


def test_it_asks_nobody_and_runs_nothing(page):
    text = page[2]
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in text
    assert not re.search(r'(src|href)="(?!data:)', text)


def test_pictures_are_files_too(page, comparison: Comparison):
    _, pictures, text = page
    names = [path.name for path in pictures]
    assert names[:3] == ["reconstruction.png", "elements.png", "latent_maps.png"]
    expected = [
        f"unseen_{which}_{one.frame}.png"
        for which, name in enumerate(comparison.names)
        for one in comparison.worst(comparison.seen_by_no_other(name), 3)
    ]
    assert names[3:] == expected
    assert {path.parent.name for path in pictures} == {"comparison_figures"}
    for path in pictures:
        with Image.open(path) as image:
            assert image.width > 400
    assert text.count("<img") == len(pictures)
    assert all(len(alt) > 30 for alt in re.findall(r'alt="([^"]*)"', text))
    assert not plt.get_fignums()


def test_captions_name_no_colours_which_a_dark_page_changes(page):
    captions = " ".join(re.findall(r"<figcaption>(.*?)</figcaption>", page[2], re.DOTALL))
    assert "dark" not in captions.lower()
    assert not re.search(r"\b(red|blue|black|white|orange|gr[ae]y|yellow|green)\b", captions)


@pytest.mark.usefixtures("blank_pictures")
def test_of_many_elements_the_most_frequent_are_drawn(frames, comparison, tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ase_uq.report.comparison._MOST_ELEMENTS", 2)
    write_comparison(tmp_path / "c.html", comparison, frames)
    text = (tmp_path / "c.html").read_text("utf-8")
    assert "The 2 most frequent of 3 elements; the table has all." in text
    assert '<th scope="row">C</th>' in text


@pytest.mark.usefixtures("blank_pictures")
def test_pictures_of_an_earlier_page_go(frames: list[Atoms], comparison: Comparison, tmp_path):
    (tmp_path / "a").mkdir()
    write_comparison(tmp_path / "c.html", comparison, frames, pictures=tmp_path / "a")
    old = tmp_path / "a" / "unseen_9_999.png"
    old.write_bytes((tmp_path / "a" / "elements.png").read_bytes())
    write_comparison(tmp_path / "c.html", comparison, frames, pictures=tmp_path / "a")
    assert not old.exists()
    old.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"unseen_9_999.png is not a picture that `ase-uq` wrote"):
        write_comparison(tmp_path / "c.html", comparison, frames, pictures=tmp_path / "a")


def test_other_frames_are_refused(frames: list[Atoms], comparison: Comparison, tmp_path):
    with pytest.raises(InputError, match="there are 39 frames, but 40 were compared"):
        write_comparison(tmp_path / "c.html", comparison, frames[:-1])
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("blank_pictures")
def test_of_a_large_frame_the_surroundings_of_the_worst_atom_are_drawn(tmp_path, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    frames = [bulk("Si", cubic=True) * 4 for _ in range(4)]
    for atoms in frames:
        atoms.positions += 0.1 * rng.normal(size=(len(atoms), 3))
    drawn = []
    monkeypatch.setattr(
        "ase_uq.report.comparison.plots.structure",
        lambda atoms, errors, largest: drawn.append((atoms, errors, largest)) or plt.subplots()[1],
    )
    comparison = compared(frames, "one", "other")
    write_comparison(tmp_path / "c.html", comparison, frames)
    assert {len(atoms) for atoms, _, _ in drawn} == {400}
    atoms, errors, largest = drawn[0]
    assert errors.max() == pytest.approx(largest) == comparison.seen_by_no_other("one").max()
    assert "By element" not in (tmp_path / "c.html").read_text("utf-8")  # there is only one


def test_a_table_in_colour_has_its_numbers():
    ax = error_table([[np.nan, 0.25], [1.2, np.nan]], ["a", "b"], ["c", "d"], title="errors")
    assert [text.get_text() for text in ax.texts] == ["0.25", "1.20"]
    assert [text.get_color() for text in ax.texts] == ["black", "white"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    with pytest.raises(ValueError, match=r"values of shape \(1, 1\) for 2 rows and 1 columns"):
        error_table([[1]], ["a", "b"], ["c"])
    plt.close("all")


def test_maps_show_each_atom_and_its_element():
    points = np.random.default_rng(0).normal(size=(30, 2))
    symbols = ["H"] * 20 + ["O"] * 10
    errors = {"a": np.arange(30) / 30, "b": np.zeros(30)}
    ax = latent_maps(
        {"a": points, "b": -points}, errors, symbols, explained={"a": [0.5, 0.2], "b": [1, 0]}, label="misses"
    )
    hydrogens, oxygens = ax.collections
    np.testing.assert_allclose(np.asarray(hydrogens.get_offsets()), points[:20])  # the worst on top
    np.testing.assert_allclose(np.asarray(oxygens.get_offsets()), points[20:])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["H", "O"]
    assert ax.get_xlabel() == "component 1, 50% of the variance"
    plt.close("all")


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("mace", ["mace"]),
        ("orb-conservative", ["orb-", "conservative"]),
        ("orb_v3_direct_20_omat", ["orb_v3_", "direct_20_omat"]),
    ],
)
def test_long_names_are_folded(name: str, lines: list[str]):
    assert _folded(name).replace("\n", "") == name
    assert max(map(len, _folded(name).split("\n"))) <= 16
    assert len(_folded(name).split("\n")) == len(lines)
