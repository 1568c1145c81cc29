"""What the tests of the methods share."""

import torch

# The systems are tiny: with two threads on a busy machine they wait for each other ten times as long as they work.
torch.set_num_threads(1)
