"""A fit on several ranks, as a launcher starts them: one file, one message, whatever happens to one of them."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import typer
from ase.io import read, write

import ase_uq
from ase_uq import UncertaintyModel
from ase_uq.backends import load_backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.cli.ranks import _is_first, _linger, check_devices, first_host, is_launched, ranks
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

    def test_others_that_never_come(self, two, monkeypatch):
        monkeypatch.setattr("ase_uq.cli.ranks._START", timedelta(seconds=0.5))
        message = r"the 2 processes of this command did not find each other \(.*unset SLURM_STEP_NUM_TASKS"
        with pytest.raises(InputError, match=message), ranks("cpu"):
            pass


class TestDevices:
    """A machine with GPUs, stood in for: what torch says of them, and what the other ranks have told."""

    @pytest.fixture
    def rank_one(self, monkeypatch):
        """Starts rank 1 where rank 0 has told its device; what the group is made with, and what the rank sees."""
        made = {}

        def init(backend, *, store, rank, world_size, timeout):
            made.update(backend=backend, rank=rank, size=world_size)

        def rank_one(device, other="", *, n_gpus=0, local_rank="1", init=init):
            store = dist.HashStore()
            if other is None:
                store.set_timeout(timedelta(seconds=0.2))
            else:
                store.set("device of 0", other)
            monkeypatch.setenv("WORLD_SIZE", "2")
            monkeypatch.setenv("RANK", "1")
            if local_rank is None:
                monkeypatch.delenv("LOCAL_RANK", raising=False)
            else:
                monkeypatch.setenv("LOCAL_RANK", local_rank)
            monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, 1, 2)]))
            monkeypatch.setattr(dist, "init_process_group", init)
            monkeypatch.setattr(dist, "is_initialized", lambda: bool(made))
            monkeypatch.setattr(dist, "destroy_process_group", made.clear)
            monkeypatch.setattr(dist, "get_rank", lambda: made["rank"])
            monkeypatch.setattr(dist, "get_world_size", lambda: made["size"])
            monkeypatch.setattr(dist, "get_backend", lambda: made["backend"])
            monkeypatch.setattr(torch.cuda, "is_available", lambda: n_gpus > 0)
            monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
            monkeypatch.setattr(torch.cuda, "set_device", lambda device: made.update(current=device))
            monkeypatch.setattr(
                torch.cuda,
                "get_device_properties",
                lambda device: SimpleNamespace(name="GPU", uuid=f"uuid-{device.partition(':')[2]}"),
            )
            monkeypatch.setattr("ase_uq.cli.ranks.socket.gethostname", lambda: "node")
            try:
                with ranks(device) as (communicator, own):
                    assert communicator is not None
                    return {**made, "device": own, "sums_on": str(communicator._device)}
            finally:
                assert not made.get("backend"), "the group was left"

        return rank_one

    # With one GPU to see, the launcher gives each rank its own, and calls it 0.
    @pytest.mark.parametrize(
        ("device", "n_gpus", "local_rank", "own"),
        [("cuda", 2, "1", "cuda:1"), ("", 4, "3", "cuda:3"), ("cuda", 1, "1", "cuda:0")],
    )
    def test_with_gpus_each_rank_takes_one_and_nccl_sums_on_it(self, rank_one, device, n_gpus, local_rank, own):
        found = rank_one(device, "GPU uuid-of-another of node", n_gpus=n_gpus, local_rank=local_rank)
        assert (found["backend"], found["device"], found["current"], found["sums_on"]) == ("nccl", own, own, "cuda")

    @pytest.mark.parametrize(("device", "n_gpus"), [("cpu", 2), ("", 0)])
    def test_on_cpus_gloo_does(self, rank_one, device, n_gpus):
        found = rank_one(device, "", n_gpus=n_gpus, local_rank=None)
        assert (found["backend"], found["device"], found["sums_on"]) == ("gloo", device, "cpu")
        assert "current" not in found

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("cuda:1",), "--device cuda:1 would put all ranks on one device. Give --device cuda"),
            (("cuda",), r"--device cuda, but rank 1 sees no GPU. Ask the launcher for one a rank \(srun"),
        ],
    )
    def test_a_device_that_no_rank_can_have(self, rank_one, words, message):
        with pytest.raises(InputError, match=message):
            rank_one(*words)

    def test_a_launcher_that_does_not_number_the_ranks_of_a_machine(self, rank_one):
        with pytest.raises(InputError, match="LOCAL_RANK is not set, which says which GPU of its machine a rank takes"):
            rank_one("cuda", n_gpus=2, local_rank=None)

    def test_more_ranks_than_gpus(self, rank_one):
        message = r"ranks 0 and 1 have one GPU \(GPU uuid-0 of node\). Start as many ranks on a machine as it has GPUs"
        with pytest.raises(InputError, match=message):
            rank_one("cuda", "GPU uuid-0 of node", n_gpus=2, local_rank="2")

    @pytest.mark.parametrize(
        ("n_gpus", "other", "message"),
        [
            (2, "", "rank 1 has a GPU and rank 0 has none. Give each rank one, or --device cpu"),
            (0, "GPU uuid-0 of node", "rank 0 has a GPU and rank 1 has none"),
        ],
    )
    def test_a_rank_without_one_among_others(self, rank_one, n_gpus, other, message):
        with pytest.raises(InputError, match=message):
            rank_one("", other, n_gpus=n_gpus)

    def test_one_that_failed_before_it_could_tell_is_not_waited_for(self):
        """Rank 0 without a GPU, say: it says so, and rank 1 ends without a word."""
        store = dist.HashStore()
        assert _is_first(store, 0)
        with pytest.raises(InputError, match="rank 0 has failed"):
            check_devices(store, 1, 2, "cpu")
        assert not _is_first(store, 1)

    def test_who_fails_second_says_nothing_and_rank_0_waits_until_others_know(self, monkeypatch):
        store, at_exit = dist.HashStore(), []
        _is_first(store, 1)
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, 0, 2)]))
        monkeypatch.setattr("ase_uq.cli.ranks.atexit.register", lambda *call: at_exit.append(call))
        with pytest.raises(typer.Exit), ranks("cuda:1"):
            pass
        assert at_exit == [(_linger, store, 2)]

    def test_a_group_that_cannot_be_made(self, rank_one):
        def fail(*_, **__):
            raise RuntimeError("connectFullMesh failed\nand a stack")

        with pytest.raises(
            InputError, match=r"the 2 processes of .* did not find each other \(connectFullMesh failed\)"
        ):
            rank_one("cpu", init=fail)

    def test_one_that_was_killed_before_it_could_tell_its_device(self, rank_one):
        with pytest.raises(InputError, match="did not find each other"):
            rank_one("cpu", None)

    def test_where_the_keeper_of_the_store_was_killed_a_rank_says_what_it_knows(self):
        def gone(*_):
            raise RuntimeError("Broken pipe")

        assert _is_first(SimpleNamespace(compare_set=gone), 1)

    def test_the_keeper_of_the_store_waits_for_all_but_not_for_ever(self, monkeypatch):
        store = dist.HashStore()
        monkeypatch.setattr("ase_uq.cli.ranks._FAREWELL", 0.05)
        for rank in (1, 0):
            _is_first(store, rank)
        for size, waits in ((2, False), (3, True)):
            start = time.monotonic()
            _linger(store, size)
            assert (time.monotonic() - start >= 0.05) == waits


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
import os, signal, sys
from ase_uq import cli
from ase_uq.communicator import Distributed
sums, calls = Distributed.sum, []
def killed(*arguments):
    calls.append(1)
    if len(calls) == 6:  # the frames were checked, and the first statistics are there
        os.kill(os.getpid(), signal.SIGKILL)
    return sums(*arguments)
Distributed.sum = killed
cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_in_the_midst_ends_the_others_with_a_message(launched, words, tmp_path, killed):
    """Also the one that keeps what the ranks tell each other by."""
    words = ["fit", *words, "--out", "two.uq.safetensors"]
    commands = [["ase-uq", *words], ["python", "-c", DYING, *words]]
    done = launched(*(commands if killed else commands[::-1]))
    code, said, told = done[1 - killed]
    assert (code, said) == (1, "")
    assert told.startswith("error: another rank has ended, or answers no more, so nothing can be summed over all of")
    assert len(told.splitlines()) == 1
    assert done[killed][1:] == ("", "the process died\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibration.xyz", "train.xyz"]
