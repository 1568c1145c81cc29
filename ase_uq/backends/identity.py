"""The identity of a potential, to which an uncertainty model is bound."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ase import Atoms

from ase_uq.display.representation import Brief

# Evaluations of the probe by the same potential in float32 and float64, or with accelerated kernels, differ by about
# 1e-7; a potential with another neighbour normalisation differs by 1e-2.
PROBE_TOLERANCE = 1e-4


@dataclass(frozen=True, repr=False)
class Identity(Brief):
    """The identity of a potential, to which an uncertainty model is bound.

    Args:
        settings: Everything outside the weights that changes predictions or features, as JSON values.
        weights: sha256 of the weights, cast to float32 so that precision does not matter.
        probe: Features of a fixed structure, and their products with the last layers, which show whether different
            weights are the same potential in another form.
    """

    settings: dict[str, Any]
    weights: str
    probe: torch.Tensor

    @property
    def fingerprint(self) -> str:
        """Hash of the weights, the head and the feature recipe."""
        text = json.dumps(self.settings, sort_keys=True) + self.weights
        return hashlib.sha256(text.encode()).hexdigest()


def probe_structure(elements: frozenset[int], info_keys: Sequence[str]) -> Atoms:
    """One atom of every element (at most 16) on a jittered grid with 2 Å spacing; the same in every process."""
    common = (1, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 20, 26, 29, 79)
    chosen = sorted(elements) if len(elements) <= 16 else sorted(elements & frozenset(common))
    count = len(chosen)
    grid = 2.0 * np.array([(i % 3, (i // 3) % 3, i // 9) for i in range(count)], float)
    jitter = 0.1 * np.sin(np.arange(3 * count)).reshape(count, 3)
    return Atoms(numbers=chosen, positions=grid + jitter, info=dict.fromkeys(info_keys, 1))


def weights_hash(modules: Sequence[torch.nn.Module]) -> str:
    """sha256 of all weights as float32, so that precision does not matter."""
    digest = hashlib.sha256()
    for module in modules:
        for name, weight in sorted(module.named_parameters()):
            if weight.numel():
                digest.update(name.replace("_orig_mod.", "").encode())
                digest.update(np.ascontiguousarray(weight.detach().cpu().float().numpy()).tobytes())
    return digest.hexdigest()


def differing(fitted: Identity, here: Identity) -> list[str]:
    """Keys of the settings that are not the same, as JSON, in order; one that is missing is None."""

    def text(identity: Identity, key: str) -> str:
        return json.dumps(identity.settings.get(key), sort_keys=True)

    keys = fitted.settings.keys() | here.settings.keys()
    return [key for key in sorted(keys) if text(fitted, key) != text(here, key)]


def relative_deviation(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖a - b‖ / ‖b‖; infinite where the shapes differ."""
    if a.shape != b.shape:
        return float("inf")
    return float((a - b).norm() / b.norm().clamp(min=1e-30))
