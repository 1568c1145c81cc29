"""Whole files with wrong contents: every entry and every tensor changed in every way, and the digest written again.

Such a file is refused with an `ArtefactError` that names the entry, or gives finite, positive uncertainties.
"""

import copy
import functools
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ase import Atoms
from torch import Tensor

from ase_uq import UncertaintyModel, fit
from ase_uq.backends import load_backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.calibration import FarFieldCalibrator
from ase_uq.errors import ArtefactError, PotentialMismatch, UQWarning
from ase_uq.fitting import combination as fitting
from ase_uq.forward_pass import ConfidenceBins, ForwardPass, Members
from ase_uq.io.entries import Entries, StoredTensors
from ase_uq.io.tensor_file import read_tensor_file, write_tensor_file
from ase_uq.methods import make_method, method_class
from ase_uq.methods.base import Head, Implied, Method, Raw
from ase_uq.numerics.training import Training
from ase_uq.testing.methods import ELEMENTS, forward_pass_of, labelled_frames
from ase_uq.thresholds.data import ReferenceRuns
from ase_uq.uncertainty_model import contents as contents_module
from ase_uq.uncertainty_model import file

KIND, SCHEMA = "uncertainty model", 7
FITTED = Path(__file__).parents[1] / "fitted"
EMBEDDED = Path(file.__file__).parents[1] / "embedded"
QUICK = Training(hidden=(4,), max_epochs=2)
# Of the changes of an entry so many are tried: one in five, in turn, so that all kinds of entries meet all changes.
SHARE = 5
# Of one entry; `ABSENT` takes it away.
ABSENT = object()
VALUES = (ABSENT, None, "x", True, math.nan, math.inf, -1, 0, 0.5, 1e300, 10**12, 10**30, [], [0.5, "x"], {}, {"x": 1})

_cached = functools.cache(method_class)

Contents = tuple[dict[str, Any], dict[str, Tensor]]
Path_ = tuple[str | int, ...]


