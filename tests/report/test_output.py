"""That a page and its pictures appear together or not at all, and that nobody else's file is touched."""

import resource
import signal
from contextlib import contextmanager

import matplotlib as mpl
import pytest

mpl.use("Agg")

from matplotlib import pyplot as plt

from ase_uq.errors import ArtefactError
from ase_uq.report.output import PICTURE_METADATA, check_outputs, publish


def picture(path, **settings) -> bytes:
    figure = plt.figure(figsize=(1, 1))
    figure.savefig(path, **settings)
    plt.close(figure)
    return path.read_bytes()


@pytest.fixture
def ours(tmp_path) -> bytes:
    path = tmp_path / "picture.png"
    data = picture(path, metadata=PICTURE_METADATA)
    path.unlink()
    return data


@contextmanager
def no_room_beyond(n_bytes: int):
    """What a full disk does, without filling one: no file may become larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_pictures_of_the_earlier_report_go_and_other_files_stay(tmp_path, ours):
    page, folder = tmp_path / "e.html", tmp_path / "e_figures"
    publish(page, "one", folder, {"uncertainty.png": ours, "errors.png": ours, "frame_169.png": ours})
    (folder / "notes.txt").write_text("mine")
    (folder / "frame_169_copy.png").write_bytes(ours)
    assert publish(page, "two", folder, {"uncertainty.png": ours + b"2", "frame_0.png": ours}) == (
        folder / "uncertainty.png",
        folder / "frame_0.png",
    )
    assert page.read_text() == "two"
    assert names(folder) == {"uncertainty.png", "frame_0.png", "notes.txt", "frame_169_copy.png"}
    assert (folder / "uncertainty.png").read_bytes() == ours + b"2"


def test_a_picture_of_somebody_else_is_never_overwritten_or_removed(tmp_path, ours):
    page, folder = tmp_path / "e.html", tmp_path / "figures"
    folder.mkdir()
    theirs = picture(folder / "frame_7.png")
    with pytest.raises(FileExistsError, match=r"frame_7.png is not a picture that `ase-uq` wrote.*Move it"):
        check_outputs(page, folder)
    publish(page, "text", folder, {"frame_0.png": ours})
    assert (folder / "frame_7.png").read_bytes() == theirs


def test_nothing_is_made_by_the_check(tmp_path):
    check_outputs(tmp_path / "e.html", tmp_path / "a" / "b")
    assert names(tmp_path) == set()


@pytest.mark.parametrize(("text", "named"), [("x", "errors.png"), ("x" * 20000, "e.html")])
def test_a_full_disk_is_told_by_the_name_of_the_file_and_leaves_what_was_there(tmp_path, ours, text, named):
    page, folder = tmp_path / "e.html", tmp_path / "e_figures"
    publish(page, "before", folder, {"uncertainty.png": ours, "frame_1.png": ours})
    new = {"uncertainty.png": ours + b"2", "errors.png": ours * 100}
    with no_room_beyond(10000), pytest.raises(ArtefactError, match=rf"cannot write \S*{named}: .* has room\."):
        publish(page, text, folder, new)
    assert page.read_text() == "before"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"uncertainty.png": ours, "frame_1.png": ours}
    assert names(tmp_path) == {"e.html", "e_figures"}


def test_folders_that_were_made_go_again_where_the_writing_fails(tmp_path, ours):
    (tmp_path / "a").mkdir()
    with no_room_beyond(10000), pytest.raises(ArtefactError):
        publish(tmp_path / "e.html", "x", tmp_path / "a" / "b" / "c", {"errors.png": ours * 100})
    assert names(tmp_path) == {"a"}
    assert names(tmp_path / "a") == set()


def test_a_folder_in_which_nothing_can_be_made_is_refused_by_its_name(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("ase_uq.report.output.check_writable", lambda _: None)
    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(ArtefactError, match=r"cannot write \S*figures: Read-only file system"):
        publish(tmp_path / "e.html", "x", tmp_path / "figures", {})
