"""What uncertainties cost: the time of a full ASE step (energy, forces, stress) with and without them, as a ratio.

    python benchmarks/overhead.py [--device cpu|cuda] [--seconds 60] [--smallest 8] [--largest 512] [--every N]
        [--out NAME]

All sides of every ratio are timed in one run, step by step in turns, because machines are noisy: the ratio is the
median over pairs of neighbouring steps, its spread the quartiles. With `--every N` a third side takes uncertainties
at every Nth step only; its ratios, to the potential alone and to uncertainties at each step, are of the time of N
steps in a row, one of which has them. What that saves is shown also for `ntk` on the MACE, whose backward passes are
dear. Potentials have the full published sizes and random
weights: MACE-MP medium (128x0e + 128x1o, 89 elements), orb-v3 direct and conservative. Beside them stands a MACE
committee of four, the way to force uncertainties without this package. Writes NAME.json and NAME.md.
"""

import argparse
import json
import platform
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import Calculator
from tqdm import tqdm

from ase_uq import UncertainCalculator, UncertaintyModel, fit
from ase_uq.fitting.combination import Earned, Likelihood

SIZES = {8: 1, 64: 2, 216: 3, 512: 4, 1000: 5, 1728: 6, 4096: 8}
POTENTIALS = ("MACE-MP medium size", "orb-v3 direct", "orb-v3 conservative")
METHODS = {"bll": ["bll"], "bll, pdrum, kernel and combined": ["bll", "pdrum", "kernel"]}
DEAR = {"ntk": ["ntk"]}
COMMITTEE = "4-member committee, stock calculator"


def crystal(repeat: int, seed: int = 0) -> Atoms:
    """Rattled rock salt of 8·repeat³ atoms."""
    atoms = bulk("NaCl", "rocksalt", a=5.64, cubic=True).repeat(repeat)
    atoms.rattle(0.1, seed=seed)
    return atoms


def mace_module(seed: int = 0) -> torch.nn.Module:
    """MACE with the architecture of MACE-MP-0 medium and random weights."""
    import mace.modules as modules
    from e3nn import o3

    torch.manual_seed(seed)
    elements = [*range(1, 84), *range(89, 95)]
    return modules.ScaleShiftMACE(
        r_max=6.0,
        num_bessel=10,
        num_polynomial_cutoff=5,
        max_ell=3,
        interaction_cls=modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
        interaction_cls_first=modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
        num_interactions=2,
        num_elements=len(elements),
        hidden_irreps=o3.Irreps("128x0e + 128x1o"),
        MLP_irreps=o3.Irreps("16x0e"),
        atomic_energies=np.zeros(len(elements)),
        avg_num_neighbors=61.0,
        atomic_numbers=elements,
        correlation=3,
        gate=torch.nn.functional.silu,
        atomic_inter_scale=0.8,
        atomic_inter_shift=0.1,
        radial_MLP=[64, 64, 64],
    )


def mace_calculator(device: str, members: int = 1) -> Calculator:
    from mace.calculators import MACECalculator

    models = [mace_module(seed) for seed in range(members)]
    return MACECalculator(models=models, device=device, default_dtype="float32")


def orb_calculator(kind: str, device: str) -> Calculator:
    from orb_models.forcefield import pretrained
    from orb_models.forcefield.forcefield_adapter import ForcefieldAtomsAdapter
    from orb_models.forcefield.inference.calculator import ORBCalculator

    torch.manual_seed(0)
    model = getattr(pretrained, f"orb_v3_{kind}_architecture")(device=device).eval()
    model.prepare_for_inference()
    for weight in model.parameters():
        weight.requires_grad_(False)
    return ORBCalculator(model, ForcefieldAtomsAdapter(radius=6.0, max_num_neighbors=120), device=device)


def calculator(name: str, device: str) -> Calculator:
    if name.startswith("MACE"):
        return mace_calculator(device)
    return orb_calculator(name.split()[-1], device)


def labelled(seeds: range) -> list[Atoms]:
    """Frames with made-up labels, the forces on one element far worse: that is learned, and so costs something."""
    frames = []
    for seed in seeds:
        atoms = crystal(2, seed)
        rng = np.random.default_rng(seed)
        atoms.info["REF_energy"] = float(rng.normal())
        atoms.arrays["REF_forces"] = rng.normal(size=(len(atoms), 3)) * np.where(atoms.numbers == 11, 0.1, 2.0)[:, None]
        frames.append(atoms)
    return frames


def fitted(plain: Calculator, methods: Sequence[str]) -> UncertaintyModel:
    """An uncertainty model with all corrections: everything is to be timed, whatever the made-up labels make of it."""
    with (
        warnings.catch_warnings(),
        patch("ase_uq.fitting.combination.earned", all_of_them),
        patch("ase_uq.fitting.energy_combination.earned", all_of_them),
    ):
        warnings.simplefilter("ignore")  # made-up labels make the fit complain, rightly
        return fit(plain, labelled(range(12)), labelled(range(100, 112)), methods=methods, progress=False)


def all_of_them(rows: Likelihood, tried: Mapping[str, Sequence[str]], frames: np.ndarray) -> Earned:
    """In place of what calibration frames support: every correction, by half."""
    names = max(tried.values(), key=len)
    return Earned(0.0, dict.fromkeys(names, 0.5), dict.fromkeys(tried, 0.0), np.zeros(1))


