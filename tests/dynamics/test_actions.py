"""Each action on events made by hand."""

import io
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from ase.build import molecule
from ase.mep import NEB
from ase.mep.neb import NEBOptimizer
from ase.optimize import BFGS
from ase.optimize.basin import BasinHopping
from ase.optimize.sciopt import Converged, OptimizerConvergenceError, SciPyFminCG

from ase_uq.dynamics import Call, Event, Flag, Halt, Log
from ase_uq.dynamics.policy import as_actions
from ase_uq.errors import UncertaintyHalt
from ase_uq.io.frames import read_frames
from ase_uq.io.results import annotated

REASON = 'force uncertainty (max) 0.7 eV/A reached flag at 0.5 eV/A by Threshold(value=0.5); worst atom 1 (H, "0.7")'


def frame():
    atoms = molecule("H2O")
    results = {
        "energy": -1.5,
        "forces": np.arange(9.0).reshape(3, 3),
        "forces_uncertainty": np.full((3, 3), 0.4),
        "forces_uncertainty_bll": np.full((3, 3), 0.3),
        "gamma": np.array([0.5, math.inf, 1.5]),
        "energy_uncertainty": 0.25,
    }
    return annotated(atoms, results)


def event(**changes) -> Event:
    fields = {
        "level": "flag",
        "step": 12,
        "time_fs": 6.0,
        "reading": 0.7,
        "threshold": 0.5,
        "reason": REASON,
        "atoms": frame(),
        "dynamics": SimpleNamespace(nsteps=12, max_steps=100),
    }
    return Event(**fields | changes)


def test_halt_raises_with_step_reading_and_threshold():
    with pytest.raises(
        UncertaintyHalt, match=r"halted at step 12 \(6 fs\): force uncertainty .*goes on from this"
    ) as caught:
        Halt()(event())
    assert (caught.value.step, caught.value.reading, caught.value.threshold) == (12, 0.7, 0.5)
    assert pickle.loads(pickle.dumps(caught.value)).step == 12
    with pytest.raises(UncertaintyHalt, match=r"halted at step 12: "):
        Halt()(event(time_fs=None))


def test_halt_can_stop_quietly():
    stopped = event()
    Halt(mode="stop")(stopped)
    assert stopped.dynamics.max_steps == 12


def test_halt_leaves_scipy_by_the_exception_that_ase_expects():
    with pytest.raises(Converged):
        Halt(mode="stop")(event(dynamics=SciPyFminCG(frame(), logfile=None)))


def test_halt_raises_where_a_loop_cannot_be_told_to_stop():
    # SwitchLangevin counts past max_steps, which stays 0; BasinHopping does not count; a calculator has no loop.
    hopping = BasinHopping.__new__(BasinHopping)
    hopping.nsteps = hopping.max_steps = 0
    for dynamics in (SimpleNamespace(nsteps=12, max_steps=0), hopping, None):
        with pytest.raises(UncertaintyHalt):
            Halt(mode="stop")(event(dynamics=dynamics))


def test_halt_leaves_the_ode_of_a_path_quietly_and_its_other_method_loudly():
    # ASE catches the one in the method "ode" and nothing in "static", whatever the object says its method is.
    path = NEBOptimizer(NEB([frame() for _ in range(3)], method="improvedtangent"), logfile=None)
    with pytest.raises(OptimizerConvergenceError) as caught:
        Halt(mode="stop")(event(dynamics=path))
    assert isinstance(caught.value, UncertaintyHalt)
    assert (caught.value.step, caught.value.reading) == (12, 0.7)
    with pytest.raises(UncertaintyHalt) as caught:
        Halt()(event(dynamics=path))
    assert not isinstance(caught.value, OptimizerConvergenceError)


def test_halt_of_a_calculator_speaks_of_calculations():
    with pytest.raises(
        UncertaintyHalt, match=r"halted at calculation 12: .*Its results are kept: asking for them again"
    ):
        Halt()(event(dynamics=None, time_fs=None))


def test_halt_refuses_other_modes():
    with pytest.raises(ValueError, match=r"modes 'raise' and 'stop', not 'quit'"):
        Halt(mode="quit")


def test_flag_writes_every_key_and_why(tmp_path):
    path = tmp_path / "flagged.xyz"
    Flag(path)(event())
    (read,) = read_frames(path)
    assert read.info["flag_reason"] == REASON
    assert read.info["flag_level"] == "flag"
    assert read.info["flag_step"] == 12
    assert read.info["flag_time_fs"] == 6.0
    assert read.info["flag_reading"] == 0.7
    assert read.info["flag_threshold"] == 0.5
    expected = frame().calc.results
    assert read.calc.results.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(read.calc.results[key], value, err_msg=key)


def test_flag_adds_to_what_is_there(tmp_path):
    path = tmp_path / "flagged.xyz"
    Flag(path)(event(step=1))
    Flag(str(path))(event(step=2, reading=math.inf))
    assert [read.info["flag_step"] for read in read_frames(path)] == [1, 2]
    assert read_frames(path)[1].info["flag_reading"] == math.inf


