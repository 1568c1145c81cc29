import csv
import re

import numpy as np
import pytest
from ase.build import molecule
from ase.io import read, write

from ase_uq import Quantile, UncertaintyModel, embedded, read_frames


@pytest.fixture
def relax(run, files):
    def relax(*words, start=files.start, out="relaxed.xyz"):
        return run("relax", start, "--model", "toy:", "--uq", files.uq, "--out", out, *words)

    return relax


def test_a_relaxation_that_converges_says_how_far_to_trust_it(relax, files):
    result = relax("--fmax", 0.02, "--halt", 1000)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].startswith("converged in ")
    assert "0.02 asked for" in lines[0]
    assert lines[1].startswith("  forces are uncertain by up to ")
    assert "the minimum is located" in lines[1]
    assert lines[2].startswith("  energy ")
    assert lines[-1] == "written to relaxed.xyz"
    assert result.stderr == ""  # no bar, where stderr is no terminal
    relaxed, start = read_frames("relaxed.xyz")[-1], read(files.start)
    assert np.linalg.norm(relaxed.get_forces(), axis=1).max() <= 0.02
    assert relaxed.get_potential_energy() < start.info["REF_energy"] + 1
    assert relaxed.calc.results["forces_uncertainty"].shape == (len(start), 3)
    assert relaxed.info["relax_status"] == "converged"
    assert f"converged in {relaxed.info['relax_steps']} steps" in lines[0]
    assert "REF_forces" not in relaxed.arrays


def test_a_relaxation_halted_by_its_uncertainty(relax, files):
    words = ["--trajectory", "run.xyz", "--log", "run.csv", "--frames", "flagged.xyz"]
    result = relax("--halt", "q0.001", "--fmax", 1e-4, *words)
    assert result.exit_code == 3
    assert result.stdout == ""
    halt = UncertaintyModel.load(files.uq).threshold(Quantile(0.001))
    told = result.stderr.splitlines()[0]
    assert told.startswith(f"halt: {float(halt):.4g} eV/Å by Quantile(0.001): ")
    assert "units" in told
    assert re.search(r"^stopped after \d+ steps?, since force uncertainty \(max\).* reached halt", result.stderr, re.M)
    assert "written to relaxed.xyz; to go on from there, start from relaxed.xyz with a higher --halt" in result.stderr
    stopped = read("relaxed.xyz")
    assert stopped.info["relax_status"] == "uncertain"
    assert len(read("flagged.xyz", ":")) == 1
    n_steps = stopped.info["relax_steps"]
    assert [atoms.info["step"] for atoms in read("run.xyz", ":")] == list(range(n_steps + 1))
    with open("run.csv") as file:
        assert [row["level"] for row in csv.DictReader(file)] == [*["ok"] * n_steps, "halt"]
    # The toy potential lets two atoms fuse on the way: far from what it knows, as the far field says.
    onwards = relax("--halt", 1e6, start="relaxed.xyz", out="onwards.xyz")
    assert onwards.exit_code == 0
    assert onwards.stdout.startswith("converged")


def test_a_relaxation_out_of_steps_leaves_its_last_structure(relax):
    result = relax("--fmax", 1e-6, "--steps", 2)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "not converged in 2 steps: largest force" in result.stderr
    assert "written to relaxed.xyz; to go on from there, start from relaxed.xyz" in result.stderr
    assert read("relaxed.xyz").info["relax_status"] == "unfinished"


def test_no_threshold_is_needed(relax):
    result = relax()
    assert result.exit_code == 0
    assert "halt" not in result.stderr


@pytest.mark.parametrize("optimizer", ["bfgs", "lbfgs", "fire"])
def test_every_optimiser_comes_to_small_forces(run, optimizer):
    words = ["--fmax", 0.01, "--out", "relaxed.xyz", "--optimizer", optimizer, "--trajectory", "run.xyz"]
    assert run("relax", embedded.path("malonaldehyde.xyz"), "--model", "embedded:mace", *words).exit_code == 0
    frames = read("run.xyz", ":")
    assert [atoms.info["step"] for atoms in frames] == list(range(len(frames)))
    largest = [np.linalg.norm(atoms.get_forces(), axis=1).max() for atoms in frames]
    assert largest[-1] <= 0.01 < largest[-2]


def test_a_threshold_for_each_element(relax):
    result = relax("--flag", "q0.9", "--halt", "q0.98", "--per-element")
    assert [line.split(":")[0] for line in result.stderr.splitlines()[:6]] == [
        f"{level} of {symbol}" for level in ("flag", "halt") for symbol in ("C", "O", "H")
    ]


def test_a_cell_is_relaxed(relax, files):
    atoms = read(files.start)
    atoms.set_cell([6, 6, 6])
    atoms.pbc = True
    write("crystal.xyz", atoms)
    assert relax("--cell", "--steps", 5, start="crystal.xyz").exit_code in (0, 1)
    assert abs(read("relaxed.xyz").get_volume() - 216) > 1e-3


