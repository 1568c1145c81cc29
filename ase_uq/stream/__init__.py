"""Frames on their way through a potential: the one loop that batches, evaluates and survives a full device."""