@dataclass(frozen=True)
class Case:
    """A file that was fitted, and a batch for its potential."""

    contents: Contents
    batch: ForwardPass

    def model(self, contents: Contents | None = None) -> UncertaintyModel:
        """What is loaded from these contents, without the time that a disk takes."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(file, "read_tensor_file", lambda *_: contents or copy.deepcopy(self.contents))
            patch.setattr(contents_module, "method_class", _cached)  # entry points are read from many files
            return UncertaintyModel.load("memory.uq.safetensors")

    def is_refused_or_harmless(self, contents: Contents, names: tuple[str, ...]) -> str:
        """Asserts it; returns the message, or nothing."""
        try:
            model = self.model(contents)
        except ArtefactError as error:
            message = str(error)
            assert message.startswith("memory.uq.safetensors is not an uncertainty model that can be used: ")
            assert message.endswith("take it from a backup, or fit again.")
            assert any(name in message for name in names), f"{names} are not in {message!r}"
            assert len(message) < 600
            return message
        if {"provenance", "edges", "likelihoods", "far_field", "reference"} & {*names[:3]}:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                model.summary(details=True)
        try:
            results = model.apply(self.batch)
        except PotentialMismatch as error:  # which is told by the potential alone
            assert {"parameters", "head/pdrum/mixing"} & {*names}
            return str(error)
        for key, value in results.items():
            if "uncertainty" in key:
                assert bool((value.isfinite() & (value > 0)).all()), key
        return ""


def frames(count: int, seed: int) -> list[Atoms]:
    return labelled_frames(count, seed=seed, cell=6.0)


def case_of(*methods: str | Method, direct: bool = False, n_frames: int = 10) -> Case:
    """Of all parts that a file can have, if there are several methods."""
    calculator = ToyCalculator(ELEMENTS, direct=direct)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", UQWarning)
        patch.setattr(fitting, "_TRAINING", QUICK)
        if len(methods) == 1:  # quicker, and σ has no far end that hides what is wrong
            patch.setattr("ase_uq.fitting.stages.know_nothing", lambda *_, **__: None)
        patch.setattr(fitting, "is_earned", lambda _: True)
        model = fit(
            calculator,
            frames(n_frames, 1),
            frames(n_frames, 2),
            perturbed=frames(10, 5),
            methods=methods,
            progress=False,
        )
    runs = ReferenceRuns((torch.linspace(1, 2, 5).numpy(),) * 3, interval=0.5)
    batch = forward_pass_of(load_backend(calculator), frames(3, 3), gradients=model.gradients)
    return Case(contents_of(model.with_reference(runs)), batch)


def contents_of(model: UncertaintyModel) -> Contents:
    written: list[Contents] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file, "write_tensor_file", lambda _path, _kind, _schema, *contents: written.append(contents))
        model.save("memory.uq.safetensors")
    header, tensors = written[0]
    return json.loads(json.dumps(header)), {name: tensor.detach().clone() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def whole() -> Case:
    """Two methods and their combination."""
    return case_of("bll", "mahalanobis", n_frames=24)


HEADS: dict[str, Callable[[], Case]] = {
    "bll of a direct head": lambda: case_of("bll", direct=True),
    "bll of the last layer": lambda: case_of(make_method("bll", features="last_layer")),
    "kernel": lambda: case_of(make_method("kernel", landmarks=6)),
    "linear kernel": lambda: case_of(make_method("kernel", kernel="linear")),
    "knn": lambda: case_of(make_method("knn", rows=20)),
    "gmm": lambda: case_of(make_method("gmm", dimensions=3, components=2)),
    "pops": lambda: case_of("pops"),
    "ntk": lambda: case_of(make_method("ntk", size=8, tangents=1)),
    "pdrum": lambda: case_of(make_method("pdrum", folds=2, training=QUICK)),
    "pdrum diff": lambda: case_of(make_method("pdrum", folds=2, training=QUICK, variant="diff")),
    "pdrum conservative": lambda: case_of(
        make_method("pdrum", folds=2, training=QUICK, variant="diff_conservative"),
    ),
}


@pytest.fixture(scope="module", params=list(HEADS))
def one_head(request: pytest.FixtureRequest) -> Case:
    return HEADS[request.param]()


def places(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Every entry of a header; of lists the first and the last."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from places(entry, (*path, key))
    elif isinstance(value, list) and value:
        for index in {0, len(value) - 1}:
            yield from places(value[index], (*path, index))


def changed(header: dict[str, Any], path: Path_, value: Any) -> dict[str, Any]:
    """A copy with another value at a place."""
    header = json.loads(json.dumps(header))  # quicker than deepcopy
    parent: Any = header
    for key in path[:-1]:
        parent = parent[key]
    if value is ABSENT:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return header


def other_values(header: dict[str, Any], path: Path_) -> Iterator[Any]:
    """Other types and sizes, and what looks alike."""
    yield from VALUES
    value: Any = header
    for key in path:
        value = value[key]
    if isinstance(value, list):
        yield [*value, *value[-1:]]
        yield value[:-1]
    elif isinstance(value, dict):
        yield {**value, "x": 1}
    elif isinstance(value, str):
        yield value + "x"
    elif isinstance(value, int | float):
        yield from (-value, value * 1e9, value * 1e-9)


def check_header(case: Case, under: Path_ = ()) -> int:
    """Changes every entry below a place; returns how many changes were refused."""
    header, tensors = case.contents
    part: Any = header
    for key in under:
        part = part[key]
    refused = 0
    for number, path in enumerate(places(part)):
        path = (*under, *path)
        for value in [*other_values(header, path)][number % SHARE :: SHARE]:
            names = (*(str(key) for key in path), "edge")
            refused += bool(case.is_refused_or_harmless((changed(header, path, value), dict(tensors)), names))
    return refused


def other_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Other dtypes, shapes and values."""
    for dtype in (torch.float16, torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool):
        if dtype != tensor.dtype:
            yield tensor.nan_to_num().to(dtype)
    yield tensor[None]
    yield tensor.new_zeros(0)
    for dimension, size in enumerate(tensor.shape):
        yield torch.cat([tensor, tensor.narrow(dimension, size - 1, 1)], dimension)
        yield tensor.narrow(dimension, 0, size - 1)
    yield torch.zeros_like(tensor)
    yield torch.full_like(tensor, 100)
    if tensor.is_floating_point():
        yield -tensor
        for value in (math.nan, math.inf, -math.inf, torch.finfo(tensor.dtype).max, 1e30, -1e30, 1e-30):
            yield with_last(tensor, value)
    else:
        for value in (torch.iinfo(tensor.dtype).min, torch.iinfo(tensor.dtype).max, 119):
            yield with_last(tensor, value)


