"""Standard normal numbers that are the same for every structure, batch, process and device."""

import numpy as np
import torch
from torch import Tensor


class Draws:
    """One column a member; drawn when a width is first asked for.

    Args:
        n_members: Number of columns.
    """

    def __init__(self, n_members: int) -> None:
        self._n_members = n_members
        self._drawn: dict[str, Tensor] = {}

    def __call__(self, name: str, width: int, device: torch.device) -> Tensor:
        """(width, n_members) float64 numbers of this name; the first columns are those of fewer members.

        Args:
            name: What they are drawn for: numbers of two names are independent.
            width: Number of weights.
            device: Where to.
        """
        if name not in self._drawn:
            # Torch's generator fills the end of a tensor otherwise: the first columns would depend on their number.
            numbers = np.random.default_rng(list(name.encode())).standard_normal((self._n_members, width))
            self._drawn[name] = torch.from_numpy(numbers).T.contiguous()
        self._drawn[name] = self._drawn[name].to(device)
        return self._drawn[name]
