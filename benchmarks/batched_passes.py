"""Whether batched backward passes (`is_grads_batched` of torch) make the forces of members cheaper.

    python benchmarks/batched_passes.py [--device cpu|cuda] [--seconds 20] [--members 4 16] [--largest 64] [--out NAME]

Potentials and frames are those of benchmarks/overhead.py. Both ways take turns in one run, on the graph of one forward
pass, and must give the same forces. Writes OUT.md.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from overhead import POTENTIALS, SIZES, calculator, crystal, machine
from torch import Tensor
from tqdm import tqdm

from ase_uq.backends import load_backend

CONSERVATIVE = [name for name in POTENTIALS if "direct" not in name]


def batched(gradients: Any, weights: Tensor) -> Tensor:
    """`of_energy_layer(weights).forces`, from one batched pass."""
    layer, inputs = gradients._energy_features, [gradients._positions, gradients._strain]
    cotangents = weights.T[:, None, :].expand(-1, *layer.shape)
    by_position, _ = torch.autograd.grad(layer, inputs, cotangents, retain_graph=True, is_grads_batched=True)
    return -by_position.permute(1, 2, 0)


def row_of(name: str, repeat: int, members: int, arguments: argparse.Namespace) -> str:
    backend, atoms = load_backend(calculator(name, arguments.device)), crystal(repeat)
    forward_pass = backend.forward(backend.collate([atoms]), gradients=True)
    gradients, layer = forward_pass.gradients, forward_pass.energy_layer.features
    assert gradients is not None
    weights = torch.randn(layer.shape[1], members, generator=torch.Generator().manual_seed(0)).to(layer)
    one, other = gradients.of_energy_layer(weights).forces, batched(gradients, weights)  # also the first, slow, time
    deviation, times, start = float((one - other).abs().max() / one.abs().max()), [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < arguments.seconds:
        pair = []
        for way in (lambda: gradients.of_energy_layer(weights), lambda: batched(gradients, weights)):
            began = time.perf_counter()
            way()
            if arguments.device == "cuda":
                torch.cuda.synchronize()
            pair.append(time.perf_counter() - began)
        times.append(pair)
    seconds = np.array(times)
    low, middle, high = np.quantile(seconds[:, 1] / seconds[:, 0], [0.25, 0.5, 0.75])
    cells = [name, str(len(atoms)), str(members), f"{1e3 * np.median(seconds[:, 0]):.0f}"]
    return f"| {' | '.join(cells)} | {middle:.2f} ({low:.2f} to {high:.2f}) | {deviation:.0e} | {len(times)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=20, help="least time a row")
    parser.add_argument("--members", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--largest", type=int, default=64, help="largest number of atoms")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    out = arguments.out or Path(f"benchmarks/results/batched_passes_{arguments.device}")
    lines = [
        "# Batched backward passes",
        "",
        f"{machine(arguments.device)}; `{' '.join(['python', *sys.argv])}`",
        "",
        "Time of one batched backward pass over that of as many single ones, median and quartiles, and the largest",
        "difference of their forces over the largest force.",
        "",
        "| potential | atoms | members | single passes (ms) | batched / single | difference | times |",
        "|---|---:|---:|---:|---|---:|---:|",
    ]
    sizes = [repeat for atoms, repeat in SIZES.items() if atoms <= arguments.largest]
    rows = [(name, repeat, members) for name in CONSERVATIVE for repeat in sizes for members in arguments.members]
    out.parent.mkdir(parents=True, exist_ok=True)
    for name, repeat, members in tqdm(rows, unit="row"):
        lines.append(row_of(name, repeat, members, arguments))
        out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
