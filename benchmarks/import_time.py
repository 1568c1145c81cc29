"""What a name costs before it is used: the front door beside an eager import of all that the public names need.

    python benchmarks/import_time.py [--repeats 15] [--out NAME]

Every side is a fresh process. Machines are noisy, so the sides take turns: a ratio is the median over turns, its spread
the quartiles. The eager import loads every module that defines a public name, as `import ase_uq` did before. A first
turn, which fills the caches of the disk, is not counted. Writes NAME.md.
"""

import argparse
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

EAGER = """
import importlib, ase_uq
for name, home in ase_uq._HOMES.items():
    importlib.import_module(f"ase_uq.{home or name}")
"""
HELP = """
import sys
from ase_uq.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
"""
SIDES = {
    "python alone": "",
    "import ase_uq": "import ase_uq",
    "import ase_uq.cli": "import ase_uq.cli",
    "ase-uq --help": HELP,
    "eager import": EAGER,
}
COUNT = "\nimport sys; print(len(sys.modules), file=sys.stderr)"


def seconds(code: str) -> float:
    """Wall time of a process that runs this."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def n_modules(code: str) -> int:
    run = subprocess.run([sys.executable, "-c", code + COUNT], check=True, capture_output=True, text=True)
    return int(run.stderr.split()[-1])


def table(times: dict[str, np.ndarray], modules: dict[str, int], command: str) -> str:
    lines = [
        "# Time of an import\n\n"
        f"{os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}, load average "
        f"{os.getloadavg()[0]:.1f} at the end; `python {command}`\n",
        "| process | modules | median (s) | quartiles | eager import / this | quartiles |",
        "|---|---:|---:|---|---:|---|",
    ]
    for name, taken in times.items():
        low, middle, high = np.percentile(taken, [25, 50, 75])
        cells = [
            f"`{name}`" if "ase" in name else name,
            str(modules[name]),
            f"{middle:.3f}",
            f"{low:.3f} to {high:.3f}",
        ]
        low, middle, high = np.percentile(times["eager import"] / taken, [25, 50, 75])
        cells += [f"{middle:.1f}", f"{low:.1f} to {high:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in SIDES}
    for turn in tqdm(range(arguments.repeats + 1), desc="turns"):
        for name, code in SIDES.items():
            taken = seconds(code)
            if turn:
                times[name].append(taken)
    modules = {name: n_modules(code) for name, code in SIDES.items()}
    text = table({name: np.array(taken) for name, taken in times.items()}, modules, shlex.join(sys.argv))
    if arguments.out is not None:
        arguments.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
