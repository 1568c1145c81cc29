"""The pages as a site: built without a warning, every link and anchor of it leads somewhere."""

import pydoc
import re
import shutil
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

import ase_uq
from ase_uq import available_methods

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site; a warning would have ended the test."""
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    return folder


def test_every_page_is_there(site: Path):
    docs = ROOT / "docs"
    written = [path.relative_to(docs).with_suffix("").as_posix() for path in docs.rglob("*.md")]
    for page in (*written, "about", "changes", "benchmarks/results/index"):
        folder = site / page.removesuffix("index") if page.endswith("index") else site / page
        assert "<h1" in (folder / "index.html").read_text(encoding="utf-8"), page
    assert (site / "benchmarks/results/far_field.png").stat().st_size


def test_the_reference_has_every_public_name_and_every_plugin(site: Path):
    reference = "".join(page.read_text(encoding="utf-8") for page in site.glob("api/*/index.html"))
    wanted = [f"{home}.{name}" if home else name for name, home in ase_uq._HOMES.items()]
    wanted += [f"methods.{name}" for name in available_methods()]
    wanted += [f"backends.{name}" for name in ("mace", "orb", "sevennet", "summed", "toy")]
    assert [name for name in wanted if f'id="ase_uq.{name}' not in reference] == []


def test_names_in_the_pages_can_be_imported():
    pages = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    names = {name for page in pages for name in re.findall(r"`(ase_uq(?:\.\w+)+)\b", page.read_text(encoding="utf-8"))}
    assert "ase_uq.report.page.write_report" in names
    assert [name for name in names if pydoc.locate(name) is None] == []


def test_a_link_to_nowhere_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for source in ("mkdocs.yml", "README.md", "CHANGELOG.md"):
        shutil.copy(ROOT / source, tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("api"))
    (tmp_path / "benchmarks/results").mkdir(parents=True)  # no results: the pages that show them lack their targets
    with pytest.raises(Abort, match="in strict mode"):
        build(load_config(str(tmp_path / "mkdocs.yml"), site_dir=str(tmp_path / "site")))
    assert any("'benchmarks/results/far_field.md'" in message for message in caplog.messages)
