"""`ase-uq blip`: the file that it writes, what follows it on the command line, and what is refused."""

import json

import pytest
import torch

from ase_uq.backends.stochastic import Blip
from ase_uq.backends.toy import ToyCalculator
from ase_uq.fitting import blip as module
from ase_uq.fitting.blip import BlipTraining, train_blip

WORDS = ("blip", "--model", "toy:", "--epochs", 2, "--dropout", 1e-3)

pytestmark = pytest.mark.filterwarnings("ignore:.* tells nothing about:ase_uq.errors.UQWarning")


def test_it_writes_what_the_library_makes(run, files, tmp_path):
    words = ("--train", files.train, "--validation", files.test, "--out", "a.st", "--members", 4, "--seed", 3)
    result = run(*WORDS, *words, "--loss", "crps", "--device", "cpu")
    assert result.exit_code == 0
    how = BlipTraining(loss="crps", max_epochs=2, dropout=1e-3, seed=3)
    out = tmp_path / "b.st"
    made = train_blip(ToyCalculator(), files.train, files.test, out=out, training=how, n_members=4, progress=False)
    found = Blip.load(tmp_path / "a.st")
    assert (found.n_members, found.training) == (4, made.training)
    for name, weight in made.weights.items():
        assert torch.equal(found.weights[name], weight)
    first, best = found.training["history"][0][1], found.training["best_loss"]
    assert f"2 epochs; validation loss {first:.4f} after the first, {best:.4f} after the best" in result.stdout
    assert result.stdout.endswith(
        "written to a.st; next: ase-uq fit --methods committee with --model 'toy:?blip=a.st'\n"
    )
    # What follows: a fit, and what it is good for.
    spec = "toy:?blip=a.st"
    fitted = run(
        "fit", "--model", spec, "--train", files.train, "--calibration", files.calibration, "--methods", "committee",
        "--out", "uq.st",
    )  # fmt: skip
    assert fitted.exit_code == 0, fitted.stderr
    judged = run("evaluate", files.test, "--model", spec, "--uq", "uq.st", "--json")
    assert judged.exit_code == 0, judged.stderr
    assert json.loads(judged.stdout)
    scored = run("score", files.test, "--model", spec, "--uq", "uq.st", "--out", "scored.xyz")
    assert scored.exit_code == 0, scored.stderr
    moved = run(
        "md", files.start, "--model", spec, "--uq", "uq.st", "--steps", 3, "--temperature", 300, "--log", "md.csv"
    )
    assert moved.exit_code == 0, moved.stderr
    other = run("score", files.test, "--model", "toy:", "--uq", "uq.st", "--out", "other.xyz")
    assert other.exit_code == 1
    assert "blip_members was 4, here it is None" in " ".join(other.stderr.split())


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--out", "no/a.st"), 1, "cannot write no/a.st"),
        (("--out", "there.st"), 1, "there.st exists. Give another name, or --overwrite to replace it"),
        (("--model", "toy:direct"), 1, "weights of a direct force head cannot be drawn"),
        (("--model", "toy:?blip=no.st"), 1, "there is no file no.st"),
        (("--model", "toy:?blip=no.st?head=a"), 1, "has a ?head= after ?blip=. Write the head first"),
        (("--validation", "{train}"), 1, "60 of 60 validation frames are training frames"),
        (("--train", "no.xyz"), 1, "no.xyz"),
        (("--loss", "mse"), 2, "'mse' is not one of"),
        (("--members", "1"), 2, "greater than or equal to 2"),
        (("--dropout", "1"), 1, "dropout is 1.0; a number above 1e-08 and below 0.5 was expected"),
        (("--forces-key", "f"), 1, "training frame 0 has no reference forces. Looked for REF_energy, f, REF_stress"),
    ],
)
def test_what_is_refused(run, files, tmp_path, words, code, message):
    (tmp_path / "there.st").write_text("mine")
    given = {"--model": "toy:", "--train": str(files.train), "--validation": str(files.test), "--out": "a.st"}
    given |= {words[0]: words[1].format(train=files.train)}
    result = run("blip", *(word for pair in given.items() for word in pair))
    assert result.exit_code == code
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there.st"]


def test_ctrl_c_says_where_the_training_goes_on(run, files, tmp_path, monkeypatch):
    own = module._Run.next_epoch

    def stopped(training):
        if training.epoch == 1:
            raise KeyboardInterrupt
        own(training)

    monkeypatch.setattr(module._Run, "next_epoch", stopped)
    result = run(*WORDS, "--train", files.train, "--validation", files.test, "--out", "a.st")
    assert result.exit_code == 130
    assert "what was trained so far is in a.st.training; the same command goes on" in " ".join(result.stderr.split())
    assert [path.name for path in tmp_path.iterdir()] == ["a.st.training"]


def test_where_no_epoch_was_better_it_says_so(run, files, monkeypatch):
    losses = iter([1.0, 3.0, 2.0])
    monkeypatch.setattr(module._Run, "validated", lambda training: next(losses))
    result = run(*WORDS, "--train", files.train, "--validation", files.test, "--out", "a.st")
    assert result.exit_code == 0
    assert "validation loss 3.0000 after the first, 1.0000 before it: no epoch was better" in result.stdout
