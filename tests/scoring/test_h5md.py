"""Scored frames in HDF5: the numbers of extended XYZ before they are rounded, after any kill, and of any shards."""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.constraints import FixAtoms
from ase.io import write

from ase_uq import Predictor, UncertaintyModel, fit, load_backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.diagnostics.evaluate import evaluate_scored
from ase_uq.errors import ArtefactError, InputError, MissingDependency, UQWarning
from ase_uq.io import h5md_writer
from ase_uq.io.frames import read_frames
from ase_uq.scoring import frame_file
from ase_uq.scoring.journal import Journal
from ase_uq.scoring.score import score
from ase_uq.scoring.shards import merge_shards
from ase_uq.selection.scored import select_scored
from ase_uq.testing.methods import ELEMENTS, labelled_frames

BATCH = 30
pytestmark = pytest.mark.filterwarnings("ignore::ase_uq.errors.UQWarning")


@pytest.fixture(scope="module")
def model() -> UncertaintyModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UQWarning)
        frames = labelled_frames(20, seed=1), labelled_frames(20, seed=2)
        return fit(ToyCalculator(ELEMENTS), *frames, methods=["bll", "kernel"], progress=False)


@pytest.fixture(scope="module")
def predictor(model: UncertaintyModel) -> Predictor:
    return Predictor(load_backend(ToyCalculator(ELEMENTS)), model)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frames of several sizes, one that is left out, and with what people keep in them."""
    frames = labelled_frames(24, seed=5)
    frames[7].positions[0] = np.nan
    frames[3].info |= {"note": "two words", "vector": np.array([0.1, 1 / 3]), "n": 3, "flag": True}
    frames[4].set_array("tags", np.arange(len(frames[4])))
    frames[5].set_constraint(FixAtoms([0]))
    path = tmp_path_factory.mktemp("source") / "run.xyz"
    write(path, frames)
    return path


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def scored(source: Path, predictor: Predictor) -> Callable[..., Path]:
    def run(out: str, **options: Any) -> Path:
        score(source, predictor, out=out, batch_atoms=BATCH, progress=False, **options)
        return Path(out)

    return run


def as_text(values: Any) -> Any:
    """Numbers of atoms as extended XYZ has them: with eight digits."""
    array = np.asarray(values)
    return np.vectorize(lambda value: float(f"{value:.8f}"))(array) if array.dtype.kind == "f" else array


@pytest.mark.parametrize("ending", ["h5", "h5md"])
def test_frames_are_those_of_extended_xyz_before_they_are_rounded(scored, ending):
    text, ours = read_frames(scored("out.xyz")), read_frames(scored(f"out.{ending}"))
    assert len(ours) == len(text) == 23
    for found, wanted in zip(ours, text, strict=True):
        np.testing.assert_array_equal(as_text(found.positions), wanted.positions)
        assert list(found.symbols) == list(wanted.symbols)
        assert [str(c) for c in found.constraints] == [str(c) for c in wanted.constraints]
        assert found.info.keys() == wanted.info.keys()
        for key, value in wanted.info.items():
            np.testing.assert_array_equal(found.info[key], value, err_msg=key)
        assert found.arrays.keys() == wanted.arrays.keys()
        for key, values in wanted.arrays.items():
            np.testing.assert_array_equal(as_text(found.arrays[key]), values, err_msg=key)
        assert found.calc.results.keys() == wanted.calc.results.keys()
        for key, value in wanted.calc.results.items():
            same = found.calc.results[key]
            np.testing.assert_array_equal(as_text(same) if np.ndim(value) and key != "stress" else same, value)


def test_results_are_the_predictors_to_the_last_bit(scored, source, predictor):
    frames = [atoms for atoms in read_frames(source) if np.isfinite(atoms.positions).all()]
    found = read_frames(scored("out.h5"))
    (alone,) = predictor.predict([frames[0]])
    assert found[0].calc.results.keys() == alone.results.keys()
    score(frames, predictor, out="again.h5", batch_atoms=1, progress=False)
    for atoms, original in zip(read_frames("again.h5"), frames, strict=True):
        (prediction,) = predictor.predict([original])
        np.testing.assert_array_equal(atoms.positions, original.positions)
        for key, value in prediction.results.items():
            np.testing.assert_array_equal(atoms.calc.results[key], value, err_msg=key)


def test_what_reads_scored_frames_reads_these(scored, model):
    """With the verdicts of the text, whose forces have eight digits."""
    text, ours = scored("out.xyz"), scored("out.h5")
    tables = [evaluate_scored(path, model, n_bootstrap=2, progress=False).table() for path in (text, ours)]
    assert tables[0] == tables[1]
    chosen = [select_scored(path, 3, model, progress=False) for path in (text, ours)]
    assert list(chosen[0].indices) == list(chosen[1].indices)


def test_what_cannot_be_kept_is_named_once(predictor):
    frames = [Atoms("H2O", molecule("H2O").positions, info={"bad": object()}) for _ in range(3)]
    with pytest.warns(UQWarning, match=r"info\['bad'\] cannot be kept in HDF5 and is left out") as caught:
        score(frames, predictor, out="out.h5", progress=False, batch_atoms=3)
    assert sum("cannot be kept" in str(one.message) for one in caught) == 1
    assert len(read_frames("out.h5")) == 3


class Killed(BaseException):
    """In place of SIGKILL, at an instant that is chosen."""


def killed(
    scored: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, target: str, when: Callable[..., bool]
) -> None:
    """A run that dies when `target` is called with arguments of which `when` says so."""
    owner, _, name = target.rpartition(".")
    module = {"os": os, "writer": h5md_writer._Writer, "journal": Journal}[owner]
    real = getattr(module, name)

    def dying(*arguments: Any, **options: Any) -> Any:
        if when(*arguments):
            raise Killed
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, dying)
        with pytest.raises(Killed):
            scored("out.h5", csv="out.csv")


@pytest.mark.parametrize(
    ("target", "when"),
    [
        ("writer.write", lambda *_: True),
        ("os.replace", lambda _, to: str(to).endswith("out.h5.part")),
        ("os.replace", lambda _, to: str(to).endswith("out.h5")),
        ("os.replace", lambda _, to: str(to).endswith("out.csv")),
        ("journal.finish", lambda *_: True),
    ],
    ids=["while it is made", "before it takes the place", "before its name", "before the table's", "before all that"],
)
def test_a_run_that_died_at_its_end_is_finished_without_a_frame_scored_again(scored, monkeypatch, target, when):
    whole = scored("whole.h5", csv="whole.csv").read_bytes()
    killed(scored, monkeypatch, target, when)
    with monkeypatch.context() as patch:
        frames = []
        real = Predictor.predictions
        patch.setattr(Predictor, "predictions", lambda *a, **k: frames.append(a) or real(*a, **k))
        scored("out.h5", csv="out.csv")
    assert not frames
    assert Path("out.h5").read_bytes() == whole
    assert Path("out.csv").read_bytes() == Path("whole.csv").read_bytes()
    assert sorted(path.name for path in Path().glob("out*")) == ["out.csv", "out.h5"]


def test_a_finished_file_without_its_name_does_not_replace_another(scored, monkeypatch):
    killed(scored, monkeypatch, "os.replace", lambda _, to: str(to).endswith("out.h5"))
    Path("out.h5").write_text("precious")
    with pytest.raises(FileExistsError, match=r"out.h5 exists. Give another name"):
        scored("out.h5", csv="out.csv")
    assert Path("out.h5").read_text() == "precious"
    scored("out.h5", csv="out.csv", overwrite=True)
    assert len(read_frames("out.h5")) == 23


@pytest.mark.parametrize("share", [0.03, 0.4, 0.77, 0.999])
def test_cut_anywhere_it_goes_on(scored, monkeypatch, share):
    """Batches may be others then, and the last bits of sums."""
    whole = read_frames(scored("whole.h5"))
    killed(scored, monkeypatch, "journal.finish", lambda *_: True)
    part = Path("out.h5.part")
    os.truncate(part, int(share * part.stat().st_size))
    with open(part, "ab") as file:
        file.write(bytes(50))  # what a power cut leaves
    scored("out.h5", csv="out.csv")
    for atoms, wanted in zip(read_frames("out.h5"), whole, strict=True):
        assert atoms.info["source_frame"] == wanted.info["source_frame"]
        for key, value in wanted.calc.results.items():
            np.testing.assert_allclose(atoms.calc.results[key], value, rtol=1e-9, atol=1e-12, err_msg=key)
    assert [int(line.split(",")[0]) for line in Path("out.csv").read_text().splitlines()[1:]] == list(range(24))


def test_a_full_disk_at_the_end_loses_nothing(scored, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    whole = scored("whole.h5").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(frame_file, "write_h5md", full)
        with pytest.raises(
            ArtefactError, match=r"cannot write out.h5: No space left on device. What was scored before"
        ):
            scored("out.h5")
    assert sorted(path.name for path in Path().glob("out*")) == [
        f"out.h5.part{kind}" for kind in ("", ".csv", ".json", ".sums")
    ]
    assert scored("out.h5").read_bytes() == whole


class TestShards:
    @pytest.fixture
    def shards(self, scored) -> Callable[[int], list[Path]]:
        return lambda count: [scored(f"part_{i}.h5", shard=f"{i}/{count}") for i in range(1, count + 1)]

    @pytest.mark.parametrize("count", [1, 3, 30])
    def test_merged_they_are_the_run_without_shards_byte_for_byte(self, scored, shards, count):
        whole = scored("whole.h5", csv="whole.csv")
        merged = merge_shards(shards(count)[::-1], out="merged.h5", csv="merged.csv", progress=False)
        assert Path("merged.h5").read_bytes() == whole.read_bytes()
        assert Path("merged.csv").read_bytes() == Path("whole.csv").read_bytes()
        assert (merged.n_frames, merged.n_left_out) == (23, 1)
        assert sorted(path.name for path in Path().glob("merged*")) == ["merged.csv", "merged.h5"]

    def test_of_other_formats_are_refused(self, scored, shards):
        one, two = shards(2)
        with pytest.raises(
            InputError,
            match=r"part_1.h5 is in HDF5, and extended XYZ is to be written. All shards must be in one format; give "
            "the output their ending",
        ):
            merge_shards([one, two], out="merged.xyz")
        text = scored("part_2.xyz", shard="2/2")
        with pytest.raises(InputError, match=r"part_2.xyz is in extended XYZ, and HDF5 is to be written"):
            merge_shards([one, text], out="merged.h5")

    @pytest.mark.parametrize("damage", ["cut", "altered", "row", "fewer"])
    def test_that_are_damaged_are_refused(self, shards, damage):
        one, two = shards(2)
        data = bytearray(two.read_bytes())
        if damage == "cut":
            two.write_bytes(data[: len(data) // 2])
        elif damage == "altered":
            data[len(data) // 2] ^= 1
            two.write_bytes(data)
        elif damage == "row":
            table = Path(f"{two}.shard.csv")
            table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))
        else:  # a whole file with the sums of a shard that has more
            shutil.copy(one, two)
            told = Path(f"{two}.shard.json")
            sums = json.loads(Path(f"{one}.shard.json").read_text())
            told.write_text(json.dumps(json.loads(told.read_text()) | {"sum_of_frames": sums["sum_of_frames"]}))
        with pytest.raises(InputError, match=r"part_2.h5.*(as it was written|altered).* score part_2.h5 again with"):
            merge_shards([one, two], out="merged.h5", progress=False)
        assert not list(Path().glob("merged*"))


@pytest.mark.parametrize("name", ["out.traj", "out.db", "out.xyz.gz", "out.h5.gz"])
def test_other_names_are_refused(source, predictor, name):
    message = r"give a name that ends in .xyz or .extxyz, or in .h5 or .h5md for HDF5 \(H5MD\)"
    with pytest.raises(
        ValueError, match=rf"{name} would be written as extended XYZ, but its name is that of .*: {message}"
    ):
        score(source, predictor, out=name, progress=False)
    with pytest.raises(ValueError, match=message):
        merge_shards([], out=name)


def test_without_h5py_nothing_begins(source, predictor, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(MissingDependency, match=r'Run: pip install "ase-uq\[hdf5\]"'):
        score(source, predictor, out="out.h5", progress=False)
    assert not list(Path().iterdir())


def test_h5py_alone_reads_it(scored):
    """As the documentation says."""
    frames = read_frames(scored("out.h5"))
    with h5py.File("out.h5") as file:
        forces = file["particles/atoms/forces_uncertainty/value"]
        for number, n_atoms in enumerate(file["parameters/ase_uq/n_atoms"]):
            np.testing.assert_array_equal(forces[number, :n_atoms], frames[number].arrays["forces_uncertainty"])
        energies = file["observables/atoms/energy_uncertainty/value"][:]
    assert list(energies) == [atoms.info["energy_uncertainty"] for atoms in frames]
