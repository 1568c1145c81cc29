"""Files of tensors with a JSON header: safetensors, digest-checked, written atomically. No pickle, no code.

Both kinds of file this package writes, uncertainty models and the weights of the embedded potentials, go
through these two functions.
"""

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from ase_uq.errors import ArtefactError
from ase_uq.io.files import as_readable_as_a_new_file, refused_write

_KEY = "ase_uq"


def write_tensor_file(
    path: str | os.PathLike[str], kind: str, schema: int, header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Writes tensors and a JSON header to one safetensors file; the file appears whole or not at all.

    Args:
        path: Where to write. An existing file is replaced.
        kind: Kind of the file, for example `"uncertainty model"`; `read_tensor_file` must be given the same.
        schema: Version of the layout of `header` and `tensors` for this kind.
        header: Values that JSON can hold.
        tensors: Any dtype and shape; stored on the CPU.

    Raises:
        ArtefactError: The folder is missing or not writable, or the disk is full.
    """
    path = Path(path)
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(header)
    envelope = {"kind": kind, "schema": schema, "digest": _digest(kind, schema, text, stored), "header": text}
    handle = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
        try:
            save_file(stored, temporary, metadata={_KEY: json.dumps(envelope)})
            as_readable_as_a_new_file(temporary)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except (OSError, SafetensorError) as error:
        raise refused_write(path, error) from error


def read_tensor_file(
    path: str | os.PathLike[str], kind: str, schema: int
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The header and tensors of a file written by `write_tensor_file`.

    Args:
        path: File to read.
        kind: Expected kind of the file.
        schema: Newest version of the layout that can be read.

    Raises:
        ArtefactError: There is no such file, or it is of another kind, written by a newer ase_uq, truncated, or
            altered since it was written.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtefactError(f"there is no file {path}.")
    try:
        # Read, not mapped: whoever writes over the file must change neither what was checked nor what is used.
        content = path.read_bytes()
        # Cloned: torch aligns new tensors, but in the file they may lie 8 bytes off. Their products would be summed in
        # another order and differ in the last bits from those of the tensors that were written.
        tensors = {name: tensor.clone() for name, tensor in load(content).items()}
        metadata = _metadata(content)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise ArtefactError(
            f"{path} cannot be read as safetensors ({error}): it is truncated, damaged, or another kind of file. "
            f"An ase_uq {kind} was expected."
        ) from error
    envelope = _envelope(path, metadata, kind)
    if envelope["schema"] > schema:
        raise ArtefactError(
            f"{path} was written by a newer ase_uq: its {kind} layout is version {envelope['schema']}, this "
            f"package reads up to {schema}. Update ase_uq."
        )
    if envelope["digest"] != _digest(kind, envelope["schema"], envelope["header"], tensors):
        raise ArtefactError(
            f"{path} was altered after it was written: its contents do not match the digest in its header. "
            "Take it from a backup or make it again."
        )
    header = _json_object(envelope["header"])
    if header is None:
        raise ArtefactError(f"{path} has a header that is not a JSON object. Make the file again.")
    return header, tensors


def _metadata(content: bytes) -> Mapping[str, str]:
    """The texts beside the tensors of a safetensors file that is known to be whole."""
    (length,) = struct.unpack_from("<Q", content)
    return json.loads(content[8 : 8 + length]).get("__metadata__") or {}


def _json_object(text: Any) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _envelope(path: Path, metadata: Mapping[str, str], kind: str) -> dict[str, Any]:
    try:
        envelope = json.loads(metadata[_KEY])
        stored_kind = envelope["kind"]
        complete = {"digest", "header"} <= envelope.keys() and isinstance(envelope["schema"], int)
    except (KeyError, TypeError, ValueError):
        stored_kind, complete, envelope = None, False, {}
    if stored_kind != kind or not complete:
        what = f"an ase_uq {stored_kind}" if stored_kind else "not a file that ase_uq wrote"
        raise ArtefactError(f"{path} is {what}; an ase_uq {kind} was expected.")
    return envelope


def _digest(kind: str, schema: int, header: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(f"{kind}\n{schema}\n{header}".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
