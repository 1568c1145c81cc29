"""A threshold that a criterion was turned into: a number in eV/Å that says what it promises."""

from typing import Self


class ResolvedThreshold(float):
    """A threshold in eV/Å that remembers its criterion; in every other respect a float.

    Attributes:
        criterion: The criterion it was made from.
        promise: What it achieves, in words.
        n_units: Number of independent units it was made from.
        needed: Smallest number of units that this criterion needs.
        band: 90 % interval of the threshold, eV/Å, as far as the data tell; None if it is not known.
    """

    criterion: object
    promise: str
    n_units: int
    needed: int
    band: tuple[float, float] | None

    def __new__(
        cls,
        value: float,
        *,
        criterion: object,
        promise: str,
        n_units: int,
        needed: int,
        band: tuple[float, float] | None = None,
    ) -> Self:
        threshold = super().__new__(cls, value)
        threshold.criterion, threshold.promise, threshold.band = criterion, promise, band
        threshold.n_units, threshold.needed = n_units, needed
        return threshold

    def __getnewargs_ex__(self) -> tuple[tuple[float], dict]:
        # Without this, pickle and copy would call __new__ without its keywords.
        return (float(self),), dict(vars(self))

    def shared(self) -> "ResolvedThreshold":
        """The same threshold; its promise says that it was made from all atoms, as one element had too few data."""
        return ResolvedThreshold(
            self,
            criterion=self.criterion,
            promise=f"{self.promise}, from all atoms together, since there are too few data of this element alone",
            n_units=self.n_units,
            needed=self.needed,
            band=self.band,
        )

    def describe(self) -> str:
        """Value, promise and certainty in one line."""
        band = "" if self.band is None else f"; 90 % band {self.band[0]:.3g} to {self.band[1]:.3g}"
        units = f"{self.n_units} units, {self.needed} needed"
        return f"{float(self):.4g} eV/Å by {self.criterion}: {self.promise} ({units}{band})"
