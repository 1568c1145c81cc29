"""Installed packages that add backends and methods, found by their entry points."""

import functools
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points


def plugins(group: str) -> Mapping[str, EntryPoint]:
    """The entry points of a group, by name."""
    return _found(group, tuple(sys.path))


@functools.cache  # to read what all installed packages say takes a tenth of a second
def _found(group: str, path: tuple[str, ...]) -> Mapping[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}
