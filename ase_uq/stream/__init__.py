"""Frames on their way through a potential: one loop batches and evaluates them and survives full device memory."""
