"""What every test may use."""

from pathlib import Path

import pytest
import torch

# The structures are small: more threads would wait for each other, and timings would depend on the machine.
torch.set_num_threads(2)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The labelled frames that lie beside the checkout; they are too large for the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.fail(f"the labelled test data are not there: put them in {folder}.", pytrace=False)
    return folder