def step(atoms: Atoms, index: int) -> float:
    """Seconds of one step: atoms move, then energy, forces and stress are asked for."""
    # Never to where it was before: such a structure would be remembered.
    atoms.positions[0, 0] += 1e-3 * np.cos(index)
    start = time.perf_counter()
    atoms.get_potential_energy()
    atoms.get_forces()
    atoms.get_stress()
    return time.perf_counter() - start


def times_in_turns(sides: Sequence[Atoms], seconds: float, fewest: int) -> np.ndarray:
    """(n_steps, n_sides) seconds; the sides take turns in going first."""
    times = []
    end = time.perf_counter() + seconds
    while len(times) < 2 + fewest or time.perf_counter() < end:
        index = len(times)
        row = [0.0] * len(sides)
        for turn in range(len(sides)):
            side = (index + turn) % len(sides)
            row[side] = step(sides[side], index)
        times.append(row)
    return np.array(times[2:])  # the first ones warm up


def spread(name: str, ratios: np.ndarray) -> dict[str, float]:
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return {name: float(middle), f"{name}_25": float(low), f"{name}_75": float(high)}


def compare(calculators: Sequence[Calculator], repeat: int, seconds: float, every: int) -> dict[str, float]:
    """Times of the potential alone, with uncertainties, and if there is a third with them at every Nth step."""
    sides = [crystal(repeat) for _ in calculators]
    for atoms, calc in zip(sides, calculators, strict=True):
        atoms.calc = calc
    times = times_in_turns(sides, seconds, fewest=max(6, 4 * every))
    row = {"atoms": len(sides[0]), "plain_ms": 1e3 * float(np.median(times[:, 0])), "pairs": len(times)}
    row |= spread("ratio", times[:, 1] / times[:, 0])
    if len(sides) == 3:
        cycles = times[: len(times) // every * every].reshape(-1, every, 3).sum(1)
        row |= spread("every_ratio", cycles[:, 2] / cycles[:, 0]) | spread("saved", cycles[:, 2] / cycles[:, 1])
    return row


def machine(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    return f"CPU, {torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}"


def table(results: dict) -> str:
    every = results["every"]
    lines = [
        f"# Overhead of uncertainties\n\n{results['machine']}; `{results['command']}`\n",
        "| potential | with | atoms | plain step (ms) | with / plain | quartiles | pairs |",
        "|---|---|---:|---:|---:|---|---:|",
    ]
    if every > 1:
        lines[1] += f" 1 step in {every} / plain | quartiles | 1 step in {every} / each step | quartiles |"
        lines[2] += "---:|---|---:|---|"
    for row in results["rows"]:
        cells = [row["potential"], row["with"], row["atoms"], f"{row['plain_ms']:.1f}"]
        cells += [*ratio_cells(row, "ratio"), row["pairs"]]
        if every > 1:
            cells += [*ratio_cells(row, "every_ratio"), *ratio_cells(row, "saved")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def ratio_cells(row: dict, name: str) -> list[str]:
    """A ratio and its quartiles; empty where it was not measured."""
    if name not in row:
        return ["", ""]
    return [f"{row[name]:.3f}", f"{row[f'{name}_25']:.3f} to {row[f'{name}_75']:.3f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=60, help="least time a comparison")
    parser.add_argument("--smallest", type=int, default=8, help="smallest number of atoms")
    parser.add_argument("--largest", type=int, default=512, help="largest number of atoms")
    parser.add_argument("--potentials", nargs="+", choices=POTENTIALS, default=list(POTENTIALS))
    parser.add_argument("--every", type=int, default=1, help="also uncertainties at every Nth step only")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    out = arguments.out or Path(f"benchmarks/results/overhead_{arguments.device}")
    sizes = [repeat for atoms, repeat in SIZES.items() if arguments.smallest <= atoms <= arguments.largest]
    every, known = arguments.every, METHODS | DEAR
    results = {
        "machine": machine(arguments.device),
        "command": " ".join(["python", *sys.argv]),
        "every": every,
        "rows": [],
    }
    jobs = [(name, methods, repeat) for name in arguments.potentials for methods in METHODS for repeat in sizes]
    if every > 1 and POTENTIALS[0] in arguments.potentials:
        jobs += [(POTENTIALS[0], methods, repeat) for methods in DEAR for repeat in sizes]
    # A committee's ratio does not depend on size; four times a long step is long.
    jobs += [(POTENTIALS[0], COMMITTEE, repeat) for repeat in sizes if repeat <= 2]
    calculators: list[Calculator] = []
    current = None
    for name, methods, repeat in tqdm(jobs, unit="size"):
        if (name, methods) != current:
            current = (name, methods)
            plain = calculator(name, arguments.device)
            if methods == COMMITTEE:
                calculators = [plain, mace_calculator(arguments.device, 4)]
            else:
                model = fitted(plain, known[methods])
                steps = sorted({1, every})
                calculators = [plain, *(UncertainCalculator(plain, model, every=n) for n in steps)]
        try:
            row = compare(calculators, repeat, arguments.seconds, every)
        except torch.OutOfMemoryError:
            tqdm.write(f"{name}, {methods}: {8 * repeat**3} atoms do not fit")
            continue
        results["rows"].append({"potential": name, "with": methods, **row})
        tqdm.write(f"{name}, {methods}, {row['atoms']} atoms: {row['ratio']:.3f} ({row['plain_ms']:.0f} ms)")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        out.with_suffix(".md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
