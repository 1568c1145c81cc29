"""Whole trajectories: the numbers of the calculator, in a file that survives whatever happens on the way."""

import csv
import errno
import multiprocessing
import signal
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.io import read, write

from ase_uq import Predictor, UncertainCalculator, UncertaintyModel, embedded, fit
from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.errors import ArtefactError, InputError, UQWarning
from ase_uq.forward_pass import ForwardPass
from ase_uq.io.extxyz import extxyz_text
from ase_uq.io.frames import read_frames, write_frames
from ase_uq.io.results import annotated
from ase_uq.io.source import Source
from ase_uq.scoring import journal as journal_module
from ase_uq.scoring import score as trajectory_module
from ase_uq.scoring.frame_score import FrameScore
from ase_uq.scoring.score import ScoredTrajectory, score
from ase_uq.stream.limits import BatchLimit
from ase_uq.stream.passes import _Loop, complete
from ase_uq.stream.preparation import Prepared
from ase_uq.testing.methods import labelled_frames


def toy(direct: bool = False) -> UncertaintyModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UQWarning)  # made-up labels make the fit complain
        train, held_out = labelled_frames(30, seed=1), labelled_frames(30, seed=2)
        return fit(f"toy:{'direct' if direct else ''}", train, held_out, methods=["bll", "kernel"], progress=False)


@pytest.fixture(scope="module")
def uq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trajectory") / "toy.uq.safetensors"
    toy().save(path)
    return path


@pytest.fixture
def predictor(uq: Path) -> Predictor:
    return Predictor(load_backend("toy:"), UncertaintyModel.load(uq))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Twenty frames of changing size and composition, some periodic."""
    frames = [*labelled_frames(12, seed=3), Atoms("O", [(0.1, 0.2, 0.3)]), *labelled_frames(7, seed=4, cell=4.5)]
    write(tmp_path / "in.xyz", frames)
    return tmp_path / "in.xyz"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.xyz"


def assert_scored(out: Path, source: Path, uq: Path, left_out: Sequence[int] = ()) -> None:
    """Every frame that can be is there once, in order, with the calculator's numbers."""
    originals = read(source, ":")
    numbers = [n for n in range(len(originals)) if n not in left_out]
    found = read_frames(out)
    assert [atoms.info["source_frame"] for atoms in found] == numbers
    calculator = UncertainCalculator("toy:", uq)
    for atoms, number in zip(found, numbers, strict=True):
        calculator.calculate(originals[number])
        assert atoms.calc.results.keys() == calculator.results.keys()
        for key, value in calculator.results.items():
            np.testing.assert_allclose(atoms.calc.results[key], value, rtol=1e-7, atol=1e-8, err_msg=key)
        np.testing.assert_allclose(atoms.positions, originals[number].positions, atol=1e-8)


def test_every_frame_comes_back_with_the_calculators_numbers(source: Path, uq: Path, out: Path):
    scored = score(source, "toy:", uq, out=out, progress=False)
    assert_scored(out, source, uq)
    frames = read(source, ":")
    assert (scored.n_frames, scored.n_atoms) == (20, sum(map(len, frames)))
    assert (scored.n_left_out, scored.n_resumed) == (0, 0)
    assert sorted(path.name for path in out.parent.iterdir()) == ["in.xyz", "out.xyz"]


@pytest.mark.parametrize("batch_atoms", [1, 20, 10_000])
def test_the_size_of_the_batches_does_not_matter(source: Path, uq: Path, out: Path, batch_atoms: int):
    score(source, "toy:", uq, out=out, batch_atoms=batch_atoms, progress=False)
    assert_scored(out, source, uq)


def test_a_list_a_predictor_and_an_uncertain_calculator_will_do(
    source: Path, predictor: Predictor, uq: Path, out: Path
):
    frames = read(source, ":")
    before = [atoms.copy() for atoms in frames]
    score(frames, predictor, out=out, progress=False)
    assert_scored(out, source, uq)
    assert frames == before
    score(source, UncertainCalculator("toy:", uq), out=out, overwrite=True, progress=False)
    assert_scored(out, source, uq)


