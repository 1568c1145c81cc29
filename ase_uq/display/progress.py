"""Progress bars: in terminals and notebooks, and nowhere else."""

from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


def progress_bar(frames: Iterable[Any] | None = None, *, show: bool = True, **options: Any) -> Any:
    """A bar of tqdm.

    Args:
        frames: What to go through; None for a bar that is updated by hand.
        show: Whether to show it. In a file, to which a queue or a script sends stderr, it is not shown in any case:
            each of its updates would be a line there.
        options: Those of tqdm, such as `desc`, `total` and `unit`.
    """
    return tqdm(frames, disable=None if show else True, **options)
