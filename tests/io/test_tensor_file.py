"""Files that appear whole or not at all, and tell when they are not what they were."""

import errno
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ase_uq.errors import ArtefactError
from ase_uq.io import tensor_file as artefact
from ase_uq.io.files import check_writable
from ase_uq.io.tensor_file import read_tensor_file, write_tensor_file

KIND = "test file"
HEADER = {"name": "σ", "counts": {"6": 3}, "list": [1, 2.5, None, True]}
TENSORS = {
    "double": torch.arange(6, dtype=torch.float64).reshape(2, 3) / 7,
    "single": torch.tensor(0.1),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "truth": torch.tensor([True, False]),
    "empty": torch.zeros(0, 3),
    "turned": torch.arange(6.0).reshape(2, 3).T,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    written = tmp_path / "a.safetensors"
    write_tensor_file(written, KIND, 3, HEADER, TENSORS)
    return written


def test_header_and_tensors_come_back_bit_for_bit(path: Path):
    header, tensors = read_tensor_file(path, KIND, 3)
    assert header == HEADER
    assert list(header) == list(HEADER)
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name


def test_tensors_lie_where_torch_would_put_them(path: Path):
    """In the file they begin at any multiple of 8; products with one that does are summed in another order."""
    tensors = read_tensor_file(path, KIND, 3)[1].values()
    assert {tensor.data_ptr() % 64 for tensor in tensors} == {0}


@pytest.mark.parametrize("change", ["truncate", "overwrite"])
def test_a_file_that_changes_changes_nothing_that_was_read(path: Path, monkeypatch: pytest.MonkeyPatch, change: str):
    """`cp new old` writes into the same file; a mapped one would change in silence, or end the process."""
    size, load = path.stat().st_size, artefact.load

    def changed() -> None:
        with open(path, "r+b") as file:
            file.write(b"\xff" * size)
            file.truncate(0 if change == "truncate" else size)

    def load_after_change(content: bytes) -> dict[str, torch.Tensor]:
        changed()
        return load(content)

    monkeypatch.setattr(artefact, "load", load_after_change)
    header, tensors = read_tensor_file(path, KIND, 3)
    changed()
    assert header == HEADER
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize("text", ["[]", "3", "{", "[" * 100_000, None, 3])
def test_a_header_that_is_no_object_is_refused(tmp_path: Path, text: Any):
    envelope = {"kind": KIND, "schema": 1, "digest": artefact._digest(KIND, 1, text, {}), "header": text}
    save_file({}, tmp_path / "b", metadata={"ase_uq": json.dumps(envelope)})
    with pytest.raises(ArtefactError, match=r"has a header that is not a JSON object\. Make the file again"):
        read_tensor_file(tmp_path / "b", KIND, 1)


def test_bits_that_are_no_numbers_come_back(tmp_path: Path):
    special = torch.tensor([float("nan"), float("inf"), -0.0, 5e-324], dtype=torch.float64)
    write_tensor_file(tmp_path / "b", KIND, 1, {}, {"x": special})
    _, tensors = read_tensor_file(tmp_path / "b", KIND, 1)
    assert tensors["x"].numpy().tobytes() == special.numpy().tobytes()


def test_the_same_content_gives_the_same_file(path: Path, tmp_path: Path):
    write_tensor_file(tmp_path / "b", KIND, 3, HEADER, dict(reversed(TENSORS.items())))
    assert (tmp_path / "b").read_bytes() == path.read_bytes()


def test_nothing_but_the_file_is_left(path: Path):
    assert os.listdir(path.parent) == [path.name]


def test_an_existing_file_is_replaced(path: Path):
    write_tensor_file(path, KIND, 3, {"new": 1}, {})
    assert read_tensor_file(path, KIND, 3) == ({"new": 1}, {})
    assert os.listdir(path.parent) == [path.name]


def test_an_older_layout_is_read(path: Path):
    assert read_tensor_file(path, KIND, 4)[0] == HEADER


def test_the_file_obeys_the_umask(tmp_path: Path):
    before = os.umask(0o027)
    try:
        write_tensor_file(tmp_path / "b", KIND, 1, {}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o640


class TestNoCode:
    def test_the_file_starts_with_a_safetensors_header(self, path: Path):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        names = json.loads(data[8 : 8 + length])
        assert set(names) == {"__metadata__", *TENSORS}
        assert b"\x80\x04" not in data[: 8 + length]

    def test_reading_never_unpickles(self, path: Path, monkeypatch: pytest.MonkeyPatch):
        def forbidden(*_: Any, **__: Any):
            raise AssertionError("something was unpickled")

        for owner, name in ((pickle, "Unpickler"), (pickle, "load"), (pickle, "loads"), (torch, "load")):
            monkeypatch.setattr(owner, name, forbidden)
        read_tensor_file(path, KIND, 3)


class TestRefusals:
    def test_a_missing_file(self, tmp_path: Path):
        with pytest.raises(ArtefactError, match=r"there is no file .*missing\.safetensors"):
            read_tensor_file(tmp_path / "missing.safetensors", KIND, 1)

    def test_a_folder(self, tmp_path: Path):
        with pytest.raises(ArtefactError, match="there is no file"):
            read_tensor_file(tmp_path, KIND, 1)

    def test_another_kind(self, path: Path):
        with pytest.raises(ArtefactError, match=r"is an ase_uq test file; an ase_uq potential was expected"):
            read_tensor_file(path, "potential", 3)

    def test_a_newer_layout(self, path: Path):
        with pytest.raises(ArtefactError, match=r"newer ase_uq: its test file layout is version 3, .* up to 2\."):
            read_tensor_file(path, KIND, 2)

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
    def test_a_truncated_file(self, path: Path, share: float):
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(ArtefactError, match=r"cannot be read as safetensors .* truncated, damaged"):
            read_tensor_file(path, KIND, 3)

    def test_a_file_with_a_tail(self, path: Path):
        path.write_bytes(path.read_bytes() + b"\0")
        with pytest.raises(ArtefactError, match="cannot be read as safetensors"):
            read_tensor_file(path, KIND, 3)

    def test_any_flipped_bit(self, path: Path):
        data = path.read_bytes()
        random = np.random.default_rng(0)
        for offset in [*range(12), *random.integers(0, len(data), 150)]:
            flipped = bytearray(data)
            flipped[offset] ^= 1 << int(random.integers(8))
            path.write_bytes(flipped)
            with pytest.raises(ArtefactError):  # which of the messages depends on the bit
                read_tensor_file(path, KIND, 3)

    def test_altered_numbers(self, path: Path):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        with pytest.raises(ArtefactError, match=r"was altered after it was written: .* digest in its header"):
            read_tensor_file(path, KIND, 3)

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            (b"", "cannot be read as safetensors"),
            (b"just some text, longer than eight bytes", "cannot be read as safetensors"),
            (pickle.dumps({"a": np.ones(10)}), "cannot be read as safetensors"),
            (b"\0" * 1000, "cannot be read as safetensors"),
        ],
    )
    def test_another_format(self, tmp_path: Path, content: bytes, match: str):
        (tmp_path / "b").write_bytes(content)
        with pytest.raises(ArtefactError, match=f"{match}.*An ase_uq test file was expected"):
            read_tensor_file(tmp_path / "b", KIND, 1)

    @pytest.mark.parametrize(
        "metadata",
        [
            None,
            {"format": "pt"},
            {"ase_uq": "{"},
            {"ase_uq": "[]"},
            {"ase_uq": "3"},
            {"ase_uq": '{"kind": "test file"}'},
        ],
    )
    def test_somebody_elses_safetensors(self, tmp_path: Path, metadata: dict[str, str] | None):
        save_file({"x": torch.ones(2)}, tmp_path / "b", metadata=metadata)
        with pytest.raises(ArtefactError, match=r"an ase_uq test file was expected"):
            read_tensor_file(tmp_path / "b", KIND, 1)

    def test_a_schema_that_is_no_number(self, tmp_path: Path):
        envelope = {"kind": KIND, "schema": "new", "digest": "", "header": "{}"}
        save_file({"x": torch.ones(2)}, tmp_path / "b", metadata={"ase_uq": json.dumps(envelope)})
        with pytest.raises(ArtefactError, match=r"an ase_uq test file was expected"):
            read_tensor_file(tmp_path / "b", KIND, 1)


