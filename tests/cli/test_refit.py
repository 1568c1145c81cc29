"""`ase-uq refit`: the file that it writes, what it says, and what it refuses."""

import shutil

import pytest

from ase_uq import UncertaintyModel
from ase_uq.backends.toy import ToyCalculator
from ase_uq.fitting.refit import refit

OWN = """
from ase_uq.backends.toy import ToyCalculator
def tuned(device="cpu"):
    new = ToyCalculator(device=device)
    new.potential.weights.data *= 0.9
    return new
def silicon():
    return ToyCalculator(("Si",))
"""

pytestmark = pytest.mark.filterwarnings("ignore:.* tells nothing about the:ase_uq.errors.UQWarning")


@pytest.fixture(autouse=True)
def own(tmp_path) -> None:
    (tmp_path / "own.py").write_text(OWN)


def test_refit_writes_what_the_library_makes(run, files, tmp_path):
    words = ["refit", files.uq, "--model", "own.py:tuned", "--calibration", files.calibration, "--out", "a.st"]
    result = run(*words, "--old", "toy:", "--device", "cpu", "--batch-atoms", 200, "--seed", 1)
    assert result.exit_code == 0
    made, old = UncertaintyModel.load(tmp_path / "a.st"), UncertaintyModel.load(files.uq)
    new = ToyCalculator()
    new.potential.weights.data *= 0.9
    found = refit(old, new, files.calibration, batch_atoms=200, progress=False)
    assert made.summary() == found.model.summary()
    assert result.stdout.startswith(
        f"{made.summary()}\n\n{found.describe()}\nFrom toy: to own.py:tuned: features moved by 0.000"
    )
    assert result.stdout.endswith("written to a.st; next: ase-uq evaluate with --model own.py:tuned --uq a.st\n")
    assert f"refit          from that of potential {old.identity.fingerprint[:12]}" in run("info", "a.st").stdout


def test_with_training_frames_a_new_fit_is_tried(run, files, tmp_path):
    words = ["refit", files.uq, "--model", "own.py:tuned", "--calibration", files.calibration, "--out", "a.st"]
    result = run(*words, "--train", files.train, "--set", "bll.ridge=1e-4")
    assert result.exit_code == 0
    told = UncertaintyModel.load(tmp_path / "a.st").provenance["refit"]
    assert set(told["likelihoods"]) == {"recalibrated", "fitted again"}
    for value in told["likelihoods"].values():
        assert f"{value:.3f}" in result.stdout


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--methods", "bll"), 2, "these are of a new fit: give --train too"),
        (("--out", "old.st"), 2, "old.st is the old model, which the old potential needs: give another name"),
        (("--out", "no/a.st"), 1, "cannot write no/a.st"),
        (("--calibration", "no.xyz"), 1, "no.xyz"),
        (("--model", "own.py:silicon"), 1, "fitted on H, C, O, and the new potential knows none of these elements"),
        (("--model", "toy:direct"), 1, "another architecture: direct was False, here it is True"),
        (("--train", "{calibration}"), 1, "120 of 120 calibration frames are training frames"),
    ],
)
def test_what_is_refused(run, files, tmp_path, words, code, message):
    shutil.copy(files.uq, tmp_path / "old.st")
    given = {"--model": "own.py:tuned", "--calibration": str(files.calibration), "--out": "a.st"}
    given |= {words[0]: words[1].format(calibration=files.calibration)}
    result = run("refit", "old.st", *(word for pair in given.items() for word in pair))
    assert result.exit_code == code
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert not (tmp_path / "a.st").exists()


def test_an_old_model_that_is_not_there(run, files):
    result = run("refit", "no.st", "--model", "toy:", "--calibration", files.calibration, "--out", "a.st")
    assert (result.exit_code, result.stderr) == (1, "error: there is no file no.st.\n")
