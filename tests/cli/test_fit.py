from ase.io import read, write

from ase_uq import UncertaintyModel


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
    assert "fit: " in result.stderr
    assert "calibrate: " in result.stderr


def test_options_reach_the_library(run, files, tmp_path):
    frames = [read(path, ":") for path in (files.train, files.calibration)]
    for path, atoms_list in zip(("t.xyz", "c.xyz"), frames, strict=True):
        for atoms in atoms_list:
            atoms.info["E"], atoms.arrays["F"] = atoms.info.pop("REF_energy"), atoms.arrays.pop("REF_forces")
        write(path, atoms_list)
    words = ["fit", "--model", "toy:", "--train", "t.xyz", "--calibration", "c.xyz", "--out", "a.safetensors"]
    options = ["--energy-key", "E", "--forces-key", "F", "--features", "last_layer", "--dtype", "float32"]
    options += ["--methods", "bll, mahalanobis"]
    result = run(*words, *options, "--device", "cpu", "--batch-atoms", 50, "--seed", 1)
    assert result.exit_code == 0
    fitted = UncertaintyModel.load(tmp_path / "a.safetensors")
    assert fitted.methods["bll"].head.settings["features"] == "last_layer"
    assert (set(fitted.methods), fitted.primary) == ({"bll", "mahalanobis"}, "combined")
    missing = run(*words)
    assert missing.exit_code == 1
    assert "error: training frame 0 has no reference energy or forces" in missing.stderr


def test_a_method_that_is_not_there(run, files):
    words = ["fit", "--model", "toy:", "--train", files.train, "--calibration", files.calibration, "--out", "a.st"]
    result = run(*words, "--methods", "bll,none")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: there is no method 'none'. There are: bll, committee, ")


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
    result = run(
        "fit", "--model", "toy:", "--train", "a", "--calibration", "b", "--out", "c", "--features", "all_of_them"
    )
    assert result.exit_code == 2
    assert "all_of_them" in result.stderr


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
