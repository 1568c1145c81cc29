"""What every test may use."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from ase_uq import metrics

from . import preloaded

# What is made while tests are collected stays until the end: to look through it for garbage takes a third of that time.
gc.disable()

# The structures are small: threads would wait for each other, on a busy machine for longer than they work. The
# variable is for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# Where a test does not say how many cases it needs. A busy machine is slow, not wrong: there is no deadline.
hypothesis.settings.register_profile("suite", max_examples=30, deadline=None)
hypothesis.settings.load_profile("suite")


# Begun last, they would keep one process busy while the others have nothing left to do.
_LONGEST = (
    "test_readme.py",
    "test_mace.py",
    "test_orb.py",
    "test_sevennet.py",
    "test_examples.py",
    "test_everywhere.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first: make test hands out file after file to several processes."""
    items.sort(key=lambda item: item.path.name not in _LONGEST)


def pytest_collection_finish() -> None:
    if "mace" in sys.modules:
        preloaded.keep_tables()
        preloaded.leave_uncompiled()
    gc.freeze()
    gc.enable()


_SERVER = pytest.StashKey[preloaded.Server]()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Several workers share one process with the packages."""
    if _SERVER not in node.config.stash:
        node.config.stash[_SERVER] = server = preloaded.Server()
        node.config.add_cleanup(server.close)
    node.workerinput["preloaded"] = str(node.config.stash[_SERVER].bin)


@pytest.fixture(scope="session")
def preloaded_bin(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder for the PATH: its `python` and `ase-uq` run in forks of a process that has the packages imported."""
    if hasattr(request.config, "workerinput"):
        yield Path(request.config.workerinput["preloaded"])
        return
    server = preloaded.Server()
    yield server.bin
    server.close()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress bars are shown, as if stderr were a terminal."""
    from tqdm import tqdm

    def bar(frames, *, disable, **options):
        return tqdm(frames, disable=bool(disable), **options)

    monkeypatch.setattr("ase_uq.display.progress.tqdm", bar)


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals of scores are from few resamples, for tests that do not look at them."""
    monkeypatch.setattr(metrics, "bootstrap", preloaded.with_few_resamples(metrics.bootstrap))


@pytest.fixture
def blank_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of a report are of one pixel: to draw them takes most of its time."""
    from matplotlib.figure import Figure
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    def save(_, target, *, metadata=None, **__) -> None:
        texts = PngInfo()
        for name, text in (metadata or {}).items():
            texts.add_text(name, text)
        Image.new("RGBA", (1, 1)).save(target, "png", pnginfo=texts)

    monkeypatch.setattr(Figure, "savefig", save)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The labelled frames that lie beside the checkout; they are too large for the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.fail(f"the labelled test data are not there: put them in {folder}.", pytrace=False)
    return folder
