"""TorchSim: the same potential and uncertainty model in its batched dynamics. Importing it imports torch_sim."""

from ase_uq.engines.torchsim.replicas import Replica, ReplicaMonitor, UncertainModel

__all__ = ["Replica", "ReplicaMonitor", "UncertainModel"]