def test_the_csv_file_has_the_numbers_of_each_frame(source: Path, uq: Path, out: Path):
    table = out.with_name("numbers.csv")
    scored = score(source, "toy:", uq, out=out, csv=table, progress=False)
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    frames = read_frames(out)
    assert [int(row["frame"]) for row in rows] == list(range(20))
    largest = []
    for row, atoms in zip(rows, frames, strict=True):
        norms = np.linalg.norm(atoms.arrays["forces_uncertainty"], axis=1)
        largest.append(norms.max())
        assert int(row["n_atoms"]) == len(atoms)
        assert float(row["energy"]) == atoms.calc.results["energy"]
        assert float(row["energy_uncertainty"]) == atoms.info["energy_uncertainty"]
        assert float(row["force_uncertainty_max"]) == pytest.approx(norms.max(), abs=1e-7)
        assert float(row["force_uncertainty_mean"]) == pytest.approx(norms.mean(), abs=1e-7)
        assert norms[int(row["worst_atom"])] == pytest.approx(norms.max(), abs=1e-7)
        assert atoms.symbols[int(row["worst_atom"])] == row["worst_element"]
        assert float(row["gamma_max"]) == pytest.approx(atoms.arrays["gamma"].max(), abs=1e-7)
        assert row["problem"] == ""
    assert scored.worst.frame == int(np.argmax(largest))
    assert scored.n_beyond == sum(not atoms.arrays["gamma"].max() <= 1 for atoms in frames)
    assert f"eV/Å in frame {scored.worst.frame}, atom " in scored.summary()


def decorated() -> list[Atoms]:
    """Frames with whatever people keep in them."""
    plain, fixed, full = molecule("CH3OH"), molecule("H2O"), bulk("NaCl", "rocksalt", a=5.6, cubic=True)
    fixed.set_constraint(FixAtoms([0]))
    full.info |= {
        "text": "with space and ü",
        "list": [1, 2, 3],
        "matrix": np.eye(3),
        "nested": {"a": [1, {"b": None}]},
        "flag": True,
        "energy_uncertainty": 99.0,  # of an earlier calculation
        "none": None,
    }
    full.set_array("REF_forces", np.arange(24.0).reshape(8, 3))
    full.set_array("whole", np.arange(8))
    full.set_array("marks", np.arange(8) % 2 == 0)
    full.set_array("label", np.array([f"s{i}" for i in range(8)]))
    full.set_initial_charges(np.linspace(-1, 1, 8))
    full.set_momenta(np.ones((8, 3)))
    full.calc = SinglePointCalculator(full, energy=-3.0, forces=np.zeros((8, 3)))
    return [plain, fixed, full, Atoms("Ar")]


SYMBOLS = ("H", "C", "O", "Na", "Cl", "Ar")


@pytest.fixture(scope="module")
def worldly() -> Predictor:
    """Knows the elements of `decorated`."""
    train, held_out = ([_labelled_cluster(seed) for seed in range(first, first + 20)] for first in (0, 20))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UQWarning)
        model = fit(ToyCalculator(SYMBOLS), train, held_out, methods=["bll"], progress=False)
    return Predictor(load_backend(ToyCalculator(SYMBOLS)), model)


def _labelled_cluster(seed: int) -> Atoms:
    rng = np.random.default_rng(seed)
    atoms = Atoms(SYMBOLS, rng.uniform(0, 4, (len(SYMBOLS), 3)))
    calculator = ToyCalculator(SYMBOLS)
    calculator.calculate(atoms)
    atoms.info["REF_energy"] = calculator.results["energy"] + rng.normal()
    atoms.set_array("REF_forces", calculator.results["forces"] + rng.normal(size=(len(atoms), 3)))
    return atoms


@pytest.mark.parametrize("index", range(4))
def test_the_fast_writer_says_what_write_frames_says(tmp_path: Path, worldly: Predictor, index: int):
    atoms = decorated()[index]
    (prediction,) = worldly.predict([atoms])
    write_frames(tmp_path / "slow.xyz", [annotated(atoms, prediction.results, source_frame=3)])
    (tmp_path / "fast.xyz").write_text(extxyz_text(atoms, prediction.results, source_frame=3))
    slow, fast = (read_frames(tmp_path / name)[0] for name in ("slow.xyz", "fast.xyz"))
    assert fast == slow
    assert [str(c) for c in fast.constraints] == [str(c) for c in slow.constraints]
    for ours, theirs in ((fast.info, slow.info), (fast.arrays, slow.arrays), (fast.calc.results, slow.calc.results)):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            np.testing.assert_array_equal(value, theirs[key], err_msg=key)