def _full_disk(*_: Any, **__: Any):
    raise OSError(errno.ENOSPC, "No space left on device")


class TestWriting:
    @pytest.mark.parametrize("write", [lambda path: write_tensor_file(path, KIND, 1, {}, {}), check_writable])
    def test_a_missing_folder_is_refused(self, tmp_path: Path, write: Callable[[Path], None]):
        with pytest.raises(ArtefactError, match=r"a\.safetensors: No such file or directory\. Choose a folder that ex"):
            write(tmp_path / "missing" / "a.safetensors")
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("write", [lambda path: write_tensor_file(path, KIND, 1, {}, {}), check_writable])
    def test_a_file_for_a_folder_is_refused(self, tmp_path: Path, write: Callable[[Path], None]):
        (tmp_path / "file").write_text("")
        with pytest.raises(ArtefactError, match="cannot write"):
            write(tmp_path / "file" / "a.safetensors")

    @pytest.mark.parametrize("write", [lambda path: write_tensor_file(path, KIND, 1, {}, {}), check_writable])
    def test_a_folder_without_permission_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
    ):
        def denied(*_: Any, **__: Any):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(artefact.tempfile, "mkstemp", denied)
        monkeypatch.setattr(artefact.tempfile, "NamedTemporaryFile", denied)
        with pytest.raises(ArtefactError, match=r"Permission denied.* is writable and has room"):
            write(tmp_path / "a.safetensors")

    @pytest.mark.parametrize("step", ["save_file", "os.replace"])
    def test_a_full_disk_leaves_the_old_file_and_nothing_else(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, step: str
    ):
        before = path.read_bytes()
        monkeypatch.setattr(f"ase_uq.io.tensor_file.{step}", _full_disk)
        with pytest.raises(ArtefactError, match="No space left on device"):
            write_tensor_file(path, KIND, 3, {"new": 1}, TENSORS)
        assert os.listdir(path.parent) == [path.name]
        assert path.read_bytes() == before

    def test_an_interrupt_leaves_nothing_behind(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        def interrupted(*_: Any, **__: Any):
            raise KeyboardInterrupt

        monkeypatch.setattr("ase_uq.io.tensor_file.save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_tensor_file(tmp_path / "a", KIND, 1, {}, {})
        assert os.listdir(tmp_path) == []

    def test_a_folder_of_that_name_is_refused(self, tmp_path: Path):
        (tmp_path / "a").mkdir()
        for write in (lambda path: write_tensor_file(path, KIND, 1, {}, {}), check_writable):
            with pytest.raises(ArtefactError, match=r"cannot write .*/a: it is a folder\. Give the name of a file\.$"):
                write(tmp_path / "a")
        assert os.listdir(tmp_path) == ["a"]

    def test_asking_leaves_no_trace(self, tmp_path: Path):
        check_writable(tmp_path / "a")
        assert os.listdir(tmp_path) == []
