"""TorchSim (torch-sim-atomistic 0.6): the same potential and uncertainty model in its batched dynamics.

    import torch_sim as ts
    from ase_uq.engines.torchsim import ReplicaMonitor, UncertainModel

    model = UncertainModel("mace:my.model", "my.uq.safetensors")
    monitor = ReplicaMonitor(model, halt=0.5, flag=0.3, frames="flagged.xyz")
    state = monitor.integrate(
        frames, integrator=ts.Integrator.nvt_langevin, n_steps=10_000, temperature=600, timestep=0.0005
    )
    print([replica.reason for replica in monitor.replicas if replica.halted])

Importing this package imports torch_sim, which creates a folder `.torchsim` in the user's home.
"""

from ase_uq.errors import MissingDependency

try:
    import torch_sim  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingDependency(
        f"ase_uq.engines.torchsim needs TorchSim, and {error.name} is not installed. Run: "
        'pip install "ase-uq[torchsim]"'
    ) from error

from ase_uq.engines.torchsim.model import UncertainModel
from ase_uq.engines.torchsim.replicas import Replica, ReplicaMonitor

__all__ = ["Replica", "ReplicaMonitor", "UncertainModel"]