def with_last(tensor: Tensor, value: float) -> Tensor:
    """A copy with another last value that is a number."""
    tensor = tensor.clone()
    known = torch.nonzero(~tensor.flatten().isnan())[-1]
    tensor.view(-1)[known] = value
    return tensor


def check_tensors(case: Case, prefix: str = "") -> None:
    """Changes every tensor whose name begins so."""
    header, tensors = case.contents
    for number, (name, tensor) in enumerate(tensors.items()):
        if not name.startswith(prefix):
            continue
        without = {key: value for key, value in tensors.items() if key != name}
        for contents in (without, {**without, f"{name}x": tensor}):
            assert name in case.is_refused_or_harmless((json.loads(json.dumps(header)), contents), (name,))
        assert f"{name}x" in case.is_refused_or_harmless(
            (copy.deepcopy(header), {**tensors, f"{name}x": tensor}), (name,)
        )
        for other in [*other_tensors(tensor)][number % SHARE :: SHARE]:
            names = (name, name.rpartition("/")[0], "edges", "atoms", name.split("/")[1] if "/" in name else name)
            case.is_refused_or_harmless((json.loads(json.dumps(header)), {**tensors, name: other}), names)


class TestOfTheWholeFile:
    def test_it_is_what_is_meant(self, whole: Case):
        header, tensors = whole.contents
        assert "residual" in header["combination"]["weights"]
        assert {name.partition("/")[0] for name in tensors} == {
            "identity", "edges", "record", "perturbed", "reference", "far_field", "combination", "head",
        }  # fmt: skip
        assert whole.is_refused_or_harmless(copy.deepcopy(whole.contents), ()) == ""

    @pytest.mark.parametrize(
        "part", ["identity", "methods", "combination", "edges", "provenance", "reference", "far_field"]
    )
    def test_any_entry_may_be_wrong(self, whole: Case, part: str):
        assert check_header(whole, (part,)) > 10

    def test_any_part_may_be_wrong(self, whole: Case):
        header, tensors = whole.contents
        for part in header:
            for value in VALUES:
                names = (part, "tensor", "far_field")
                whole.is_refused_or_harmless((changed(header, (part,), value), dict(tensors)), names)

    def test_any_tensor_may_be_wrong(self, whole: Case):
        check_tensors(whole)


def test_any_entry_and_tensor_of_a_head_may_be_wrong(one_head: Case):
    (name,) = one_head.contents[0]["methods"]
    assert one_head.is_refused_or_harmless(copy.deepcopy(one_head.contents), ()) == ""
    check_header(one_head, ("methods", name, "settings"))
    check_tensors(one_head, "head/")


@pytest.mark.parametrize("name", ["committee", "confidence"])
def test_any_entry_of_a_head_without_tensors_may_be_wrong(whole: Case, name: str):
    header, tensors = copy.deepcopy(whole.contents)
    method = {"settings": {"mean_square": 0.3}, "calibrators": {"forces": AFFINE}, "likelihoods": {}}
    header |= {"methods": {name: method}, "primary": name, "combination": None}
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(("head/", "combination/"))}
    batch = whole.batch
    assert batch.forces is not None
    members = Members(
        torch.stack([batch.energy, 2 * batch.energy]), torch.stack([batch.forces, 2 * batch.forces]), None
    )
    bins = torch.full((len(batch.numbers), 3), 1 / 3)
    confidence = ConfidenceBins(bins, torch.tensor([0.0, 0.1, 0.3, 0.4]))
    case = Case((header, kept), replace(batch, members=members, confidence=confidence))
    assert case.is_refused_or_harmless(copy.deepcopy(case.contents), ()) == ""
    assert check_header(case, ("methods",)) > 20