# Where a run dies. Each is run in a process of its own, which kills itself as the kernel would: without a word.
KILLS = {
    "after some batches": "if calls > 6: die()",
    "between the rows and the frames of a batch": "if calls == 8: die()",
    "in the middle of a row": "if calls == 7: original(file, data[: len(data) // 2]); die()",
    "in the middle of a frame": "if calls == 8: original(file, data[: len(data) // 2]); die()",
    "before the last byte of a frame": "if calls == 8: original(file, data[:-1]); die()",
    "after the first byte of the first frame": "if calls == 3: original(file, data[:1]); die()",
}
SCRIPT = """
import os, signal, sys
from ase_uq.scoring import journal
from ase_uq.scoring.score import score

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

calls, original = 0, journal.write_all

def write(file, data):
    global calls
    calls += 1
    {kill}
    original(file, data)

journal.write_all = write
{more}
score({source!r}, "toy:", {uq!r}, out={out!r}, csv={csv!r}, batch_atoms=20, progress=False)
"""


def started(script: str) -> ForkServerProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ase_uq.backends.toy", "ase_uq.scoring.score"])
    process = context.Process(target=exec, args=(script, {}))
    process.start()
    return process


def killed(source: Path, uq: Path, out: Path, kill: str = "pass", more: str = "") -> None:
    table = out.with_suffix(".csv")
    script = SCRIPT.format(kill=kill, more=more, source=str(source), uq=str(uq), out=str(out), csv=str(table))
    process = started(script)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not table.exists()


@pytest.mark.parametrize("kill", KILLS.values(), ids=KILLS.keys())
def test_after_sigkill_no_frame_is_lost_or_doubled(source: Path, uq: Path, out: Path, kill: str):
    killed(source, uq, out, kill)
    assert not out.exists()
    table = out.with_suffix(".csv")
    scored = score(source, "toy:", uq, out=out, csv=table, batch_atoms=20, progress=False)
    assert_scored(out, source, uq)
    assert scored.n_frames == 20
    assert (scored.n_resumed > 0) == ("calls == 3" not in kill)
    assert [int(line.split(",")[0]) for line in table.read_text().splitlines()[1:]] == list(range(20))
    assert sorted(path.name for path in out.parent.iterdir()) == ["in.xyz", "out.csv", "out.xyz"]


@pytest.mark.parametrize(
    ("more", "appeared"),
    [
        ("journal.Journal.finish = die", False),
        ("real = os.replace; os.replace = lambda a, b: die() if str(b).endswith('.csv') else real(a, b)", True),
    ],
    ids=["before the files get their names", "between their names"],
)
def test_after_sigkill_at_the_end_nothing_is_scored_again(
    source: Path, uq: Path, out: Path, monkeypatch: pytest.MonkeyPatch, more: str, appeared: bool
):
    killed(source, uq, out, more=more)
    assert out.exists() == appeared
    monkeypatch.setattr(Predictor, "predictions", lambda *_, **__: pytest.fail("a frame was scored again"))
    scored = score(source, "toy:", uq, out=out, csv=out.with_suffix(".csv"), progress=False)
    monkeypatch.undo()
    assert_scored(out, source, uq)
    assert scored.n_frames == 20
    assert sorted(path.name for path in out.parent.iterdir()) == ["in.xyz", "out.csv", "out.xyz"]


