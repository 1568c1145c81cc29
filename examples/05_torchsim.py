# /// script
# requires-python = ">=3.12"
# dependencies = ["ase-uq[mace,torchsim]"]
# ///
"""Four replicas in one batch of TorchSim, each hotter than the last, each halted on its own. Takes some seconds."""

# %% The same potential and the same uncertainty model as in ASE
import torch_sim as ts
from ase import Atoms
from ase.io import read

from ase_uq import Quantile, embedded
from ase_uq.engines.torchsim import ReplicaMonitor, UncertainModel

model = UncertainModel("embedded:mace", embedded.path("mace.uq.safetensors"))
frame = read(embedded.path("malonaldehyde.xyz"))
kelvin = [300, 900, 1300, 1700]
state = ts.initialize_state([Atoms(frame.numbers, frame.positions) for _ in kelvin], model.device, model.dtype)
state.rng = 0

# %% A replica is halted at 0.3 eV/Å; the others go on, and the batch costs less without it
monitor = ReplicaMonitor(model, flag=Quantile(0.99), halt=0.3, frames="flagged.xyz")
final = monitor.integrate(
    state, integrator=ts.Integrator.nvt_langevin, n_steps=100, temperature=kelvin, timestep=0.0005, gamma=5.0
)

print("replica  temperature (K)  time (fs)  flagged  end")
for temperature, replica in zip(kelvin, monitor.replicas, strict=True):
    end = f"halted at {replica.reading:.2f} eV/Å" if replica.halted else "went on"
    print(f"{replica.number:7d}  {temperature:15d}  {replica.time_fs:9.1f}  {replica.n_flagged:7d}  {end}")
print(f"{sum(r.n_flagged + r.halted for r in monitor.replicas)} frames are in flagged.xyz, to be labelled")

# %% In a relaxation, too, each replica halts on its own. Here the replicas that were not halted find their minimum
going_on = final[[replica.number for replica in monitor.replicas if not replica.halted]]
relaxation = ReplicaMonitor(model, halt=0.3)
relaxed = relaxation.optimize(
    going_on, optimizer=ts.Optimizer.fire, convergence_fn=ts.generate_force_convergence_fn(0.1), max_steps=500
)
for replica, force in zip(relaxation.replicas, ts.system_wise_max_force(relaxed).tolist(), strict=True):
    print(f"{replica.formula}: {'halted' if replica.halted else 'relaxed'} at step {replica.step}, {force:.3f} eV/Å")
