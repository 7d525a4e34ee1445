"""GGUF, the format of llama.cpp: a model in it becomes a Hugging Face directory in the user's cache, once.

The weights are taken out of their quantisation and kept in bfloat16, so that what is trained, exported and merged is a
model of transformers like any other. The directory is named after the file and its digest: another file is another
model, and the same file gives the same weights, to the bit, on every machine. Knows the package ``gguf`` through
transformers (https://huggingface.co/docs/transformers/gguf).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from filelock import FileLock

from adapters.settings import ModelSettings, check_gguf, gguf_file

CACHE_VARIABLE = "CG_FEDLLM_CACHE"
RECORD = "converted.json"
"""Written last into a directory: what it was made of and the digests of its files."""
_DTYPE = torch.bfloat16


def model_folder(settings: ModelSettings) -> str:
    """Where transformers finds the model: ``model.path`` itself, or the directory that its GGUF file becomes.

    Raises:
        ValueError: the file is not there, not whole, of an architecture that transformers does not read, or not the
            one of ``model.sha256``; or the package ``gguf`` is missing.
    """
    file = gguf_file(settings.path)
    if file is None:
        return settings.path
    check_gguf(settings)
    status = file.stat()
    return str(_converted(file.absolute(), status.st_size, status.st_mtime_ns, settings.sha256))


@functools.cache
def _converted(file: Path, size: int, changed: int, expected: str | None) -> Path:
    """The directory; once a process, for as long as the file is as it was."""
    digest = _digest(file)
    if expected is not None and digest != expected.lower():
        raise ValueError(
            f"{file} is not the file of model.sha256: its digest is {digest}, that of the run {expected}: all must "
            "hold the same base model"
        )
    folder = cache_folder() / "models" / f"{file.stem}-{digest[:16]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if not _is_whole(folder, digest):
            shutil.rmtree(folder, ignore_errors=True)
            _convert(file, digest, folder)
    return folder


def origin(folder: str) -> str | None:
    """What a converted directory was made of, in a line; None if it is not one."""
    try:
        record = json.loads((Path(folder) / RECORD).read_text(encoding="utf-8"))
        return f"{record['made_of']}, SHA-256 {record['sha256']}"
    except (OSError, ValueError, KeyError, TypeError):
        return None


def cache_folder() -> Path:
    """``$CG_FEDLLM_CACHE``, or where the user's caches lie."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cg-fedllm"


def _is_whole(folder: Path, digest: str) -> bool:
    """Whether it was made of this file, by these versions or older ones, and no bit of it has changed."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        files: dict[str, str] = record["files"]
        return record["sha256"] == digest and all(_digest(folder / name) == known for name, known in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _convert(file: Path, digest: str, folder: Path) -> None:
    """Writes the directory whole or not at all."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # take seconds to load

    _check_readable(file)
    print(f"{file.name} becomes a Hugging Face model in {folder}, once; this takes a minute", file=sys.stderr)
    for left in folder.parent.glob(f".{folder.name}-*"):  # of a conversion that was interrupted
        shutil.rmtree(left, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        source = {"gguf_file": file.name, "local_files_only": True}
        dense = GgufConfig(dequantize=True)
        with _no_bar_without_a_terminal():
            model, found = AutoModelForCausalLM.from_pretrained(
                file.parent, dtype=_DTYPE, quantization_config=dense, output_loading_info=True, **source
            )
        if lacking := sorted(found["missing_keys"]):  # transformers would draw them at random
            raise ValueError(f"model.path: {file} holds nothing for {lacking[0]!r} ({len(lacking)} lacking in all)")
        model.save_pretrained(part)
        AutoTokenizer.from_pretrained(file.parent, **source).save_pretrained(part)
        made = sorted(path.name for path in part.iterdir())
        record = {
            "made_of": file.name,
            "sha256": digest,
            "files": {name: _digest(part / name) for name in made},
            "made_with": {name: version(name) for name in ("transformers", "gguf", "torch")},
        }
        (part / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        part.chmod(0o755)
        for name in (*made, RECORD):
            _sync(part / name)
        os.replace(part, folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _check_readable(file: Path) -> None:
    """Raises ValueError: head, metadata or tensors are not as the format has them."""
    from gguf import GGUFReader

    try:
        GGUFReader(file)
    except Exception as error:  # whatever wrong offsets, counts and kinds lead to
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"model.path: {file} is damaged or not whole: download it again ({reason})") from None


@contextlib.contextmanager
def _no_bar_without_a_terminal() -> Iterator[None]:
    """Transformers draws one for the tensors that nothing but a place to write to the terminal takes away."""
    with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
        yield


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
