"""Every option of every method is reached by words, and what is wrong with one is told in a line."""

import sys
from pathlib import Path

import pytest

from ase_uq.methods import available_methods, make_method
from ase_uq.methods.bll import BLL
from ase_uq.methods.kernel import Kernel
from ase_uq.methods.options import make_methods
from ase_uq.methods.pdrum import PDRUM
from ase_uq.numerics.training import Training

PLUGIN = """
from dataclasses import dataclass, field
from typing import Literal

from ase_uq.methods.base import Method

@dataclass(frozen=True)
class Inner:
    shape: tuple[int, ...] = (3,)

@dataclass(frozen=True)
class Ours(Method):
    name = "ours"
    width: "int" = 8
    deep: bool = False
    label: str = "x"
    order: Literal[1, 2] = 1
    table: dict = field(default_factory=dict)
    inner: Inner = Inner()

    def start(self):
        raise NotImplementedError
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed third-party package with a method; gives the name of the method."""
    (tmp_path / "some_method.py").write_text(PLUGIN)
    metadata = tmp_path / "some_method-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: some-method\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[ase_uq.methods]\nours = some_method\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "some_method", raising=False)
    return "ours"


def one(name: str, *assignments: str):
    (method,) = make_methods([name], assignments)
    return method


def test_without_assignments_methods_are_as_they_are():
    assert make_methods(["kernel", "bll"]) == [Kernel(), BLL()]
    assert make_methods(["bll", "bll"]) == [BLL(), BLL()]  # refused where they would be fitted


def test_values_have_the_types_of_their_options():
    assert one("kernel", "kernel.landmarks=512", "kernel.noise=1e-3", "kernel.kernel=linear") == Kernel(
        landmarks=512, noise=1e-3, kernel="linear"
    )
    assert one("bll", "bll.radii=2.5, 5") == BLL(radii=(2.5, 5.0))
    assert one("bll", " bll.features = last_layer ").features == "last_layer"


def test_options_go_to_their_method():
    kernel, bll = make_methods(["kernel", "bll"], ["bll.features=last_layer", "kernel.features=latent"])
    assert (kernel.features, bll.features) == ("latent", "last_layer")  # pyright: ignore


def test_options_inside_an_option_keep_the_others():
    found = one("pdrum", "pdrum.training.max_epochs=50", "pdrum.training.hidden=8,4", "pdrum.folds=3")
    assert found == PDRUM(folds=3, training=Training(hidden=(8, 4), max_epochs=50))
    assert one("pdrum", "pdrum.training.seed=1").training.hidden == PDRUM().training.hidden


def test_the_later_of_two_counts():
    assert one("kernel", "kernel.landmarks=3", "kernel.landmarks=4").landmarks == 4


def test_options_are_set_together():
    # Each alone would be refused.
    assert one("knn", "knn.rows=5", "knn.neighbours=4").rows == 5
    with pytest.raises(ValueError, match="rows is at least the number of neighbours, 10, not 5"):
        one("knn", "knn.rows=5")


@pytest.mark.parametrize("name", available_methods())
def test_defaults_are_listed_as_they_would_be_set(name: str):
    with pytest.raises(ValueError, match=rf"'{name}' sets nothing: write METHOD\.OPTION=VALUE\. ") as error:
        make_methods([name], [name])
    _, colon, listed = str(error.value).partition("defaults: ")
    assert bool(colon) == (name not in ("committee", "confidence"))
    assert one(name, *(f"{name}.{word}" for word in listed.split())) == make_method(name)


def test_plugins(plugin: str):
    words = ["ours.width=9", "ours.deep=true", "ours.label=a=b", "ours.order=2", "ours.inner.shape=1,2"]
    found = one("ours", *words)
    assert (found.width, found.deep, found.label, found.order, found.inner.shape) == (9, True, "a=b", 2, (1, 2))
    with pytest.raises(ValueError, match=r"ours\.deep takes true or false, not 'yes'"):
        one("ours", "ours.deep=yes")
    with pytest.raises(ValueError, match=r"ours.inner.shape takes a whole number, or several with commas between, not"):
        one("ours", "ours.inner.shape=1,x")
    with pytest.raises(ValueError, match=r"ours\.table cannot be set by a word: it is of type <class 'dict'>"):
        one("ours", "ours.table=1")
    with pytest.raises(ValueError, match=r"deep=false label=x order=1 table=\{\} inner\.shape=3$"):
        one("ours", "ours.wdth=1")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("kernle.landmarks=3", r"there is no method 'kernle'\. Did you mean kernel\? There are: bll, "),
        ("pops.rows=3", r"'pops\.rows=3' is for pops, which is not among the methods bll, kernel: add it to them"),
        (
            "kernel.landmark=3",
            r"no option 'landmark'\. Did you mean landmarks\? Options of kernel and .*length=3",
        ),
        ("kernel.a.b=3", r"kernel has no option 'a\.b'\. Options of kernel"),
        ("kernel.landmarks", r"'kernel\.landmarks' sets nothing: write METHOD\.OPTION=VALUE"),
        ("landmarks=3", r"there is no method 'landmarks'"),
        ("kernel=linear", r"'kernel=linear' sets nothing"),
        ("kernel.landmarks=many", r"kernel\.landmarks takes a whole number, not 'many'"),
        ("kernel.landmarks=2.5", r"kernel\.landmarks takes a whole number, not '2\.5'"),
        ("kernel.noise=", r"kernel\.noise takes a number, not ''"),
        ("bll.radii=2,x", r"bll\.radii takes a number, or several with commas between, not '2,x'"),
        ("bll.features=all", r"bll\.features takes latent or last_layer, not 'all'"),
        ("bll.ridge=2", r"the ridge lies between 0 and 1, not at 2\.0"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(assignment: str, message: str):
    with pytest.raises(ValueError, match=message) as error:
        make_methods(["bll", "kernel"], [assignment])
    assert "\n" not in str(error.value)


def test_an_option_inside_an_option_that_is_not_there():
    with pytest.raises(ValueError, match=r"pdrum has no option 'training.epochs'\. Did you mean training\.max_epochs"):
        one("pdrum", "pdrum.training.epochs=3")
    with pytest.raises(ValueError, match=r"pdrum has no option 'training'\. Did you mean training\..*hidden=64,64"):
        one("pdrum", "pdrum.training=3")
