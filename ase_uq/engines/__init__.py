"""Programs that move atoms, given a potential with uncertainties: ASE, TorchSim, i-PI."""
