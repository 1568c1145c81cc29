from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer
from ase.build import bulk
from ase.io import read, write
from typer.testing import CliRunner, Result

from ase_uq.cli.console import ErrorsAsLines
from ase_uq.cli.verbs.perturb_frames import perturb_frames

COLD = "rattled,strained,compressed,swapped"


@pytest.fixture
def stress(files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs `ase-uq perturb-frames` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    app = typer.Typer(cls=ErrorsAsLines)
    app.command()(perturb_frames)
    app.callback()(lambda: None)

    def stress(*words, frames=files.train, out="perturbed.xyz") -> Result:
        arguments = [str(word) for word in ("perturb-frames", frames, "--out", out, *words)]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert "Traceback" not in result.stderr
        return result

    return stress


def test_all_kinds_with_a_potential(stress, files):
    result = stress("--model", "toy:", "--per-kind", 2, "--temperature-max", 800)
    assert result.exit_code == 0
    made = read("perturbed.xyz", ":")
    kinds = [atoms.info["perturbed"] for atoms in made]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == dict.fromkeys(
        ("rattled", "strained", "compressed", "hot", "swapped"), 2
    )
    assert all(200 <= atoms.info["temperature_K"] <= 800 for atoms in made if atoms.info["perturbed"] == "hot")
    assert "REF_forces" in read(files.train).arrays
    for atoms in made:
        assert atoms.calc is None
        assert set(atoms.arrays) == {"numbers", "positions"}


def test_the_table_says_what_was_made_and_what_is_next(stress):
    result = stress("--kinds", COLD, "--per-kind", 3)
    header, *rows, last = result.stdout.splitlines()
    assert header.split() == ["kind", "frames", "of", "parents", "shortest", "distance", "(Å)"]
    assert {row.split()[0] for row in rows} == set(COLD.split(","))
    made = read("perturbed.xyz", ":")
    for row in rows:
        kind, count, parents, shortest = row.split()
        distances = [a.get_all_distances() + 9 * np.eye(len(a)) for a in made if a.info["perturbed"] == kind]
        assert (count, parents) == ("3", "3")
        assert float(shortest) == pytest.approx(np.min(distances), abs=0.0051)
    assert last == (
        "12 frames written to perturbed.xyz; next: label them with your reference (REF_energy, REF_forces), then "
        "ase-uq fit ... --calibration held_out.xyz --perturbed perturbed_labelled.xyz"
    )


def test_the_seed_makes_the_file(stress, tmp_path):
    words = ["--kinds", "rattled,hot", "--model", "toy:", "--per-kind", 2]
    for name, seed in (("a.xyz", 3), ("b.xyz", 3), ("c.xyz", 4)):
        assert stress(*words, "--seed", seed, out=name).exit_code == 0
    a, b, c = ((tmp_path / name).read_text() for name in ("a.xyz", "b.xyz", "c.xyz"))
    assert a == b
    assert a != c


def test_an_existing_file_is_kept_unless_told(stress, tmp_path):
    (tmp_path / "perturbed.xyz").write_text("precious")
    refused = stress("--kinds", COLD)
    assert (refused.exit_code, refused.stderr) == (
        1,
        "error: perturbed.xyz exists. Give another name, or --overwrite to replace it.\n",
    )
    assert (tmp_path / "perturbed.xyz").read_text() == "precious"
    assert stress("--kinds", COLD, "--per-kind", 1, "--overwrite").exit_code == 0
    assert len(read("perturbed.xyz", ":")) == 4


def test_a_kind_that_no_frame_allows_is_a_line(stress):
    write("si.xyz", bulk("Si", cubic=True))
    result = stress("--kinds", COLD, "--per-kind", 2, frames="si.xyz")
    assert result.exit_code == 0
    assert "warning: kinds left out, since no frame allows them: swapped needs two elements" in result.stderr
    assert len(read("perturbed.xyz", ":")) == 6


@pytest.mark.parametrize(
    ("words", "options", "code", "part"),
    [
        ([], {}, 2, "hot frames are run with your potential: give it, or leave hot out of --kinds."),
        (
            ["--kinds", "shaken"],
            {},
            1,
            "error: there is no kind of perturbed frames 'shaken'. There are rattled, strained",
        ),
        (["--kinds", COLD], {"frames": "no.xyz"}, 1, "error: there is no file no.xyz."),
        (["--kinds", COLD], {"frames": "empty.xyz"}, 1, "empty.xyz is empty"),
        (["--kinds", COLD], {"out": "no/out.xyz"}, 1, "error: cannot write no/out.xyz"),
        (["--kinds", COLD], {"out": "out.traj"}, 2, "ends in .xyz"),
        (["--kinds", COLD, "--per-kind", 0], {}, 2, "--per-kind"),
        (["--model", "toy:", "--temperature-max", -5], {}, 1, "error: temperature_max must be a positive temperature"),
    ],
)
def test_bad_input(stress, tmp_path, words, options, code, part):
    (tmp_path / "empty.xyz").touch()
    result = stress(*words, **options)
    assert result.exit_code == code
    assert part in " ".join(result.stderr.replace("│", " ").split())
    assert {path.name for path in tmp_path.iterdir()} == {"empty.xyz"}
