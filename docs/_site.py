"""What the site has beside docs/: the README, the changelog and the measurements, under links that fit there."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

# Link targets of the repository → of the site.
_MOVED = (
    (re.compile(r"\]\((\.\./)?README\.md"), "](about.md"),
    (re.compile(r"\]\((\.\./)?CHANGELOG\.md"), "](changes.md"),
    (re.compile(r"\]\((\.\./)?benchmarks/results\)"), "](benchmarks/results/index.md)"),
    (re.compile(r"\]\(\.\./benchmarks/results/"), "](benchmarks/results/"),
    (re.compile(r"\]\(docs/"), "]("),
    # Files that are not pages are named only.
    (re.compile(r"\[([^\]]*)\]\((?:\.\./)?(?:LICENSE|examples/[^)]*|potentials/[^)]*)\)"), r"\1"),
)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages from outside of docs/."""
    root = Path(config.config_file_path).parent
    results = sorted((root / "benchmarks" / "results").iterdir())
    for name, path in (("about.md", root / "README.md"), ("changes.md", root / "CHANGELOG.md")):
        files.append(File.generated(config, name, abs_src_path=str(path)))
    for path in results:
        if path.suffix in (".md", ".png", ".csv", ".json"):
            files.append(File.generated(config, f"benchmarks/results/{path.name}", abs_src_path=str(path)))
    tables = (path for path in results if path.suffix == ".md")
    lines = [f"- [{path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}]({path.name})" for path in tables]
    index = "# Measurements\n\nEach with the command that printed it.\n\n" + "\n".join(lines) + "\n"
    files.append(File.generated(config, "benchmarks/results/index.md", content=index))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turns links out of docs/ into links of the site."""
    for pattern, replacement in _MOVED:
        markdown = pattern.sub(replacement, markdown)
    return markdown
