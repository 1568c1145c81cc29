"""How much is evaluated together."""

import math


class BatchLimit:
    """How much is evaluated together: halved where the device runs out of memory, and carefully grown back.

    Args:
        n_atoms: Most atoms of a batch at the start, and the most it ever grows to.
        n_edges: The same of edges, for dense structures have many more of them; by default 60 for each atom.

    Attributes:
        n_atoms: Most atoms now.
        n_edges: Most edges now.
    """

    _PATIENCE = 20  # batches that must fit before a larger one is tried
    _GROWTH = 1.25

    def __init__(self, n_atoms: int, n_edges: int | None = None) -> None:
        self._most = (float(n_atoms), float(60 * n_atoms if n_edges is None else n_edges))
        self._scale = 1.0
        self._failed = math.inf  # the smallest scale that did not fit
        self._successes = 0

    @property
    def n_atoms(self) -> float:
        return self._most[0] * self._scale

    @property
    def n_edges(self) -> float:
        return self._most[1] * self._scale

    @property
    def is_reduced(self) -> bool:
        """Whether it is lower than at the start."""
        return self._scale < 1

    def fits(self, n_atoms: float, n_edges: float) -> bool:
        """Whether so many may be evaluated together."""
        return n_atoms <= self.n_atoms and n_edges <= self.n_edges

    def halve(self, n_atoms: float, n_edges: float) -> None:
        """After a batch of this size did not fit: from now on half of it."""
        size = min(self._scale, max(n_atoms / self._most[0], n_edges / self._most[1]))
        self._failed, self._scale, self._successes = size, size / 2, 0

    def count_success(self) -> None:
        """After a batch that fitted; many of them in a row let the next ones be larger, short of what failed."""
        self._successes += 1
        if self._scale == 1 or self._successes < self._PATIENCE:
            return
        if self._scale * self._GROWTH > 0.9 * self._failed:
            # Just below what failed it stays, until much has gone well: another process may have left the device.
            if self._successes < 10 * self._PATIENCE:
                return
            self._failed = math.inf
        self._scale, self._successes = min(1.0, self._scale * self._GROWTH), 0