@pytest.mark.parametrize("path", [*FITTED.glob("v?.uq.safetensors"), *EMBEDDED.glob("*.uq.safetensors")], ids=str)
def test_kept_files_of_older_schemas_are_right(path: Path):
    assert UncertaintyModel.load(path).summary(details=True)


def test_any_entry_and_tensor_of_an_older_combination_may_be_wrong():
    contents = read_tensor_file(FITTED / "v3.uq.safetensors", KIND, SCHEMA)
    water = [atoms for atoms in labelled_frames(20, seed=3) if set(atoms.symbols) == {"H", "O"}]
    case = Case(contents, forward_pass_of(load_backend(ToyCalculator(("H", "O"), direct=True)), water))
    assert case.is_refused_or_harmless(copy.deepcopy(contents), ()) == ""
    assert check_header(case, ("combination",)) > 20
    check_tensors(case, "combination/")


def test_a_file_says_what_is_wrong_with_which_value(whole: Case, tmp_path: Path):
    """On disk, with a right digest."""
    header, tensors = copy.deepcopy(whole.contents)
    header["methods"]["bll"]["settings"]["radii"] = [2.5, -1]
    path = tmp_path / "a.uq.safetensors"
    write_tensor_file(path, KIND, SCHEMA, header, tensors)
    with pytest.raises(ArtefactError) as refused:
        UncertaintyModel.load(path)
    assert str(refused.value) == (
        f"{path} is not an uncertainty model that can be used: header.methods.bll.settings.radii is [2.5, -1], a list "
        "of numbers from 1e-60 to 1e+60 was expected. Another tool has changed it, or it comes from another "
        "installation: take it from a backup, or fit again."
    )


LAW = FarFieldCalibrator(-6.0, (0.1,), (0.5,), (9.0,), 0.0, (1e-3,)).settings
AFFINE = {"kind": "affine", "intercept": 0.1, "slope": 0.2, "column": 0, "boundary": ""}
TWO = FarFieldCalibrator(-6.0, (0.1,) * 2, (0.5,) * 2, (9.0,) * 2, 0.0, (1e-3,) * 2).settings


@pytest.mark.parametrize(
    ("path", "value", "part"),
    [
        (("primary",), "kernel", r"header.primary is 'kernel', one of 'combined' was expected"),
        (("methods", "bll", "settings", "reach"), math.nan, "settings.reach is nan, a number from 0 to 1e[+]60"),
        (("methods", "bll"), ABSENT, "combination.anchor is 'bll', one of 'mahalanobis'|made for|not one that"),
        (("methods",), {}, "header.methods is empty, at least one method was expected"),
        (("edges", "counts", "1"), ABSENT, "one number for each element that the tensor edges has an edge of"),
        (("edges", "counts", "iron"), 3, r"header.edges.counts has 'iron', atomic numbers were expected"),
        (("combination", "weights", "x"), 0.5, "combination.weights has 'x', but only mahalanobis, residual are known"),
        (("combination", "ensemble"), None, "ensemble is None, one beside a weight of residual, else null, was"),
        (("combination", "energy", "end"), 0, "combination.energy.end is 0, a number from 0.001 to 1 was expected"),
        (("combination", "energy", "weights"), {"bll": 1}, "energy.weights has 'bll', but only mahalanobis are known"),
        (("combination", "energy", "x"), 1, "combination.energy has 'x', but only end, floor, constant, weights, like"),
        (("combination", "energy", "likelihoods"), {}, "energy.likelihoods is {}, at least one number was expected"),
        (("methods", "bll", "calibrators", "energy"), AFFINE, "null, as energies of bll have no far_field calibrator,"),
        (("far_field",), None, "header has no far_field, but the calibrator of forces of bll needs one"),
        (("far_field", "length"), 0, "far_field.length is 0, a number from 1e-06 to 1000 was expected"),
        (("methods", "bll", "calibrators", "energies"), TWO, "energies is an object|a calibrator of 1 scores"),
        (("methods", "bll", "calibrators", "stress"), TWO, "stress is an object|a calibrator of 1 scores"),
        (("methods", "bll", "calibrators", "energy"), LAW, "energy is an object|a calibrator of 2 scores"),
        (("reference", "reduction", "kind"), "least", "a reduction is 'max', 'mean', 'top3' or a quantile"),
        (("provenance", "versions"), [], r"header.provenance.versions is \[\], an object was expected"),
    ],
)  # fmt: skip
def test_messages_name_the_entry_and_what_was_expected(whole: Case, path: Path_, value: Any, part: str):
    header, tensors = whole.contents
    with pytest.raises(ArtefactError, match=part):
        whole.model((changed(header, path, value), dict(tensors)))