@pytest.mark.parametrize(
    ("kill", "more"),
    [
        (KILLS["in the middle of a frame"], ""),
        ("pass", "from ase_uq.io import h5md_writer; h5md_writer._Writer.write = die"),
        ("pass", "real = os.replace; os.replace = lambda a, b: die() if str(b).endswith('.part') else real(a, b)"),
        ("pass", "real = os.replace; os.replace = lambda a, b: die() if str(b).endswith('.h5') else real(a, b)"),
    ],
    ids=["in the middle of a frame", "while the file is made", "before it takes the place", "before its name"],
)
def test_after_sigkill_a_file_of_hdf5_has_lost_nothing(source: Path, uq: Path, tmp_path: Path, kill: str, more: str):
    out, table = tmp_path / "out.h5", tmp_path / "out.csv"
    killed(source, uq, out, kill, more)
    assert not out.exists()
    scored = score(source, "toy:", uq, out=out, csv=table, batch_atoms=20, progress=False)
    assert_scored(out, source, uq)
    assert scored.n_frames == 20
    assert [int(line.split(",")[0]) for line in table.read_text().splitlines()[1:]] == list(range(20))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.xyz", "out.csv", "out.h5"]


def test_a_process_killed_from_outside_again_and_again_arrives(source: Path, uq: Path, out: Path):
    """At whatever instant: every frame takes a while, and the kills fall where they fall."""
    more = "import time\nfrom ase_uq import Predictor\nslow = Predictor.predictions\ndef predict(*a, **k):\n"
    more += "    time.sleep(0.05)\n    return slow(*a, **k)\nPredictor.predictions = predict\n"
    script = SCRIPT.format(kill="pass", more=more, source=str(source), uq=str(uq), out=str(out), csv=str(out) + ".csv")
    part = out.with_name("out.xyz.part")
    sizes = [0]
    for wait in (0.12, 0.31, 0.07):
        process = started(script)
        deadline = time.monotonic() + 60
        while not (part.exists() and part.stat().st_size > sizes[-1]) and process.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(wait)
        process.kill()
        process.join()
        if out.exists():
            break
        sizes.append(part.stat().st_size)
    assert len(sizes) > 1
    score(source, "toy:", uq, out=out, csv=str(out) + ".csv", overwrite=out.exists(), progress=False)
    assert_scored(out, source, uq)


def interrupted(source: Path, uq: Path, out: Path, monkeypatch: pytest.MonkeyPatch, after: int = 3) -> Path:
    """What is left of a run that was stopped after some batches."""
    real, calls = Predictor.predictions, []

    def predict(self: Predictor, *arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "predictions", predict)
        with pytest.raises(KeyboardInterrupt):
            score(source, "toy:", uq, out=out, batch_atoms=20, progress=False)
    return out.with_name("out.xyz.part")


