"""What the tests of the backends share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def trained_models() -> Path:
    """The trained MACE models that lie beside the checkout; they are too large for the repository."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "models"
    if not folder.is_dir():
        pytest.fail(f"the trained test models are not there: put them in {folder}.", pytrace=False)
    return folder
