"""Repositories of the Hugging Face hub: as snapshots in its cache, each a directory named by its commit."""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path

import httpx
from huggingface_hub import constants, get_safetensors_metadata, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)

from dllm.digests import file_digest
from dllm.disk_faults import is_disk_full, is_unreadable
from dllm.errors import ModelError
from dllm.models import builtin

CONFIG_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
FILES = [*CONFIG_FILES, "*.safetensors"]


def looks_like_id(name: str) -> bool:
    """Return whether a name is a Hugging Face id rather than a path."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None


def snapshot(repo: str, revision: str | None, patterns: list[str], where: str) -> Path:
    """Download a Hugging Face repository's files, or find them in its cache; the directory is named by its commit.

    Raises:
        ModelError: the repository or revision does not exist, needs a login, or the hub is out of reach.
    """
    where = f"{where}: {repo}"
    try:
        found = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
        check_blobs(found, weights=False)
        return found
    except GatedRepoError:
        raise ModelError("this model needs an accepted licence", where=where, hint="set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise ModelError(f"no revision {revision!r}", where=where) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ModelError(
            "neither a directory nor a Hugging Face model",
            where=where,
            hint=f"built in: {', '.join(builtin.names())}",
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if is_unreadable(error) or is_disk_full(error):  # of the cache, which its line names
            raise
        raise ModelError(
            f"not in the cache, and the Hugging Face hub is out of reach ({type(error).__name__})",
            where=where,
            hint="check the network, or name a directory or a built-in model",
        ) from None


def cached(repo: str) -> list[Path]:
    """List the snapshots of a repository in the Hugging Face cache; nothing is downloaded."""
    place = Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}", "snapshots")
    return sorted(path for path in place.glob("*") if path.is_dir())


def tensor_shapes(repo: str, commit: str) -> dict[str, tuple[int, ...]] | None:
    """Read names and shapes of a repository's tensors from the headers of its files; no weights are downloaded.

    Returns: None where they cannot be read: without a network, or if the files are no safetensors.
    """
    try:
        files = get_safetensors_metadata(repo, revision=commit).files_metadata
    except (HfHubHTTPError, httpx.HTTPError, NotASafetensorsRepoError, SafetensorsParsingError, OSError, ValueError):
        return None
    return {name: tuple(each.shape) for file in files.values() for name, each in file.tensors.items()}


@functools.cache
def check_blobs(directory: Path, *, weights: bool) -> None:
    """Compare files in the Hugging Face cache with the digests that name their blobs, once per process.

    Other directories have no digests, and pass.

    Args:
        weights: check the weights, which takes a second for a gigabyte; False: the other files.

    Raises:
        ModelError: a file has other bytes than were downloaded.
    """
    for file in sorted(path for path in directory.rglob("*") if path.is_symlink() and path.is_file()):
        if (file.suffix in (".safetensors", ".bin")) != weights:
            continue
        blob = file.resolve()
        if re.fullmatch("[0-9a-f]{64}", blob.name):
            found = file_digest(blob)
        elif re.fullmatch("[0-9a-f]{40}", blob.name):  # small files are named as git does
            data = blob.read_bytes()
            found = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        else:
            continue
        if found != blob.name:
            hint = f"delete {blob} and run again; it is downloaded anew"
            raise ModelError("damaged in the Hugging Face cache", where=str(file), hint=hint)


def commit_of(directory: Path) -> str | None:
    """Return the commit of a directory in the Hugging Face cache; None for any other directory."""
    return directory.name if directory.parent.name == "snapshots" else None
