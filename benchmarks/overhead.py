"""What uncertainties cost: the time of a full ASE step (energy, forces, stress) with and without them, as a ratio.

    python benchmarks/overhead.py [--device cpu|cuda] [--seconds 60] [--smallest 8] [--largest 512] [--out NAME]

Both sides of every ratio are timed in one run, step by step in turns, because machines are noisy: the ratio is the
median over pairs of neighbouring steps, its spread the quartiles. Potentials have the full published sizes and random
weights: MACE-MP medium (128x0e + 128x1o, 89 elements), orb-v3 direct and conservative. Beside them stands a MACE
committee of four, the way to force uncertainties without this package. Writes NAME.json and NAME.md.
"""

import argparse
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import Calculator
from tqdm import tqdm

from ase_uq import UncertainCalculator, fit
from ase_uq.combined import RESIDUAL

SIZES = {8: 1, 64: 2, 216: 3, 512: 4, 1000: 5, 1728: 6, 4096: 8}
POTENTIALS = ("MACE-MP medium size", "orb-v3 direct", "orb-v3 conservative")
METHODS = {"bll": ["bll"], "bll, pdrum, kernel and combined": ["bll", "pdrum", "kernel"]}


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


def with_uncertainties(plain: Calculator, methods: Sequence[str]) -> UncertainCalculator:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # made-up labels make the fit complain, rightly
        model = fit(plain, labelled(range(12)), labelled(range(100, 112)), methods=methods, progress=False)
    if model.combination is not None:
        # Everything is to be timed, whatever the made-up labels made of it.
        assert model.combination.ensemble is not None, "the networks were not kept"
        model.combination.weights = dict.fromkeys((*model.combination.view.others, RESIDUAL), 0.5)
    return UncertainCalculator(plain, model)


def step(atoms: Atoms, index: int) -> float:
    """Seconds of one step: atoms move, then energy, forces and stress are asked for."""
    atoms.positions[0, 0] += 1e-3 * (-1) ** index
    start = time.perf_counter()
    atoms.get_potential_energy()
    atoms.get_forces()
    atoms.get_stress()
    return time.perf_counter() - start


def pairs(first: Atoms, second: Atoms, seconds: float) -> Iterator[tuple[float, float]]:
    """Times of the two sides in turns, each going first every other time."""
    for index in range(2):
        step(first, index), step(second, index)
    end = time.perf_counter() + seconds
    index = 2
    while index < 8 or time.perf_counter() < end:
        if index % 2:
            a, b = step(first, index), step(second, index)
        else:
            b, a = step(second, index), step(first, index)
        yield a, b
        index += 1


def compare(plain: Calculator, other: Calculator, repeat: int, seconds: float) -> dict[str, float]:
    first, second = crystal(repeat), crystal(repeat)
    first.calc, second.calc = plain, other
    times = list(pairs(first, second, seconds))
    ratios = [b / a for a, b in times]
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return {
        "atoms": len(first),
        "plain_ms": 1e3 * statistics.median(a for a, _ in times),
        "ratio": float(middle),
        "ratio_25": float(low),
        "ratio_75": float(high),
        "pairs": len(times),
    }


def machine(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    return f"CPU, {torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}"


def table(results: dict) -> str:
    lines = [
        f"# Overhead of uncertainties\n\n{results['machine']}; `{results['command']}`\n",
        "| potential | with | atoms | plain step (ms) | with / plain | quartiles | pairs |",
        "|---|---|---:|---:|---:|---|---:|",
    ]
    lines += [
        f"| {row['potential']} | {row['with']} | {row['atoms']} | {row['plain_ms']:.1f} | {row['ratio']:.3f} | "
        f"{row['ratio_25']:.3f} to {row['ratio_75']:.3f} | {row['pairs']} |"
        for row in results["rows"]
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=60, help="least time a comparison")
    parser.add_argument("--smallest", type=int, default=8, help="smallest number of atoms")
    parser.add_argument("--largest", type=int, default=512, help="largest number of atoms")
    parser.add_argument("--potentials", nargs="+", choices=POTENTIALS, default=list(POTENTIALS))
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    out = arguments.out or Path(f"benchmarks/results/overhead_{arguments.device}")
    sizes = [repeat for atoms, repeat in SIZES.items() if arguments.smallest <= atoms <= arguments.largest]
    results = {"machine": machine(arguments.device), "command": " ".join(["python", *sys.argv]), "rows": []}
    jobs = [(name, methods, repeat) for name in arguments.potentials for methods in METHODS for repeat in sizes]
    # A committee's ratio does not depend on size; four times a long step is long.
    jobs += [("MACE-MP medium size", "4-member committee, stock calculator", repeat) for repeat in sizes if repeat <= 2]
    plain = certain = None
    current = None
    for name, methods, repeat in tqdm(jobs, unit="size"):
        if (name, methods) != current:
            current = (name, methods)
            plain = calculator(name, arguments.device)
            known = METHODS.get(methods)
            certain = with_uncertainties(plain, known) if known else mace_calculator(arguments.device, 4)
        assert plain is not None
        assert certain is not None
        try:
            row = compare(plain, certain, repeat, arguments.seconds)
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
