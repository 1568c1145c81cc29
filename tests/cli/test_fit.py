import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ase.io import read, write

import ase_uq
from ase_uq import UncertaintyModel
from ase_uq.methods import available_methods


def test_fit_writes_what_the_library_fits(run, files, tmp_path):
    result = run(
        "fit",
        "--model",
        "toy:",
        "--train",
        files.train,
        "--calibration",
        files.calibration,
        "--out",
        "a.uq.safetensors",
        "--methods",
        "bll",
    )
    assert result.exit_code == 0
    fitted, expected = UncertaintyModel.load(tmp_path / "a.uq.safetensors"), UncertaintyModel.load(files.uq)
    assert fitted.summary() == expected.summary()
    assert result.stdout.startswith("uncertainty model for a toy potential")
    assert result.stdout.endswith("ase-uq score or ase-uq md with --model toy: --uq a.uq.safetensors\n")


def test_options_reach_the_library(run, files, tmp_path):
    frames = [read(path, ":") for path in (files.train, files.calibration)]
    for path, atoms_list in zip(("t.xyz", "c.xyz"), frames, strict=True):
        for atoms in atoms_list:
            atoms.info["E"], atoms.arrays["F"] = atoms.info.pop("REF_energy"), atoms.arrays.pop("REF_forces")
        write(path, atoms_list)
    words = ["fit", "--model", "toy:", "--train", "t.xyz", "--calibration", "c.xyz", "--out", "a.safetensors"]
    options = ["--energy-key", "E", "--forces-key", "F", "--set", "bll.features=last_layer", "--dtype", "float32"]
    options += ["--methods", "bll, mahalanobis", "--set", "mahalanobis.ridge=1e-8"]
    result = run(*words, *options, "--device", "cpu", "--batch-atoms", 50, "--seed", 1)
    assert result.exit_code == 0
    fitted = UncertaintyModel.load(tmp_path / "a.safetensors")
    assert fitted.methods["bll"].head.settings["features"] == "last_layer"
    assert fitted.methods["mahalanobis"].head.settings["ridge"] == 1e-8
    assert (set(fitted.methods), fitted.primary) == ({"bll", "mahalanobis"}, "combined")
    missing = run(*words)
    assert missing.exit_code == 1
    assert "error: training frame 0 has no reference energy or forces" in missing.stderr


def test_several_files_and_parts_of_them(run, files, tmp_path):
    frames = read(files.train, ":")
    write(tmp_path / "first.xyz", frames[:12])
    write(tmp_path / "rest.xyz", frames[12:])
    words = ["fit", "--model", "toy:", "--calibration", f"{files.calibration}@:20", "--methods", "bll", "--out", "a.st"]
    assert run(*words, "--train", tmp_path / "first.xyz", "--train", tmp_path / "rest.xyz").exit_code == 0
    provenance = UncertaintyModel.load(tmp_path / "a.st").provenance
    assert provenance["train"]["digest"] == UncertaintyModel.load(files.uq).provenance["train"]["digest"]
    assert provenance["calibration"]["frames"] == 20


def test_a_method_that_is_not_there(run, files):
    words = ["fit", "--model", "toy:", "--train", files.train, "--calibration", files.calibration, "--out", "a.st"]
    result = run(*words, "--methods", "bll,none")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: there is no method 'none'. There are: bll, committee, ")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (
            "bll",
            "'bll' sets nothing: write METHOD.OPTION=VALUE. Options of bll and their defaults: features=latent ridge=",
        ),
        ("bll.features=all", "bll.features takes latent or last_layer, not 'all'."),
        ("kernel.noise=1", "'kernel.noise=1' is for kernel, which is not among the methods bll: add it to them."),
    ],
)
def test_an_option_that_cannot_be_set(run, files, assignment: str, message: str):
    words = ["fit", "--model", "toy:", "--train", files.train, "--calibration", files.calibration, "--out", "a.st"]
    result = run(*words, "--methods", "bll", "--set", assignment)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {message}")
    assert len(result.stderr.splitlines()) == 1


