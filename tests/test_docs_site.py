"""The pages as a site: built without a warning, every link and anchor of it leads somewhere."""

from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

ROOT = Path(__file__).resolve().parents[1]


def test_the_site_is_built_without_a_warning(tmp_path: Path):
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path)))
    for page in (*(path.stem for path in (ROOT / "docs").glob("[!_]*.md")), "about", "changes", "benchmarks/results"):
        name = "index.html" if page == "index" else f"{page}/index.html"
        assert "<h1" in (tmp_path / name).read_text(encoding="utf-8"), page
    assert (tmp_path / "benchmarks/results/quality_acac.png").stat().st_size


def test_a_link_to_nowhere_is_told(tmp_path: Path):
    for source in ("mkdocs.yml", "README.md", "CHANGELOG.md"):
        (tmp_path / source).write_bytes((ROOT / source).read_bytes())
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    for source in (ROOT / "docs").iterdir():
        if source.is_file():
            (tmp_path / "docs" / source.name).write_bytes(source.read_bytes())
    with pytest.raises(Abort, match="in strict mode"):  # no results: the pages that show them lack their targets
        build(load_config(str(tmp_path / "mkdocs.yml"), site_dir=str(tmp_path / "site")))