def test_what_is_there_is_not_scored_again(source: Path, uq: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
    part = interrupted(source, uq, out, monkeypatch)
    before = part.read_text()
    done = before.count("source_frame=")
    assert 0 < done < 20
    numbers = []
    real = Predictor.predictions
    monkeypatch.setattr(
        Predictor, "predictions", lambda self, e, **k: numbers.extend(range(e.n_frames)) or real(self, e, **k)
    )
    scored = score(source, "toy:", uq, out=out, batch_atoms=20, progress=False)
    assert (scored.n_resumed, len(numbers)) == (done, 20 - done)
    assert out.read_text().startswith(before)
    assert f"{done} frames were scored by an interrupted run" in scored.summary()
    assert_scored(out, source, uq)


def test_another_trajectory_is_refused(source: Path, uq: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
    part = interrupted(source, uq, out, monkeypatch)
    before = part.read_bytes()
    write(source, read(source, ":")[::-1])
    with pytest.raises(ArtefactError, match=r"out\.xyz\.part was begun with another trajectory \("):
        score(source, "toy:", uq, out=out, progress=False)
    assert part.read_bytes() == before


def test_another_uncertainty_model_is_refused(
    source: Path, uq: Path, out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    interrupted(source, uq, out, monkeypatch)
    other = UncertaintyModel.load(uq)
    other.edges.edges.mul_(1.001)
    with pytest.raises(ArtefactError, match="was begun with another uncertainty model"):
        score(source, "toy:", other, out=out, progress=False)


def test_another_potential_or_precision_is_refused(source: Path, uq: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
    part = interrupted(source, uq, out, monkeypatch)
    with pytest.raises(ArtefactError, match="was begun with another potential"):
        score(source, "toy:direct", toy(direct=True), out=out, progress=False)
    with pytest.raises(ArtefactError, match=r"was begun with another precision \(float64, now float32\)"):
        score(source, ToyCalculator(dtype="float32"), uq, out=out, progress=False)
    assert part.exists()


def test_the_same_model_from_memory_goes_on(source: Path, uq: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
    interrupted(source, uq, out, monkeypatch)
    score(source, UncertainCalculator("toy:", UncertaintyModel.load(uq)), out=out, progress=False)
    assert_scored(out, source, uq)


def test_a_full_disk_is_told_and_gone_on_from(source: Path, uq: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
    real, calls = journal_module.write_all, []

    def full(file, data: bytes) -> None:
        calls.append(1)
        if len(calls) == 6:
            real(file, data[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(journal_module, "write_all", full)
        with pytest.raises(ArtefactError, match=r"No space left on device\. What was scored before is kept in "):
            score(source, "toy:", uq, out=out, batch_atoms=20, progress=False)
    assert not out.exists()
    assert score(source, "toy:", uq, out=out, progress=False).n_resumed > 0
    assert_scored(out, source, uq)


@pytest.fixture
def small_device(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Makes evaluations of more atoms than it is told run out of memory; returns the sizes of all that are tried."""

    def make(most: int) -> list[int]:
        real, tried = predictor.predictions, []

        def predictions(forward_pass: ForwardPass, **options: object) -> object:
            tried.append(len(forward_pass.numbers))
            if tried[-1] > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            return real(forward_pass, **options)

        monkeypatch.setattr(predictor, "predictions", predictions)
        return tried

    return make


def test_batches_that_do_not_fit_are_halved_and_it_goes_on(
    source: Path, predictor: Predictor, uq: Path, out: Path, small_device: Callable[[int], list[int]]
):
    tried = small_device(20)
    scored = score(source, predictor, out=out, batch_atoms=200, progress=False)
    assert scored.n_frames == 20
    assert max(tried) > 20
    assert_scored(out, source, uq)


def test_later_batches_are_of_the_size_that_fits(
    predictor: Predictor, out: Path, small_device: Callable[[int], list[int]]
):
    frames = labelled_frames(4, seed=5) * 50
    size = len(frames[0])
    tried = small_device(4 * size)
    assert score(frames, predictor, out=out, batch_atoms=16 * size, progress=False).n_frames == 200
    refused = [number for number, atoms in enumerate(tried) if atoms > 4 * size]
    assert len(refused) <= 8  # two batches are made ahead, the rest are tries to grow back
    assert [atoms.info["source_frame"] for atoms in read(out, ":")] == list(range(200))


def test_batches_made_before_the_device_was_full_cost_one_failure(
    predictor: Predictor, small_device: Callable[[int], list[int]]
):
    """Worker processes are many batches ahead; each is split, and none of them makes the limit smaller again."""
    frames = labelled_frames(4, seed=5) * 4
    n_atoms = sum(map(len, frames))
    tried = small_device(n_atoms // 2 + 1)
    limit = BatchLimit(n_atoms, 10**9)
    stale = [Prepared(list(range(16 * k, 16 * k + 16)), list(frames), n_atoms=n_atoms) for k in range(6)]
    loop = _Loop(predictor.backend, predictor.predictions, forces=True, gradients=False, limit=limit)
    found = [number for batch in stale for part in complete(loop.evaluated(batch)) for number in part.numbers]
    assert found == list(range(96))
    assert sum(size > n_atoms // 2 + 1 for size in tried) == 1
    assert limit.n_atoms == n_atoms / 2


def test_batches_in_threads_of_their_own_change_no_bit(tmp_path: Path):
    """With an embedded MACE and all its methods; each thread has one of torch's two threads."""
    predictor = Predictor("embedded:mace", embedded.path("mace.uq.safetensors"))
    before, texts = torch.get_num_threads(), []
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        try:
            out = tmp_path / f"{n_threads}.xyz"
            source = f"{embedded.path('test_300K.xyz')}@:8"
            score(source, predictor, out=out, batch_atoms=20, progress=False)
        finally:
            torch.set_num_threads(before)
        texts.append(out.read_text())
    assert texts[0] == texts[1]


def test_worker_processes_change_nothing(predictor: Predictor, out: Path):
    frames = labelled_frames(4, seed=5) * 100
    write(out.with_name("in.xyz"), frames)
    for workers in (0, 1):
        name = out.with_name(f"{workers}.xyz")
        score(out.with_name("in.xyz"), predictor, out=name, workers=workers, batch_atoms=20, progress=False)
    assert out.with_name("1.xyz").read_bytes() == out.with_name("0.xyz").read_bytes()
    with pytest.raises(ValueError, match="workers is -1; 0 or more was expected"):
        score(frames, predictor, out=out, workers=-1)


@pytest.mark.parametrize(
    ("device", "collates", "n_frames", "n_cores", "expected"),
    [
        ("cuda", True, 5000, 16, 8),
        ("cuda", True, 5000, 4, 2),
        ("cuda", True, 5000, 1, 1),
        ("cuda", True, 100, 16, 0),
        ("cuda", False, 5000, 16, 0),
        ("cpu", True, 5000, 16, 0),
    ],
)
def test_processes_are_started_where_they_pay(
    monkeypatch: pytest.MonkeyPatch, device: str, collates: bool, n_frames: int, n_cores: int, expected: int
):
    fake = SimpleNamespace(device=torch.device(device), collator=object() if collates else None)
    monkeypatch.setattr(trajectory_module, "cpu_count", lambda: n_cores)
    assert trajectory_module._n_workers(cast(Backend, fake), Source([Atoms("H")] * n_frames)) == expected


def test_a_frame_too_large_for_the_device_is_named(
    source: Path, predictor: Predictor, uq: Path, out: Path, small_device: Callable[[int], list[int]]
):
    frames = [*read(source, ":3"), bulk("C", "diamond", a=3.6, cubic=True).repeat(2), *read(source, "3:")]
    small_device(40)
    with pytest.raises(InputError, match=r"frame 3 with its 64 atoms alone does not fit into the memory of cpu"):
        score(frames, predictor, out=out, batch_atoms=20, progress=False)
    assert 0 < out.with_name("out.xyz.part").read_text().count("source_frame=") <= 3


def test_edges_limit_a_batch_too(predictor: Predictor, out: Path, monkeypatch: pytest.MonkeyPatch):
    """A dense crystal has more edges for each atom than sixty, so fewer atoms stand in a batch."""
    dense = bulk("C", "diamond", a=1.6, cubic=True)
    sizes = []
    real = predictor.predictions
    monkeypatch.setattr(predictor, "predictions", lambda e, **k: sizes.append(e.n_frames) or real(e, **k))
    score([dense] * 12, predictor, out=out, batch_atoms=8 * 12, progress=False)
    assert max(sizes) < 12


def test_damaged_frames_are_named_and_left_out(source: Path, uq: Path, out: Path):
    lines = source.read_text().splitlines(keepends=True)
    second = 2 + int(lines[0])
    damaged = out.with_name("damaged.xyz")
    damaged.write_text("".join(lines[: second + 4] + lines[second + 2 + int(lines[second]) :]))
    table = out.with_suffix(".csv")
    with pytest.warns(UQWarning, match="frame 1 was left out: it is truncated: 2 of its"):
        scored = score(damaged, "toy:", uq, out=out, csv=table, progress=False)
    assert_scored(out, source, uq, left_out=[1])
    assert (scored.n_frames, scored.n_left_out) == (19, 1)
    assert "; 1 frame was left out" in scored.summary()
    rows = table.read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == list(range(20))
    assert rows[1].split(",")[-1].startswith("it is truncated")


def ours(caught: pytest.WarningsRecorder) -> list[str]:
    """Of frames left out; ASE on a new numpy has warnings of its own."""
    return [str(w.message) for w in caught if w.category is UQWarning and "left out" in str(w.message)]


def test_frames_that_the_potential_refuses_are_named_and_left_out(source: Path, uq: Path, out: Path):
    frames = read(source, ":")
    frames[4].positions[1, 2] = np.nan
    frames[5].numbers[0] = 79
    frames[19].numbers[:] = 79
    write(source, frames)
    with pytest.warns(UQWarning) as caught:
        scored = score(source, "toy:", uq, out=out, progress=False)
    messages = ours(caught)
    assert len(messages) == 3
    assert messages[0].startswith("frame 4 was left out: positions of structure 4 (")
    assert messages[1].startswith("frame 5 was left out: structure 5 (")
    assert "contains Au, which the potential does not know" in messages[2]
    assert scored.n_left_out == 3
    assert_scored(out, source, uq, left_out=[4, 5, 19])


def test_cells_without_extent_are_named_and_left_out(source: Path, uq: Path, out: Path):
    flat = bulk("C", cubic=True)
    flat.cell[2] = flat.cell[0]
    tiny = bulk("C", cubic=True)
    tiny.set_cell(tiny.cell * 1e-4)
    frames = [*read(source, ":3"), flat, tiny, *read(source, "3:")]
    with pytest.warns(
        UQWarning, match=r"frame [34] was left out: structure [34] \(C8\) is periodic in a cell without ex"
    ):
        scored = score(frames, "toy:", uq, out=out, batch_atoms=50, progress=False)
    assert (scored.n_frames, scored.n_left_out) == (20, 2)
    assert [atoms.info["source_frame"] for atoms in read(out, ":")] == [0, 1, 2, *range(5, 22)]


def test_entries_that_cannot_be_written_are_named_once_and_left_out(source: Path, uq: Path, out: Path):
    frames = read(source, ":")
    for atoms in frames[5:]:
        atoms.arrays["tensor"] = np.zeros((len(atoms), 3, 3))
        atoms.info["note"] = "two\nlines"
    with pytest.warns(UQWarning) as caught:
        scored = score(frames, "toy:", uq, out=out, batch_atoms=20, progress=False)
    assert [str(one.message) for one in caught if one.category is UQWarning] == [
        "arrays['tensor'], info['note'] cannot be kept in extended XYZ and are left out."
    ]
    assert scored.n_frames == len(read_frames(out)) == 20


def test_a_text_that_speaks_of_another_frame_does_not_confuse_a_resumed_run(source: Path, uq: Path, out: Path):
    frames = read(source, ":")
    for atoms in frames:
        atoms.info["note"] = "made of source_frame=2 of a run"
        atoms.info["source_frame"] = 77  # of an earlier scoring
    write(source, frames)
    killed(source, uq, out, KILLS["in the middle of a frame"])
    scored = score(source, "toy:", uq, out=out, csv=out.with_suffix(".csv"), batch_atoms=20, progress=False)
    assert scored.n_resumed > 0
    assert [atoms.info["source_frame"] for atoms in read(out, ":")] == list(range(20))


def test_not_a_number_is_the_worst(out: Path):
    scored = ScoredTrajectory(out)
    for frame, worst in enumerate([0.2, np.nan, 0.3, np.nan]):
        scored.add(FrameScore(frame, 1, force_uncertainty_max=worst))
    assert scored.worst is not None
    assert scored.worst.frame == 1


@pytest.mark.parametrize(
    ("out_name", "csv_name", "message"),
    [
        ("in.xyz", None, "in.xyz is the input: it would be overwritten"),
        ("out.xyz", "in.xyz", "in.xyz is the input: it would be overwritten"),
        ("out.xyz", "out.xyz", "out.xyz is given for two outputs: it would be overwritten"),
        ("link.xyz", None, "link.xyz is the input: it would be overwritten"),
    ],
)
def test_outputs_do_not_overwrite_what_is_read_or_each_other(
    source: Path, predictor: Predictor, out_name: str, csv_name: str | None, message: str
):
    before = source.read_bytes()
    source.with_name("link.xyz").hardlink_to(source)
    csv_file = None if csv_name is None else source.with_name(csv_name)
    with pytest.raises(ValueError, match=message):
        score(source, predictor, out=source.with_name(out_name), csv=csv_file, overwrite=True, progress=False)
    assert source.read_bytes() == before


def test_many_frames_left_out_are_not_a_flood_of_warnings(source: Path, uq: Path, out: Path):
    frames = [*labelled_frames(2, seed=3), *[Atoms("Au")] * 30]
    with pytest.warns(UQWarning) as caught:
        assert score(frames, "toy:", uq, out=out, progress=False).n_left_out == 30
    messages = ours(caught)
    assert len(messages) == 11
    assert messages[-1] == "further frames that are left out are not named."


def test_left_out_frames_are_counted_once_over_interruptions(
    source: Path, uq: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    frames = read(source, ":")
    frames[0].numbers[0] = frames[18].numbers[0] = 79
    write(source, frames)
    with pytest.warns(UQWarning, match="frame 0 was left out"):
        interrupted(source, uq, out, monkeypatch, after=4)
    with pytest.warns(UQWarning, match="frame 18 was left out") as caught:
        scored = score(source, "toy:", uq, out=out, batch_atoms=20, progress=False)
    assert len(ours(caught)) == 1
    assert (scored.n_left_out, scored.n_frames) == (2, 18)
    assert_scored(out, source, uq, left_out=[0, 18])


def test_an_element_that_was_not_fitted_has_gamma_inf(uq: Path, out: Path):
    frames = labelled_frames(3, seed=3)
    frames[1].symbols[0] = "Si"
    with pytest.warns(UQWarning, match="fitted without Si: gamma is inf"):
        scored = score(frames, "toy:", uq, out=out, progress=False)
    assert np.isinf(read_frames(out)[1].calc.results["gamma"][0])
    assert scored.n_beyond >= 1


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "the list has no frames"),
        ([Atoms("Au"), Atoms("Au2")], r"none of the 2 frames of the list could be scored\. Frame 0: .* contains Au"),
        ("no.xyz", r"there is no file no\.xyz"),
    ],
)
@pytest.mark.filterwarnings("ignore:frame . was left out:ase_uq.errors.UQWarning")
def test_nothing_to_score(uq: Path, out: Path, frames: list[Atoms] | str, message: str):
    with pytest.raises(InputError, match=message):
        score(frames, "toy:", uq, out=out, progress=False)
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (["toy:"], {}, TypeError, "toy: is a bare potential: give the uncertainty_model"),
        ([None, "again"], {}, TypeError, "already has an uncertainty model, and another was given"),
        ([None], {"batch_atoms": 0}, ValueError, "batch_atoms is 0; 1 or more was expected"),
        ([None], {"out": "no/such/folder/out.xyz"}, ArtefactError, "cannot write no/such/folder/out.xyz"),
    ],
)
def test_bad_arguments(predictor: Predictor, out: Path, arguments: list, options: dict, error: type, message: str):
    given = [predictor if argument is None else argument for argument in arguments]
    with pytest.raises(error, match=message):
        score(labelled_frames(1, seed=1), *given, **({"out": out, "progress": False} | options))


class Watched(Sequence[Atoms]):
    """Frames made when they are asked for; knows how many are alive."""

    def __init__(self, n_frames: int) -> None:
        self.n_frames, self.most, self.alive = n_frames, 0, weakref.WeakSet()
        self.template = labelled_frames(1, seed=1)[0]

    def __len__(self) -> int:
        return self.n_frames

    def __getitem__(self, number: int) -> Atoms:
        if number >= self.n_frames:
            raise IndexError(number)
        atoms = _Tracked(self.template)
        atoms.positions[0, 0] += 1e-3 * np.sin(number)
        self.alive.add(atoms)
        self.most = max(self.most, len(self.alive))
        return atoms


class _Tracked(Atoms):
    __hash__ = object.__hash__  # for the weak set


def test_no_more_frames_are_alive_in_a_longer_trajectory(predictor: Predictor, out: Path):
    alive = []
    for n_frames in (60, 240):
        watched = Watched(n_frames)
        score(watched, predictor, out=out, batch_atoms=5 * len(watched.template), overwrite=True, progress=False)
        alive.append(watched.most)
    assert len(read(out, ":")) == 240
    # Read ahead, on the device, behind it, and the first of the next: batches of five.
    assert max(alive) <= 25


def test_the_bar_knows_the_length_and_where_it_began(
    source: Path,
    uq: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    terminal: None,
    capsys: pytest.CaptureFixture[str],
):
    part = interrupted(source, uq, out, monkeypatch)
    done = part.read_text().count("source_frame=")
    score(source, "toy:", uq, out=out)
    shown = capsys.readouterr().err
    assert f"| {done}/20 [" in shown
    assert "| 20/20 [" in shown
    assert "largest " in shown
    score(source, "toy:", uq, out=out, overwrite=True, progress=False)
    assert capsys.readouterr().err == ""
