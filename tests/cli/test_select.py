import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer
from ase import Atoms
from ase.io import read, write
from typer.testing import CliRunner, Result

from ase_uq import Quantile
from ase_uq.cli.console import ErrorsAsLines
from ase_uq.cli.verbs.select import select as verb
from ase_uq.errors import UQWarning
from ase_uq.scoring.score import score
from ase_uq.selection.select import select as choose


@pytest.fixture
def select(files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs `ase-uq select` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    app = typer.Typer(cls=ErrorsAsLines)
    app.command()(verb)
    app.callback()(lambda: None)

    def select(*words, pool=files.test, out="chosen.xyz", uq=files.uq) -> Result:
        arguments = [str(word) for word in ("select", pool, "--model", "toy:", "--uq", uq, "--out", out, *words)]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert "Traceback" not in result.stderr
        return result

    return select


def test_the_library_chooses_and_the_file_has_its_frames(select, files, terminal):
    result = select("--n", 6, "--train", files.train)
    assert result.exit_code == 0
    expected = choose(files.test, 6, calculator="toy:", uncertainty_model=files.uq, train=files.train, progress=False)
    frames, pool = read("chosen.xyz", ":"), read(files.test, ":")
    assert [atoms.info["source_index"] for atoms in frames] == expected.indices.tolist()
    assert [atoms.info["selected_rank"] for atoms in frames] == [1, 2, 3, 4, 5, 6]
    for atoms in frames:
        source = pool[atoms.info["source_index"]]
        np.testing.assert_allclose(atoms.positions, source.positions, atol=1e-8)
        np.testing.assert_allclose(atoms.arrays["REF_forces"], source.arrays["REF_forces"], atol=1e-8)
        assert atoms.calc is None
    for part in ("pool: ", "train: ", "select: "):
        assert part in result.stderr


def test_the_table_says_what_was_chosen_and_why(select, files):
    result = select("--n", 4, "--train", files.train)
    header, *rows, unit, last = result.stdout.splitlines()
    assert header.split() == ["rank", "frame", "uncertainty", "(eV/Å)", "distance", "reason"]
    for rank, (row, atoms) in enumerate(zip(rows, read("chosen.xyz", ":"), strict=True), 1):
        number, frame, uncertainty, distance, *reason = row.split()
        assert (int(number), int(frame)) == (rank, atoms.info["source_index"])
        assert float(uncertainty) == pytest.approx(atoms.info["selected_uncertainty"], rel=5e-3)
        assert float(distance) == pytest.approx(atoms.info["selected_distance"], abs=5e-3)
        assert reason[:2] == ["farthest", "around"]
    assert unit == "distance: to the nearest training or chosen frame; 1 is typical of two frames of the pool"
    assert last == (
        "4 of 25 frames written to chosen.xyz, chosen by lcmd in the features of bll; 0 near-duplicates left out; "
        "next: label them with your reference (REF_energy, REF_forces)"
    )


def test_a_long_table_is_cut(select):
    result = select("--n", 23)
    assert "  ...  3 more in chosen.xyz" in result.stdout
    assert len(read("chosen.xyz", ":")) == 23


def test_environments_name_their_atom(select):
    result = select("--n", 3, "--per", "environment", "--strategy", "maxdist")
    assert result.stdout.splitlines()[0].split()[:3] == ["rank", "frame", "atom"]
    atoms = read("chosen.xyz", "0")
    assert int(result.stdout.splitlines()[1].split()[2]) == atoms.info["selected_atom"]


def test_structures_are_compared_by_their_cumulants(select):
    assert select("--n", 5).exit_code == 0
    by_means = [atoms.info["source_index"] for atoms in read("chosen.xyz", ":")]
    assert select("--n", 5, "--cumulants", 3, "--overwrite").exit_code == 0
    assert [atoms.info["source_index"] for atoms in read("chosen.xyz", ":")] != by_means


def test_bands_are_counted(select, files):
    result = select("--n", 3, "--strategy", "bands", "--flag", "q0.5", "--halt", 100, "--seed", 4)
    assert result.exit_code == 0
    expected = choose(
        files.test,
        3,
        calculator="toy:",
        uncertainty_model=files.uq,
        strategy="bands",
        flag=Quantile(0.5),
        halt=100.0,
        seed=4,
        progress=False,
    )
    assert result.stdout.splitlines()[0] == expected.bands.describe()
    assert [atoms.info["source_index"] for atoms in read("chosen.xyz", ":")] == expected.indices.tolist()


def test_no_candidate_leaves_no_file(select, tmp_path):
    result = select("--n", 3, "--flag", 1000)
    assert result.exit_code == 1
    assert result.stdout == "bands at 1e+03 and inf eV/Å: trusted 25 (100.0%), candidate 0 (0.0%), failed 0 (0.0%)\n"
    assert "warning: 0 of the 3 frames asked for were chosen" in result.stderr
    assert result.stderr.splitlines()[-1].endswith("was chosen, and chosen.xyz is not written.")
    assert not list(tmp_path.iterdir())


def test_a_small_pool_is_taken_whole(select, files):
    write("pool.xyz", read(files.test, ":6"))
    result = select("--n", 100, pool="pool.xyz")
    assert result.exit_code == 0
    assert "warning: 100 frames were asked for and the pool has 6: no more than these can be chosen." in result.stderr
    assert "6 of 6 frames written to chosen.xyz" in result.stdout
    assert len(read("chosen.xyz", ":")) == 6


def test_copies_of_training_frames_are_left(select, files):
    pool = [*read(files.train, ":5"), *read(files.test, ":3")]
    write("pool.xyz", pool)
    result = select("--n", 8, "--train", files.train, pool="pool.xyz")
    assert result.exit_code == 0
    assert "warning: 3 of the 8 frames asked for were chosen: 5 are near-duplicates" in result.stderr
    assert sorted(atoms.info["source_index"] for atoms in read("chosen.xyz", ":")) == [5, 6, 7]
    assert "5 near-duplicates left out" in result.stdout


def test_an_existing_file_is_kept_unless_told(select, tmp_path):
    (tmp_path / "chosen.xyz").write_text("precious")
    refused = select("--n", 2)
    assert (refused.exit_code, refused.stderr) == (
        1,
        "error: chosen.xyz exists. Give another name, or --overwrite to replace it.\n",
    )
    assert (tmp_path / "chosen.xyz").read_text() == "precious"
    assert select("--n", 2, "--overwrite").exit_code == 0
    assert len(read("chosen.xyz", ":")) == 2


def test_an_element_that_was_not_fitted_is_one_warning(select, files):
    frames = read(files.test, ":3")
    for atoms in frames:
        atoms.symbols[0] = "Si"
    write("in.xyz", frames)
    result = select("--n", 1, pool="in.xyz")
    assert result.exit_code == 0
    assert result.stderr.count("warning: 3 frames of the pool contain Si") == 1


@pytest.mark.parametrize(
    ("words", "options", "code", "part"),
    [
        (["--n", 0], {}, 2, "--n"),
        ([], {"pool": "no.xyz"}, 1, "error: there is no file no.xyz."),
        (["--train", "no.xyz"], {}, 1, "error: there is no file no.xyz."),
        ([], {"pool": "empty.xyz"}, 1, "error: the file empty.xyz is empty."),
        ([], {"pool": "gold.xyz"}, 1, "contains Au, which the potential does not know"),
        ([], {"out": "chosen.traj"}, 2, "ends in .xyz"),
        ([], {"out": "no/chosen.xyz"}, 1, "error: cannot write no/chosen.xyz"),
        (["--overwrite"], {"pool": "gold.xyz", "out": "gold.xyz"}, 2, "gold.xyz is read from: give another name"),
        (["--strategy", "best"], {}, 1, "error: strategy must be one of 'lcmd', 'maxdet', 'maxdist'"),
        (["--strategy", "bands", "--flag", 0.1], {}, 1, "error: the strategy 'bands' chooses between two thresholds"),
        (["--per", "atom"], {}, 1, "error: per must be one of 'structure', 'environment', not 'atom'."),
        (["--cumulants", 5], {}, 2, "--cumulants"),
        (["--cumulants", 2, "--per", "environment"], {}, 1, "error: cumulants is 2, but an environment is one atom"),
        (["--method", "pdrum"], {}, 1, "error: the uncertainty model has no method 'pdrum'. It has bll."),
        (["--flag", "tall"], {}, 2, "'tall' is neither a number in eV/Å nor a criterion"),
    ],
)
def test_bad_input(select, tmp_path, words, options, code, part):
    (tmp_path / "empty.xyz").touch()
    write("gold.xyz", Atoms("Au"))
    result = select(*words, **options)
    assert result.exit_code == code
    assert part in " ".join(result.stderr.replace("│", " ").split())
    assert {path.name for path in tmp_path.iterdir()} == {"empty.xyz", "gold.xyz"}


class TestScored:
    """Frames that `score` wrote are chosen from without the potential."""

    @pytest.fixture
    def scored(self, files, tmp_path: Path) -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UQWarning)
            score(files.test, "toy:", files.uq, out=tmp_path / "scored.xyz", progress=False)
        return tmp_path / "scored.xyz"

    @pytest.fixture
    def from_scored(self, scored, files) -> Callable[..., Result]:
        def from_scored(*words, uq=files.uq) -> Result:
            app = typer.Typer(cls=ErrorsAsLines)
            app.command()(verb)
            app.callback()(lambda: None)
            asked = [] if uq is None else ["--uq", uq]
            arguments = [str(word) for word in ("select", scored, *asked, "--out", "chosen.xyz", *words)]
            return CliRunner().invoke(app, arguments, catch_exceptions=False)

        return from_scored

    def test_the_most_uncertain_are_taken(self, select, from_scored, files):
        result = from_scored("--n", 4)
        assert result.exit_code == 0, result.stderr
        header, *rows, last = result.stdout.splitlines()
        assert header.split() == ["rank", "frame", "uncertainty", "(eV/Å)", "reason"]
        frames = read("chosen.xyz", ":")
        for rank, (row, atoms) in enumerate(zip(rows, frames, strict=True), 1):
            number, frame, uncertainty, *reason = row.split()
            assert (int(number), int(frame), reason) == (rank, atoms.info["source_index"], ["most", "uncertain"])
            assert float(uncertainty) == pytest.approx(atoms.info["selected_uncertainty"], rel=5e-3)
        assert last == (
            "4 of 25 frames written to chosen.xyz, chosen by top from their own uncertainties; near-duplicates were "
            "not looked for; next: label them with your reference (REF_energy, REF_forces)"
        )
        assert select("--n", 4, "--strategy", "top", "--overwrite").exit_code == 0
        assert [atoms.info["source_index"] for atoms in read("chosen.xyz", ":")] == [
            atoms.info["source_index"] for atoms in frames
        ]

    @pytest.mark.parametrize(
        ("words", "uq", "code", "part"),
        [
            ([], None, 2, "'--model': give the potential, or only --uq for frames that `ase-uq score` wrote with it."),
            (
                ["--train", "TRAIN"],
                ...,
                2,
                "'--train': it is about features, which scored frames do not hold:",
            ),
            (["--method", "bll"], ..., 2, "'--method': it is about features"),
            (["--per", "environment"], ..., 2, "'--per': it is about features"),
            (["--cumulants", 2], ..., 2, "'--cumulants': it is about features"),
            (["--duplicates", 0.1], ..., 2, "'--duplicates': it is about features"),
            (["--strategy", "lcmd"], ..., 1, "error: the strategy 'lcmd' compares features, and scored frames hold"),
        ],
    )
    def test_what_needs_features_is_refused(self, select, from_scored, files, words, uq, code, part):
        words = [files.train if word == "TRAIN" else word for word in words]
        result = from_scored(*words, uq=files.uq if uq is ... else uq)
        assert result.exit_code == code
        assert part in " ".join(result.stderr.replace("│", " ").split())
        assert not Path("chosen.xyz").exists()
