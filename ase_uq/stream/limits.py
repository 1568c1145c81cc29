"""The size of the batches that are evaluated."""

import math

# Largest number of atoms evaluated together where nobody says otherwise: a core of a CPU is fastest with what its
# caches hold, a GPU when it is full. Batches shrink if memory runs out.
_BATCH_ATOMS = {"cpu": 150}
_BATCH_ATOMS_ELSEWHERE = 8000
# A structure with more atoms is evaluated alone on a CPU: it keeps its cores busy, and several would take much memory.
FILLS_A_CPU = 600


def default_batch_atoms(device: str) -> int:
    """Largest number of atoms evaluated together on a kind of device, `"cpu"` or `"cuda"`."""
    return _BATCH_ATOMS.get(device, _BATCH_ATOMS_ELSEWHERE)


class BatchLimit:
    """The largest allowed batch: halved if the device runs out of memory, and carefully grown back.

    Args:
        n_atoms: Largest number of atoms in a batch at the start, which later limits do not exceed.
        n_edges: The same for edges, of which dense structures have many more; by default 60 per atom.

    Attributes:
        n_atoms: Largest number of atoms now.
        n_edges: Largest number of edges now.
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
        """Whether the limit is lower than at the start."""
        return self._scale < 1

    def fits(self, n_atoms: float, n_edges: float) -> bool:
        """Whether a batch of this size may be evaluated."""
        return n_atoms <= self.n_atoms and n_edges <= self.n_edges

    def halve(self, n_atoms: float, n_edges: float) -> None:
        """Sets the limit to half of a batch that did not fit."""
        size = min(self._scale, max(n_atoms / self._most[0], n_edges / self._most[1]))
        self._failed, self._scale, self._successes = size, size / 2, 0

    def count_success(self) -> None:
        """Counts a batch that fitted; after many in a row the limit grows, but stays below the size that failed."""
        self._successes += 1
        if self._scale == 1 or self._successes < self._PATIENCE:
            return
        if self._scale * self._GROWTH > 0.9 * self._failed:
            # Just below that size it stays until many more fitted: another process may have left the device by then.
            if self._successes < 10 * self._PATIENCE:
                return
            self._failed = math.inf
        self._scale, self._successes = min(1.0, self._scale * self._GROWTH), 0