@pytest.mark.parametrize(
    ("name", "tensor", "part"),
    [
        ("edges", torch.ones(3), r"tensor edges is torch.float32 of shape \(3,\), torch.float64 of shape \(119\)"),
        ("record/error", torch.ones(0), r"record/error is torch.float32 of shape \(0,\), torch.float32 of shape \("),
        ("far_field/shortest", -torch.ones(3, 3, dtype=torch.float64), "holds -1, values from 1e-06 to 1000 were"),
        ("head/bll/x", torch.ones(1), "the tensor head/bll/x is not one that the settings ask for"),
        ("reference/lengths", torch.tensor([5, 5]), "reference/lengths adds up to 10, not 15"),
    ],
)  # fmt: skip
def test_messages_name_the_tensor(whole: Case, name: str, tensor: Tensor, part: str):
    header, tensors = copy.deepcopy(whole.contents)
    with pytest.raises(ArtefactError, match=part):
        whole.model((header, {**tensors, name: tensor}))


class PluginHead(Head):
    """Of a plugin that says nothing of its files."""

    centre: Tensor

    def forward(self, forward_pass: ForwardPass) -> Raw:
        raise NotImplementedError


class FussyHead(PluginHead):
    """With a check of its own."""

    @classmethod
    def check(cls, settings: Entries, tensors: StoredTensors) -> Implied:
        settings.positive("width")
        return super().check(settings, tensors)

    def __init__(self, settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if settings["width"] == 7:
            raise RuntimeError("seven is too many")
        super().__init__(settings, tensors)


@pytest.mark.parametrize(
    ("head", "settings", "tensors", "part"),
    [
        (PluginHead, {}, {}, "there is no tensor head/theirs/centre"),
        (PluginHead, {}, {"centre": torch.tensor([math.nan])}, "head/theirs/centre holds values that are not finite"),
        (FussyHead, {"width": -1}, {"centre": torch.ones(1)}, "settings.width is -1, a number from 1e-300 to"),
        (FussyHead, {"width": 7}, {"centre": torch.ones(1)}, "method theirs cannot be made .*: seven is too many"),
    ],
)  # fmt: skip
def test_of_a_plugin_what_can_be_known(
    whole: Case,
    monkeypatch: pytest.MonkeyPatch,
    head: type[Head],
    settings: dict[str, Any],
    tensors: Mapping[str, Tensor],
    part: str,
):
    theirs = type("Theirs", (Method,), {"name": "theirs", "head": head, "start": None})
    monkeypatch.setitem(globals(), "_cached", lambda _: theirs)
    header, stored = copy.deepcopy(whole.contents)
    method = header["methods"]["bll"] | {"settings": settings}
    header |= {"methods": {"theirs": method}, "primary": "theirs", "combination": None}
    kept = {key: tensor for key, tensor in stored.items() if not key.startswith(("head/", "combination/"))}
    right = {"head/theirs/centre": torch.ones(1), "head/theirs/anything": torch.tensor(3)}
    fine = copy.deepcopy(header)
    fine["methods"]["theirs"]["settings"] = {"width": 3}
    loaded = whole.model((fine, {**kept, **right})).methods["theirs"].head
    assert isinstance(loaded, head)
    assert set(loaded.state_dict()) == {"centre", "anything"}
    with pytest.raises(ArtefactError, match=part):
        whole.model((header, {**kept, **{f"head/theirs/{name}": tensor for name, tensor in tensors.items()}}))
