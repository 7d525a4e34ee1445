"""Artifact: a trained codec on disk, a folder with weights, settings and a digest over both.

    codec.safetensors   the tensors, frequency tables among them (never pickle)
    codec.json          kind, settings, what it was trained on, SHA-256 of codec.safetensors; or, of a small one, all of
                        it: the bytes of codec.safetensors in base64 under ``weights``, and that file is not there

Written whole or not at all. What it must not know: how tensors are used.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from gradcodec.errors import ArtifactError
from gradcodec.files import replace_folder

FORMAT = 1
WEIGHTS, SETTINGS = "codec.safetensors", "codec.json"
RECORDED = "recorded_bytes"
"""Key of an artifact's provenance."""
MAX_SETTINGS_BYTES = 1 << 20
_INSIDE = "weights"


@dataclass(frozen=True)
class Artifact:
    """A trained codec: its kind (``learned``, ``resnet``, ...), tensors, and settings and provenance as JSON."""

    kind: str
    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 over kind, settings that change the codec, and tensors, in hexadecimal."""
        head = json.dumps([FORMAT, self.kind, self.settings.get("codec", {})], sort_keys=True)
        return hashlib.sha256(head.encode() + save_tensors(dict(self.tensors))).hexdigest()


def save_artifact(artifact: Artifact, folder: Path, *, in_one_file: bool = False) -> None:
    """Writes the folder, replacing an older artifact; an interruption leaves the older one or the new one, whole.
    ``in_one_file``: as JSON alone, which also goes where only code and text do, such as an app that Flower sends.

    Raises:
        ArtifactError: the folder cannot be written to, or holds something that is no artifact.
    """
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder} is a file: the codec artifact needs a folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / SETTINGS).is_file():
        raise ArtifactError(f"{folder} exists and is no codec artifact: choose another folder")
    weights = save_tensors({name: tensor.contiguous() for name, tensor in artifact.tensors.items()})
    head = {
        "format": FORMAT,
        "kind": artifact.kind,
        "digest": artifact.digest,
        "sha256": hashlib.sha256(weights).hexdigest(),
        "settings": artifact.settings,
    }
    if in_one_file:
        head[_INSIDE] = base64.b64encode(weights).decode()

    def write(part: Path) -> None:
        if not in_one_file:
            (part / WEIGHTS).write_bytes(weights)
        (part / SETTINGS).write_text(json.dumps(head, indent=2, sort_keys=True) + "\n")

    try:
        replace_folder(folder, write)
    except OSError as error:
        raise ArtifactError(f"cannot write the codec artifact to {folder}: {error.strerror}") from None


def size_of_artifact(folder: Path) -> int:
    """Bytes of its files."""
    return sum(file.stat().st_size for name in (WEIGHTS, SETTINGS) if (file := folder / name).is_file())


def missing_files(folder: Path) -> list[str]:
    """Names of those that an artifact lacks there; none: there is one, whole or damaged."""
    if isinstance(_said(folder, _INSIDE), str):
        return []
    return [name for name in (SETTINGS, WEIGHTS) if not (folder / name).is_file()]


def recorded_bytes(folder: Path) -> int:
    """What recording the updates that it was trained on took, both ways; 0: it does not say."""
    size = _said(folder, "settings", "trained", RECORDED)
    return size if isinstance(size, int) and size > 0 else 0


def said_digest(folder: Path) -> str | None:
    """The digest that its head names, unchecked; None: it names none."""
    digest = _said(folder, "digest")
    return digest if isinstance(digest, str) else None


def said_kind(folder: Path) -> str | None:
    """The kind that its head names, unchecked; None: it names none."""
    kind = _said(folder, "kind")
    return kind if isinstance(kind, str) else None


def _said(folder: Path, *keys: str) -> Any:
    try:
        if (folder / SETTINGS).stat().st_size > MAX_SETTINGS_BYTES:
            return None
        found = json.loads((folder / SETTINGS).read_text())
        for key in keys:
            found = found[key]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found


def load_artifact(folder: Path, kind: str) -> Artifact:
    """Inverse of ``save_artifact``.

    Raises:
        ArtifactError: nothing there, another kind or format, or bytes that do not match the digest.
    """
    if missing_files(folder):
        raise ArtifactError(f"{folder} holds no codec artifact ({SETTINGS}, {WEIGHTS})")
    if (folder / SETTINGS).stat().st_size > MAX_SETTINGS_BYTES:
        raise ArtifactError(f"{folder / SETTINGS} is larger than {MAX_SETTINGS_BYTES:,} bytes: it is no codec's")
    try:
        head = json.loads((folder / SETTINGS).read_text())
        found = (head["format"], head["kind"], head["sha256"], head["digest"], dict(head["settings"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{folder / SETTINGS} is damaged: {error!r}") from None
    if found[0] != FORMAT:
        raise ArtifactError(f"{folder} has artifact format {found[0]}, this version reads {FORMAT}: train it again")
    if found[1] != kind:
        raise ArtifactError(f"{folder} holds a codec of kind {found[1]!r}, not {kind!r}")
    weights = _weights(folder, head)
    if hashlib.sha256(weights).hexdigest() != found[2]:
        raise ArtifactError(f"{folder}: {WEIGHTS} does not match its digest in {SETTINGS}: the artifact is damaged")
    try:
        artifact = Artifact(kind, load_tensors(weights), found[4])
    except (SafetensorError, KeyError) as error:  # KeyError: a type that torch does not have
        raise ArtifactError(f"{folder / WEIGHTS} is no safetensors file: {error}") from None
    try:
        matches = artifact.digest == found[3]
    except RecursionError:  # what JSON is read may be nested too deep to be written
        matches = False
    if not matches:
        raise ArtifactError(f"{folder} does not match its digest: settings or weights were changed by hand")
    return artifact


def _weights(folder: Path, head: Mapping[str, Any]) -> bytes:
    """The bytes of the tensors, wherever they are."""
    if _INSIDE not in head:
        return (folder / WEIGHTS).read_bytes()
    try:
        return base64.b64decode(head[_INSIDE], validate=True)
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{folder / SETTINGS} is damaged: {error!r}") from None
