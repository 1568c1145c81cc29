import importlib.util

import numpy as np
import pytest

from ase_uq import Quantile, demo, embedded, read_frames
from ase_uq.demo import run_demo
from ase_uq.errors import MissingDependency


@pytest.fixture(scope="module")
def told():
    return []


@pytest.fixture(scope="module")
def result(tmp_path_factory, told):
    with pytest.MonkeyPatch.context() as patch:
        # A lower flag, and so a lower halt, is reached sooner.
        patch.setattr(demo, "FLAG", Quantile(0.5))
        patch.setattr(demo, "_MOST_LABELS", 20)
        folder = tmp_path_factory.mktemp("demo") / "new"
        return run_demo(folder, cold_steps=40, heating_steps=300, tell=told.append, progress=False)


def test_the_run_flags_and_halts_itself(result):
    run = result.run
    assert run.halt == pytest.approx(demo.HALT_BY_FLAG * run.flag)
    assert run.readings[-1] >= run.halt
    assert (run.readings[:-1] < run.halt).all()
    assert run.halted.startswith(f"it halted itself at {run.time[-1]:.1f} fs")
    assert len(read_frames(result.flagged)) == (run.readings >= run.flag).sum()
    assert (run.temperature[:41] == 300).all()
    assert run.temperature[-1] > 300


def test_errors_are_those_of_the_reference(result):
    labelled = {
        atoms.info.get("flag_time_fs", atoms.info.get("time_fs")): atoms for atoms in read_frames(result.labelled)
    }
    assert len(labelled) == len(result.comparisons)
    for row in result.comparisons:
        atoms = labelled[row.time]
        errors = np.linalg.norm(atoms.arrays["REF_forces"] - atoms.get_forces(), axis=1)
        assert row.largest_error == pytest.approx(errors.max(), abs=1e-6)
        assert row.rms_error == pytest.approx(np.sqrt(np.mean(errors**2)), abs=1e-6)
        assert row.predicted == pytest.approx(
            np.linalg.norm(atoms.calc.results["forces_uncertainty"], axis=1).max(), abs=1e-6
        )
        assert row.is_flagged == (row.predicted >= result.run.flag)
        assert not row.proton_moved or atoms.get_distance(5, 4) < atoms.get_distance(5, 0)


def test_errors_are_where_the_uncertainty_is(result):
    rows = sorted(result.comparisons, key=lambda row: row.predicted)
    small, large = (np.median([row.largest_error for row in part]) for part in (rows[:5], rows[-5:]))
    assert large > 2 * small


def test_what_is_told_and_drawn(result, told):
    text = "\n".join(told)
    assert result.run.halted in text
    assert "largest error" in text
    assert "at home" in text
    assert str(result.figure) in text
    assert result.figure.read_bytes().startswith(b"\x89PNG")


def test_the_embedded_start_has_its_proton_at_home():
    (atoms,) = read_frames(embedded.path("malonaldehyde.xyz"))
    assert atoms.symbols[demo.PROTON] == "H"
    assert atoms.get_distance(demo.PROTON, demo.DONOR) < 1.2 < atoms.get_distance(demo.PROTON, demo.ACCEPTOR)


@pytest.mark.parametrize("package", ["tblite", "matplotlib"])
def test_what_is_missing_is_told_before_the_run(package, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(MissingDependency, match=rf'{package}.*pip install "ase-uq\[all\]"'):
        run_demo(tmp_path)
