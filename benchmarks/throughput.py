"""Frames per second of a finished trajectory: scored, beside what one could do without uncertainties.

    python benchmarks/throughput.py [--device cpu|cuda] [--potential embedded|full] [--rounds 5] [--seconds 20]
        [--threads N] [--workers N] [--out NAME]

Five ways through the same file, in turns in one run because machines are noisy; each round gives a rate of every way,
and ratios are medians over rounds, with quartiles:

(a) `loop`: ASE's loop, a frame read, handed to the potential's own calculator and written at a time, no uncertainties.
(b) `forward`: the potential's own batched forward (neighbour lists, energy, forces, stress, numbers on the host) of
    frames that are in memory already, with nothing read, written or known about the errors; batches as in (c).
(b+) `uncertain`: the same with uncertainties: what is between this and (c) is what reading and writing cost.
(c) `score`: ase_uq.score, from the file to a file, with uncertainties; parsing and neighbour lists in worker processes
    with --workers, whose start is part of the time.
(d) `static`: TorchSim's static runner with the same MACE, of frames in memory, where it is installed.

`embedded` is the package's own small MACE on its molecule, and on a box of 24 of them. `full` is a MACE of the size of
MACE-MP medium with random weights on the molecule and on 216 atoms of rock salt; its uncertainty model is fitted to
made-up labels. Prints a table; with --out also writes NAME.json and NAME.md.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.io import iread, read, write
from overhead import crystal, fitted, mace_calculator, machine, spread
from tqdm import tqdm

from ase_uq import Predictor, UncertaintyModel, embedded, load_backend
from ase_uq.io.frames import write_frames
from ase_uq.io.results import annotated
from ase_uq.scoring.score import score
from ase_uq.stream.limits import default_batch_atoms

WAYS = ("loop", "forward", "uncertain", "score", "static")


def molecules() -> list[Atoms]:
    frames = read(embedded.path("test_300K.xyz"), ":")
    for atoms in frames:
        atoms.calc = None
    return frames


def box(seed: int) -> Atoms:
    """24 molecules on a grid in a periodic box."""
    rng, frames = np.random.default_rng(seed), molecules()
    atoms = Atoms(cell=[14.0, 21.0, 28.0], pbc=True)
    for place in np.ndindex(2, 3, 4):
        one = frames[rng.integers(len(frames))].copy()
        one.positions += 7.0 * np.array(place) - one.positions.mean(0)
        atoms += one
    return atoms


def potential(name: str, device: str) -> Predictor:
    if name == "embedded":
        model = UncertaintyModel.load(embedded.path("mace.uq.safetensors"))
        return Predictor(load_backend("embedded:mace", device=device), model)
    calculator = mace_calculator(device)
    return Predictor(load_backend(calculator), fitted(calculator, ["bll", "pdrum", "kernel"]))


def trajectories(name: str) -> dict[str, list[Atoms]]:
    small = molecules()
    if name == "embedded":
        return {"molecule": small, "box of 24 molecules": [box(seed) for seed in range(20)]}
    return {"small crystal": [crystal(1, s) for s in range(40)], "crystal": [crystal(3, s) for s in range(4)]}


def batched(frames: Sequence[Atoms], most: int) -> list[list[Atoms]]:
    size = max(1, most // len(frames[0]))
    return [list(frames[i : i + size]) for i in range(0, len(frames), size)]


def ways(
    predictor: Predictor, frames: list[Atoms], folder: Path, batch_atoms: int, workers: int | None
) -> dict[str, Callable[[], None]]:
    source = folder / "in.xyz"
    write(source, frames)

    def loop() -> None:
        for number, atoms in enumerate(iread(source, ":")):
            atoms.calc = predictor.backend.calculator
            atoms.get_forces()
            write_frames(folder / "loop.xyz", [annotated(atoms)], append=number > 0)

    def forward(uncertainties: bool = False) -> None:
        for batch in batched(frames, batch_atoms):
            predictor.predict(batch, uncertainties=uncertainties)

    def scored() -> None:
        options: Any = {"overwrite": True, "progress": False, "batch_atoms": batch_atoms, "workers": workers}
        score(source, predictor, out=folder / "out.xyz", **options)

    found: dict[str, Callable[[], None]] = {
        "loop": loop,
        "forward": forward,
        "uncertain": partial(forward, uncertainties=True),
        "score": scored,
    }
    static = torchsim(predictor, frames, batch_atoms)
    return found if static is None else found | {"static": static}


def torchsim(predictor: Predictor, frames: list[Atoms], batch_atoms: int) -> Callable[[], None] | None:
    try:
        import torch_sim
        from torch_sim.models.mace import MaceModel
    except ImportError:
        return None
    calculator: Any = predictor.backend.calculator
    model = MaceModel(
        model=calculator.models[0],
        device=predictor.backend.device,
        dtype=predictor.backend.dtype,
        compute_forces=True,
        compute_stress=True,
    )

    def static() -> None:
        for batch in batched(frames, batch_atoms):
            torch_sim.static(batch, model)

    return static


def rates(runs: dict[str, Callable[[], None]], n_frames: int, rounds: int, seconds: float) -> dict[str, np.ndarray]:
    """(n_rounds,) frames/s of every way, in turns; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    count = 0
    while count < rounds + 1 or time.perf_counter() < end:
        names = list(runs)
        for name in names[count % len(names) :] + names[: count % len(names)]:
            start = time.perf_counter()
            runs[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
        count += 1
    return {name: n_frames / np.array(found[1:]) for name, found in times.items()}


def table(results: dict) -> str:
    lines = [
        f"# Throughput on finished trajectories\n\n{results['machine']}; `python {results['command']}`\n",
        "| potential | frames | atoms | loop (frames/s) | forward | uncertain | score | static | score / loop "
        "| score / forward | score / uncertain | score / static |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in results["rows"]:
        cells = [row["potential"], row["frames"], row["atoms"]]
        cells += [f"{row[way]:.1f}" if way in row else "" for way in WAYS]
        for way in ("loop", "forward", "uncertain", "static"):
            key = f"score/{way}"
            cells.append(f"{row[key]:.2f} ({row[f'{key}_25']:.2f} to {row[f'{key}_75']:.2f})" if key in row else "")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--potential", nargs="+", choices=("embedded", "full"), default=["embedded", "full"])
    parser.add_argument("--rounds", type=int, default=5, help="fewest rounds")
    parser.add_argument("--seconds", type=float, default=20, help="least time a trajectory")
    parser.add_argument("--batch-atoms", type=int, default=None)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the potential, on a CPU")
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--repeat", type=int, default=1, help="longer trajectories, for fast devices")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    most = arguments.batch_atoms or default_batch_atoms(arguments.device.partition(":")[0])
    results: dict = {"machine": machine(arguments.device), "command": shlex.join(sys.argv), "rows": []}
    for name in arguments.potential:
        predictor = potential(name, arguments.device)
        for title, frames in tqdm(trajectories(name).items(), desc=name):
            frames = frames * arguments.repeat
            with tempfile.TemporaryDirectory() as folder:
                runs = ways(predictor, frames, Path(folder), most, arguments.workers)
                found = rates(runs, len(frames), arguments.rounds, arguments.seconds)
            row = {"potential": name, "frames": title, "atoms": len(frames[0])}
            row |= {way: float(np.median(values)) for way, values in found.items()}
            for way in found.keys() - {"score"}:
                row |= spread(f"score/{way}", found["score"] / found[way])
            results["rows"].append(row)
            if arguments.out is not None:
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                arguments.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
                arguments.out.with_suffix(".md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