def test_broken_bonds_stop_it(relax, files):
    # A molecule so far squeezed that its bonds spring open.
    atoms = molecule("CH3CH2OH")
    atoms.positions *= 0.6
    write("squeezed.xyz", atoms)
    words = ["--steps", 60, "--fmax", 0.01, "--overwrite"]
    with_bonds = relax("--bonds", *words, start="squeezed.xyz")
    assert with_bonds.exit_code == 3
    assert "Bonds: " in with_bonds.stderr
    assert relax(*words, start="squeezed.xyz").exit_code != 3


def test_what_was_written_before_is_replaced_only_when_asked(relax):
    words = ["--trajectory", "run.xyz", "--log", "run.csv", "--halt", 1000]
    assert relax(*words).exit_code == 0
    n_frames = len(read("run.xyz", ":"))
    for name, out in (("relaxed.xyz", "relaxed.xyz"), ("run.xyz", "other.xyz")):
        refused = relax(*words, out=out)
        assert refused.exit_code == 1
        assert refused.stderr == f"error: {name} exists. Give another name, or --overwrite to replace it.\n"
    assert relax(*words, "--overwrite").exit_code == 0
    assert len(read("run.xyz", ":")) == n_frames
    # The start may be what is replaced.
    assert relax("--overwrite", "--fmax", 0.01, start="relaxed.xyz").exit_code == 0


def test_the_embedded_potential_needs_no_model_of_its_own(run):
    result = run("relax", embedded.path("malonaldehyde.xyz"), "--model", "embedded:mace", "--out", "relaxed.xyz")
    assert result.exit_code == 0
    assert "the minimum is located as well as was asked for" in result.stdout


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--fmax", 0], "0.0 is not positive"),
        (["--fmax", "nan"], "nan is not positive"),
        (["--steps", 0], "--steps"),
        (["--optimizer", "newton"], "newton"),
        (["--halt", "hot"], "'hot' is neither a number in eV/Å nor a criterion"),
        (["--halt", 0.2, "--flag", 0.3], "flag is 0.3 eV/Å and halt is 0.2 eV/Å, so no frame lies between"),
        (["--halt", 0.2, "--per-element"], "--per-element needs a criterion"),
        (["--flag", "alarms=0.1@9ps", "--per-element"], "counts alarms of whole runs, not of elements"),
        (["--flag", 1, "--before", 2], "the frames before a flagged one are saved to --frames: give it too"),
        (["--reduce", "median"], "'median' is not a reduction"),
        (["--trajectory", "run.traj"], "give a name that ends in .xyz or .extxyz"),
        (["--flag", 1, "--frames", "flagged"], "give a name that ends in .xyz or .extxyz"),
    ],
)
def test_wrong_usage(relax, words, part):
    result = relax(*words)
    assert result.exit_code == 2
    assert part in " ".join(result.stderr.replace("│", "").split())


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--halt", "q0.9999"], "calibration frames"),
        (["--cell"], "the structure is not periodic along a and b and c"),
        (["--frames", "flagged.xyz"], "nothing to watch for"),
        (["--trajectory", "no/run.xyz"], "cannot write no/run.xyz"),
    ],
)
def test_what_is_refused_is_one_line(relax, words, part):
    result = relax(*words)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert part in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_name_of_what_is_written_is_checked(relax):
    result = relax(out="relaxed.traj")
    assert result.exit_code == 2
    assert "relaxed.traj is written as extended XYZ" in " ".join(result.stderr.replace("│", "").split())


def test_a_start_that_is_not_there(relax):
    result = relax(start="no.xyz")
    assert (result.exit_code, result.stderr) == (1, "error: START: there is no file no.xyz.\n")


@pytest.mark.parametrize("pair", [("--trajectory", "--frames"), ("--trajectory", "--log"), ("--frames", "--log")])
def test_outputs_that_are_each_other_are_refused(relax, pair):
    result = relax("--halt", 1, pair[0], "out.xyz", pair[1], "out.xyz")
    assert result.exit_code == 1
    assert "out.xyz is given for two outputs: it would be overwritten" in result.stderr
    assert "relaxed.xyz is given for two outputs" in relax("--halt", 1, pair[0], "relaxed.xyz").stderr


@pytest.mark.parametrize("option", ["--trajectory", "--frames", "--log"])
def test_the_start_is_no_output_that_grows(relax, files, option):
    before = files.start.read_bytes()
    result = relax("--halt", 1, option, files.start, "--overwrite")
    assert result.exit_code == 1
    assert "start.xyz is the input: it would be overwritten" in result.stderr
    assert files.start.read_bytes() == before
