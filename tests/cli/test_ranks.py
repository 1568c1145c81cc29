"""A fit on several ranks, as a launcher starts them: one file, one message, whatever happens to one of them."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from ase.io import read, write

import ase_uq
from ase_uq import UncertaintyModel
from ase_uq.backends import load_backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.cli.ranks import first_host, is_launched, ranks
from ase_uq.errors import InputError
from ase_uq.testing.methods import forward_pass_of

STEP = {
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
}


class TestLaunched:
    @pytest.mark.parametrize(
        ("environment", "expected"),
        [
            ({}, False),
            ({"WORLD_SIZE": "1", "RANK": "0"}, False),
            ({"WORLD_SIZE": "4", "RANK": "3"}, True),
            ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, False),  # the batch script itself, whose step begins later
            ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, False),
        ],
    )
    def test_by_torchrun_or_in_a_step_of_several_tasks(self, environment, expected):
        before = dict(environment)
        assert is_launched(environment) == expected
        assert environment == before

    def test_torchs_variables_are_those_of_slurm(self):
        environment = dict(STEP)
        assert is_launched(environment)
        assert [environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")] == [
            *("5", "8", "1", "gpu03")
        ]
        later, other = dict(STEP, SLURM_STEP_ID="1"), dict(STEP, SLURM_PROCID="6")
        assert is_launched(later)
        assert is_launched(other)
        assert 1024 < int(environment["MASTER_PORT"]) < 65536
        assert other["MASTER_PORT"] == environment["MASTER_PORT"] != later["MASTER_PORT"]

    @pytest.mark.parametrize(
        ("nodes", "first"),
        [("a1", "a1"), ("a1,b2", "a1"), ("gpu[03-05,9]", "gpu03"), ("n[7,9]-ib,m1", "n7-ib"), ("r1n[001]", "r1n001")],
    )
    def test_the_first_host(self, nodes, first):
        assert first_host(nodes) == first


class TestRefusals:
    @pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
    def test_a_number_of_processes_that_is_none(self, name):
        with pytest.raises(InputError, match=f"{name}='many' is no number of processes. Unset it"):
            is_launched({name: "many"})

    @pytest.fixture
    def two(self, monkeypatch):
        for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}.items():
            monkeypatch.setenv(name, value)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))

    def test_one_device_for_all(self, two):
        with pytest.raises(InputError, match="--device cuda:1 would put all ranks on one device"), ranks("cuda:1"):
            pass

    def test_others_that_never_come(self, two, monkeypatch):
        monkeypatch.setattr("ase_uq.cli.ranks._START", timedelta(seconds=0.5))
        message = r"the 2 processes of this command did not find each other \(.*unset SLURM_STEP_NUM_TASKS"
        with pytest.raises(InputError, match=message), ranks("cpu"):
            pass


@pytest.fixture
def launched(preloaded_bin: Path, tmp_path: Path) -> Callable[..., list[tuple[int, str, str]]]:
    """Starts commands as ranks; exit code, stdout and stderr of each."""

    def launched(*commands: list[object]) -> list[tuple[int, str, str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        path = os.pathsep.join([str(preloaded_bin), str(Path(sys.executable).parent), os.environ["PATH"]])
        processes = [
            subprocess.Popen(
                list(map(str, command)),
                cwd=tmp_path,
                env={**os.environ, **common, "PATH": path, "RANK": str(rank), "WORLD_SIZE": str(len(commands))},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, command in enumerate(commands)
        ]
        told = [process.communicate(timeout=120) for process in processes]
        return [(process.returncode, *texts) for process, texts in zip(processes, told, strict=True)]

    return launched


@pytest.fixture
def words(files, tmp_path: Path) -> list[object]:
    for name in ("train", "calibration"):
        write(tmp_path / f"{name}.xyz", read(getattr(files, name), ":24"))
    options = ["--methods", "bll", "--set", "bll.ridge=1e-4", "--batch-atoms", 40]
    return ["--model", "toy:", "--train", "train.xyz", "--calibration", "calibration.xyz", *options]


def test_two_processes_write_the_file_of_one_and_one_of_them_speaks(launched, words, run, files, tmp_path):
    assert run("fit", *words, "--out", "one.uq.safetensors").exit_code == 0
    (code, said, _), other = launched(*[["ase-uq", "fit", *words, "--out", "two.uq.safetensors"]] * 2)
    assert (code, other) == (0, (0, "", ""))
    assert "written to two.uq.safetensors" in said
    one, two = (UncertaintyModel.load(f"{name}.uq.safetensors") for name in ("one", "two"))
    forward_pass = forward_pass_of(load_backend("toy:"), read(files.test, ":5"))
    for key, value in one.apply(forward_pass).items():
        torch.testing.assert_close(two.apply(forward_pass)[key], value, rtol=1e-10, atol=0, equal_nan=True)
    assert two.provenance["calibration"] == one.provenance["calibration"]


TUNED = """
from ase_uq.backends.toy import ToyCalculator
def tuned(device="cpu"):
    new = ToyCalculator(device=device)
    new.potential.weights.data *= 0.9
    return new