def test_flag_has_no_time_in_an_optimiser(tmp_path):
    atoms = frame()
    atoms.info["flag_time_fs"] = 3.0  # left by the run this structure was taken from
    Flag(tmp_path / "a.xyz")(event(atoms=atoms, time_fs=None, dynamics=BFGS(atoms, logfile=None)))
    assert "flag_time_fs" not in read_frames(tmp_path / "a.xyz")[0].info
    assert atoms.info["flag_time_fs"] == 3.0


def test_flag_says_which_image_of_a_path_it_was(tmp_path):
    Flag(tmp_path / "a.xyz")(event(image=3))
    Flag(tmp_path / "a.xyz")(event())
    first, second = read_frames(tmp_path / "a.xyz")
    assert first.info["flag_image"] == 3
    assert "flag_image" not in second.info


def test_frames_before_an_alarm_keep_what_they_were_themselves(tmp_path):
    events = [event(level="ok", step=step, time_fs=step / 2, reading=step / 20, reason="") for step in (10, 11)]
    Flag(tmp_path / "a.xyz").before(events, event(level="halt"))
    frames = read_frames(tmp_path / "a.xyz")
    assert [frame.info["flag_step"] for frame in frames] == [10, 11]
    assert [frame.info["flag_time_fs"] for frame in frames] == [5.0, 5.5]
    assert [frame.info["flag_reading"] for frame in frames] == [0.5, 0.55]
    assert {frame.info["flag_level"] for frame in frames} == {"before"}
    assert {frame.info["flag_reason"] for frame in frames} == {"before the halt at step 12"}


def test_flag_does_not_pass_on_the_labels_of_the_first_structure(tmp_path):
    atoms = frame()
    atoms.info |= {"REF_energy": -1.0, "REF_stress": np.zeros(6), "run": "a"}
    atoms.set_array("REF_forces", np.zeros((3, 3)))
    Flag(tmp_path / "a.xyz")(event(atoms=atoms))
    (read,) = read_frames(tmp_path / "a.xyz")
    assert not [key for key in (*read.info, *read.arrays) if key.startswith("REF_")]
    assert read.info["run"] == "a"
    assert atoms.info["REF_energy"] == -1.0
    assert atoms.has("REF_forces")


def test_flag_does_not_write_results_of_other_positions(tmp_path):
    moved = frame()
    moved.positions += 0.1
    Flag(tmp_path / "a.xyz")(event(atoms=moved))
    (read,) = read_frames(tmp_path / "a.xyz")
    assert read.calc is None
    assert "gamma" not in read.arrays
    assert "energy_uncertainty" not in read.info


def test_flag_leaves_nothing_behind_when_nothing_is_flagged(tmp_path):
    Flag(tmp_path / "flagged.xyz")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("action", [Flag, Log])
def test_a_path_that_cannot_be_written_is_refused_at_once(tmp_path, action):
    with pytest.raises(ValueError, match=r"missing.*cannot be written \(No such file.*folder that exists"):
        action(tmp_path / "missing" / "flagged.xyz")
    with pytest.raises(ValueError, match=r"cannot be written \(Is a directory\)"):
        action(tmp_path)


LINES = "step,time_fs,reading,level\n12,6,0.7,flag\n13,,nan,halt\n"


def test_log_writes_one_line_an_event(tmp_path):
    path = tmp_path / "log.csv"
    log = Log(path)
    log(event())
    Log(path)(event(step=13, time_fs=None, reading=math.nan, level="halt"))  # as after a restart: no second header
    assert path.read_text() == LINES


def test_log_writes_to_streams_and_standard_output(capsys):
    stream = io.StringIO()
    for log in (Log(stream), Log("-")):
        log(event())
        log(event(step=13, time_fs=None, reading=math.nan, level="halt"))
    assert stream.getvalue() == LINES
    assert capsys.readouterr().out == LINES


def test_call_hands_over_the_event():
    seen = []
    now = event()
    Call(seen.append)(now)
    assert seen == [now]
    with pytest.raises(TypeError, match=r"Call takes a function of one event, not 'x'"):
        Call("x")


def test_actions_are_one_several_or_none():
    assert as_actions(None) == ()
    assert as_actions(Halt()) == (Halt(),)
    assert as_actions([Halt(), print]) == (Halt(), print)
    with pytest.raises(TypeError, match=r"a callable that takes one Event.*not 'stop'"):
        as_actions(["stop"])


def test_a_file_that_was_cut_off_is_refused_before_the_run(tmp_path):
    (tmp_path / "a.xyz").write_text("1\nProperties=species:S:1:pos:R:3\nCu 0.0 0.0")
    with pytest.raises(ValueError, match=r"ends in the middle of a line"):
        Flag(tmp_path / "a.xyz")
