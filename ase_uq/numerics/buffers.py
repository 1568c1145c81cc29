"""Modules that are fitted, not trained: what they hold are JSON settings and tensors, as files do."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Buffers(torch.nn.Module):
    """A module whose tensors are buffers, so that saving, loading and moving need no code of its own.

    A subclass annotates them.

    Args:
        tensors: By name, which has no dots.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            # As files hold it: sums over another layout would have another order, and other bits.
            self.register_buffer(name, tensor.contiguous())


class Fitted(Buffers):
    """Buffers with the settings that, beside them, make the module again.

    Args:
        settings: JSON values.
        tensors: As of `Buffers`.
    """

    def __init__(self, settings: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self._settings = settings

    @property
    def settings(self) -> dict[str, Any]:
        """JSON values that, with the buffers, make the module again."""
        return self._settings


def tensors_of(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of one part of a module, whose names begin with that of the part and a dot, without it."""
    prefix = f"{part}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