def install(folder: Path, package: str, entry_points: str) -> None:
    """What an installed package with entry points leaves in a folder of the path."""
    metadata = folder / f"{package}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(entry_points)


def test_banners_of_a_plugin_are_not_shown(run, files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "noisy.py").write_text("print('Welcome!')\ndef load(*_): raise ValueError('loaded')\n")
    install(tmp_path, "noisy", "[ase_uq.backends]\nnoisy = noisy\n")
    monkeypatch.syspath_prepend(tmp_path)
    words = ["--train", files.train, "--calibration", files.calibration, "--out", "a.st"]
    result = run("fit", "--model", "noisy:", *words)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "error: loaded\n")


def test_help_names_what_is_installed_and_imports_nothing_for_it(tmp_path: Path):
    install(tmp_path, "mine", "[ase_uq.methods]\nmymethod = mine\n")
    install(tmp_path, "yours", "[ase_uq.backends]\nyourbackend = yours\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom ase_uq.cli import main\n"
        "try: main(['fit', '--help'])\nfinally: print(*sorted(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"COLUMNS": "200"},
        cwd=Path(ase_uq.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    shown, _, modules = run.stdout.rstrip().rpartition("\n")
    found = set(re.findall(r"[\w:@-]+", shown))
    assert {*available_methods(), "mymethod"} <= found
    assert {"mace:PATH", "mace-omol:NAME", "orb:FUNCTION@WEIGHTS", "yourbackend:TARGET", "embedded:orb-direct"} <= found
    assert "{" not in shown
    assert not {"torch", "scipy", "numpy", "ase", "mace", "mine", "yours"} & set(modules.split())


def test_frames_that_are_not_there(run, files):
    result = run("fit", "--model", "toy:", "--train", "no.xyz", "--calibration", files.calibration, "--out", "a.st")
    assert (result.exit_code, result.stderr) == (1, "error: training frames: there is no file no.xyz.\n")


def test_calibration_on_training_frames_is_refused(run, files, tmp_path):
    result = run("fit", "--model", "toy:", "--train", files.train, "--calibration", files.train, "--out", "a.st")
    assert result.exit_code == 1
    assert "60 of 60 calibration frames are training frames" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_bad_output_is_told_before_the_work(run, files):
    result = run(
        "fit",
        "--model",
        "none:",
        "--train",
        files.train,
        "--calibration",
        files.train,
        "--out",
        "no/such/a.safetensors",
    )
    assert result.exit_code == 1
    assert "error: cannot write no/such/a.safetensors" in result.stderr


def test_wrong_usage(run, files):
    result = run("fit", "--model", "toy:", "--train", files.train, "--calibration", files.train)
    assert result.exit_code == 2
    assert "--out" in result.stderr


def test_bad_specs_are_one_line(run, files, tmp_path):
    (tmp_path / "mine.py").write_text("def number():\n    return 1\n")
    words = ["--train", files.train, "--calibration", files.calibration, "--out", "a.safetensors"]
    for spec, part in (
        ("toy", "has no colon"),
        ("tyo:", "Did you mean toy?"),
        ("embedded:mcae", "Did you mean mace?"),
        ("mine.py:number", "returned int; an ASE calculator was expected"),
        ("no.py:number", "there is no file no.py"),
    ):
        result = run("fit", "--model", spec, *words)
        assert result.exit_code == 1
        assert part in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_perturbed_frames_are_kept_for_thresholds(run, files, tmp_path):
    words = ["fit", "--model", "toy:", "--train", files.train, "--calibration", files.calibration, "--methods", "bll"]
    result = run(*words, "--perturbed", files.test, "--out", "a.st")
    assert result.exit_code == 0
    found = UncertaintyModel.load(tmp_path / "a.st").perturbed
    assert found is not None
    assert len(found.run) == len(read(files.test, ":"))
    assert f"perturbed      {len(found.run)} frames" in result.stdout
    missing = run(*words, "--perturbed", "no.xyz", "--out", "b.st")
    assert (missing.exit_code, missing.stderr) == (1, "error: perturbed frames: there is no file no.xyz.\n")
