"""Files of tensors with a JSON header: safetensors, digest-checked, written atomically. No pickle, no code.

Both kinds of file this package writes, uncertainty models and the weights of the embedded potentials, go
through these two functions.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ase_uq.errors import ArtefactError

_KEY = "ase_uq"


def write_artefact(
    path: str | os.PathLike[str], kind: str, schema: int, header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Writes tensors and a JSON header to one safetensors file; the file appears whole or not at all.

    Args:
        path: Where to write. An existing file is replaced.
        kind: What the file is, for example `"uncertainty model"`; reading asks for the same.
        schema: Version of the layout of `header` and `tensors` for this kind.
        header: What JSON can hold.
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
            _as_readable_as_a_new_file(temporary)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except (OSError, SafetensorError) as error:
        raise _refused(path, error) from error


def read_artefact(
    path: str | os.PathLike[str], kind: str, schema: int
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The header and tensors of a file written by `write_artefact`.

    Raises:
        ArtefactError: There is no such file, or it is not of this kind, newer than this package,
            truncated, or altered since it was written.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtefactError(f"{path} is no file that exists.")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
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
    return json.loads(envelope["header"]), tensors


def check_writable(path: str | os.PathLike[str]) -> None:
    """Fails now, not after the work, where `path` could not be written.

    Raises:
        ArtefactError: The folder is missing or nothing can be created in it, or `path` is a folder itself.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".ase_uq_"):
            pass
    except OSError as error:
        raise _refused(path, error) from error


def check_distinct(source: str | os.PathLike[str] | None, *outputs: str | os.PathLike[str] | None) -> None:
    """Refuses outputs that would overwrite each other or what is read.

    Args:
        source: File that is read; None for none.
        outputs: Files that are written; None for none.

    Raises:
        ValueError: Two of them are the same file.
    """
    paths = [Path(path) for path in (source, *outputs) if path is not None]
    for index, path in enumerate(paths):
        for earlier in paths[:index]:
            if earlier.resolve() == path.resolve() or (earlier.exists() and path.exists() and earlier.samefile(path)):
                read = source is not None and earlier is paths[0]
                raise ValueError(
                    f"{path} is {'read from' if read else 'two of the outputs'}: it would be overwritten. Give another "
                    "name."
                )


def _refused(path: Path, error: Exception) -> ArtefactError:
    if isinstance(error, IsADirectoryError):
        return ArtefactError(f"cannot write {path}: it is a folder. Give the name of a file.")
    # The whole message of an OSError would name the temporary file, of which nobody has heard.
    reason = getattr(error, "strerror", None) or error
    return ArtefactError(f"cannot write {path}: {reason}. Choose a folder that exists, is writable and has room.")


def _envelope(path: Path, metadata: Mapping[str, str], kind: str) -> dict[str, Any]:
    try:
        envelope = json.loads(metadata[_KEY])
        found = envelope["kind"]
        complete = {"digest", "header"} <= envelope.keys() and isinstance(envelope["schema"], int)
    except (KeyError, TypeError, ValueError):
        found, complete, envelope = None, False, {}
    if found != kind or not complete:
        what = f"an ase_uq {found}" if found else "not a file that ase_uq wrote"
        raise ArtefactError(f"{path} is {what}; an ase_uq {kind} was expected.")
    return envelope


def _digest(kind: str, schema: int, header: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(f"{kind}\n{schema}\n{header}".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def _as_readable_as_a_new_file(path: str) -> None:
    # mkstemp makes private files; what the user asked for should obey the umask like any other file.
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)