"""


def test_torchrun_starts_a_refit_whose_file_is_that_of_one_process(words, run, files, tmp_path):
    """With the launcher itself, in fresh interpreters."""
    (tmp_path / "own.py").write_text(TUNED)
    first = words.index("--methods")  # a refit takes those of the old model
    words = ["refit", files.uq, *words[:first], *words[first + 2 :]]
    words[words.index("toy:")] = "own.py:tuned"
    assert run(*words, "--out", "one.uq.safetensors").exit_code == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "ase_uq.cli"]
    done = subprocess.run(
        list(map(str, [sys.executable, *launcher, *words, "--out", "two.uq.safetensors"])),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(ase_uq.__file__).parents[1]), "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to two.uq.safetensors") == 1
    one, two = (UncertaintyModel.load(tmp_path / f"{name}.uq.safetensors") for name in ("one", "two"))
    tuned_potential = ToyCalculator()
    tuned_potential.potential.weights.data *= 0.9
    forward_pass = forward_pass_of(load_backend(tuned_potential), read(files.test, ":5"))
    for key, value in one.apply(forward_pass).items():
        torch.testing.assert_close(two.apply(forward_pass)[key], value, rtol=1e-8, atol=0, equal_nan=True)
    told = [model.provenance["refit"] for model in (one, two)]
    assert told[1]["kept"] == told[0]["kept"]
    assert told[1]["likelihoods"] == pytest.approx(told[0]["likelihoods"], rel=1e-8)
    assert two.provenance["calibration"] == one.provenance["calibration"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nothing.xyz", "error: training frames: there is no file nothing.xyz.\n"),
        (
            "calibration.xyz",
            "error: the training frames of rank 1 are not those of rank 0. Give all ranks the same files.\n",
        ),
    ],
)
def test_what_one_finds_ends_all_with_one_message(launched, words, tmp_path, change, message):
    command = ["ase-uq", "fit", *words, "--out", "two.uq.safetensors"]
    done = launched(command, [change if word == "train.xyz" else word for word in command])
    assert [code for code, _, _ in done] == [1, 1]
    assert sorted(text for _, _, text in done) == ["", message]
    assert not (tmp_path / "two.uq.safetensors").exists()


DYING = """
import os, signal
from ase_uq.cli.ranks import ranks
with ranks("cpu"):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_rank_that_is_killed_ends_the_others_with_a_message(launched, words, tmp_path):
    command = ["ase-uq", "fit", *words, "--out", "two.uq.safetensors"]
    (code, _, said), _ = launched(command, ["python", "-c", DYING])
    assert code == 1
    assert said.startswith("error: another rank has ended, so nothing can be summed over all of them. Its message")
    assert not (tmp_path / "two.uq.safetensors").exists()
