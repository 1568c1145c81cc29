# /// script
# requires-python = ">=3.12"
# dependencies = ["ase-uq[mace]"]
# ///
"""Molecular dynamics that stops where its potential no longer knows, and goes on when told to. Takes half a minute."""

# %% A potential that has only seen 300 K, with its uncertainty model
import numpy as np
from ase import Atoms, units
from ase.io import read
from ase.md.langevin import Langevin

from ase_uq import Quantile, UncertainCalculator, UncertaintyHalt, UncertaintyMonitor, embedded

frame = read(embedded.path("malonaldehyde.xyz"))
atoms = Atoms(frame.numbers, frame.positions)
atoms.calc = UncertainCalculator("embedded:mace", embedded.path("mace.uq.safetensors"))
print(f"99 % of the calibration frames stay below {atoms.calc.threshold(Quantile(0.99)):.3f} eV/Å")

# %% Far too hot for this potential: flagged frames are saved, and the run halts at 0.3 eV/Å
rng = np.random.default_rng(0)
dyn = Langevin(atoms, 0.5 * units.fs, temperature_K=1500, friction=0.05 / units.fs, fixcm=False, rng=rng)
monitor = UncertaintyMonitor(dyn, flag=Quantile(0.99), halt=0.3, frames="flagged.xyz")
dyn.attach(monitor)
try:
    dyn.run(2000)
except UncertaintyHalt as stop:
    print(stop)
print(f"{monitor.n_flagged} frames are in flagged.xyz, to be labelled")

# %% The step at which it halted is complete. With a cold thermostat the run goes on, halting until it has cooled down
dyn.set_temperature(temperature_K=300)
for halts in range(500):
    try:
        dyn.run(50)
        print(f"halted {halts} times more, then 50 quiet steps, up to {dyn.get_time() / units.fs:.1f} fs")
        break
    except UncertaintyHalt:
        continue
