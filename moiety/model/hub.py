"""Where a model is: a local folder, a GGUF file, or a name on the Hugging Face hub, fetched into its cache.

From the hub come `config.json`, the tokenizer's files and safetensors, never a pickle and never code; what comes is
then read as any other file of somebody else's.
"""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Protocol

from moiety import storage
from moiety.errors import FormatError, StorageError, UsageError
from moiety.packages import need

__all__ = ["Download", "is_hub_name", "resolve"]

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,199}", re.ASCII)
CONFIGS = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
WEIGHTS = ("model.safetensors.index.json", "*.safetensors")
# Folders hold other editions of the same weights, and `consolidated` is Mistral's own layout of them.
IGNORED = ("*/*", "consolidated*")


class Download(Protocol):
    """`huggingface_hub.snapshot_download`, or what a test puts in its place."""

    def __call__(
        self,
        repo_id: str,
        *,
        revision: str | None,
        token: str | None,
        local_files_only: bool,
        allow_patterns: list[str],
        ignore_patterns: list[str],
    ) -> str:
        """Fetch what is not in the cache yet; returns the folder."""


def is_hub_name(source: str | Path) -> bool:
    """True for `owner/name` where no such file or folder is here."""
    path = Path(source)
    found = path.exists() or storage.existing(path).exists()
    return isinstance(source, str) and not found and path.suffix != ".gguf" and bool(NAME.fullmatch(source))


def resolve(
    source: str | Path,
    *,
    revision: str | None = None,
    offline: bool | None = None,
    token: str | None = None,
    weights: bool = True,
    download: Download | None = None,
) -> Path:
    """The local path of a model.

    Args:
        source: A folder, a `.gguf` file, or `owner/name` on the hub. What is here goes first.
        revision: Branch, tag or commit on the hub; None is its main branch.
        offline: Take from the cache alone; None does as the variable HF_HUB_OFFLINE says.
        token: For private and gated models; None is the one that `hf auth login` or HF_TOKEN gave.
        weights: False fetches the config and the tokenizer only.
        download: What fetches; None is `huggingface_hub.snapshot_download`.

    Raises:
        FormatError: nothing here has that name, and it is no name of the hub.
        UsageError: the hub has no such model or revision, or a revision was asked of a local path.
        StorageError: gated, unreachable, offline and not in the cache, or no space on the disk.
        DependencyError: huggingface_hub is not installed.
    """
    if not is_hub_name(source):
        return _local(source, revision)
    name = str(source)
    if revision is not None and not REVISION.fullmatch(revision):
        raise UsageError(f"{revision!r} is no revision", hint="give a branch, a tag or a commit of the hub")
    folder = _fetch(name, revision, offline, token, weights, download or _snapshot_download())
    if not (folder / "config.json").exists():
        raise FormatError(
            f"{name} has no config.json on the hub", hint="it is not a model in the layout of transformers"
        )
    return folder


def _local(source: str | Path, revision: str | None) -> Path:
    path = storage.existing(source)
    if not path.exists():
        raise FormatError(
            f"{source} does not exist",
            hint="give a folder, a .gguf file, or a model of the hub as owner/name",
        )
    if revision is not None:
        raise UsageError(f"{source} is here and has no revision {revision!r}", hint="leave the revision out")
    return path


def _snapshot_download() -> Download:
    found: Download = need("huggingface_hub", "a model of the hub", "huggingface_hub").snapshot_download
    return found


def _fetch(
    name: str,
    revision: str | None,
    offline: bool | None,
    token: str | None,
    weights: bool,
    download: Download,
) -> Path:
    """Call the hub's own client, its complaints turned into ours."""
    from huggingface_hub import errors

    at = name if revision is None else f"{name} at revision {revision}"
    try:
        folder = download(
            name,
            revision=revision,
            token=token,
            local_files_only=bool(offline),
            allow_patterns=[*CONFIGS, *(WEIGHTS if weights else ())],
            ignore_patterns=[*IGNORED],
        )
    except errors.GatedRepoError as error:
        raise StorageError(
            f"{name} is gated: the hub gives it only to those who accepted its terms",
            hint=f"accept them at https://huggingface.co/{name}, then log in with `hf auth login` or set HF_TOKEN",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(
            f"the hub has no {at}", hint=f"see https://huggingface.co/{name}/tree/main for its branches"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UsageError(
            f"no folder {name} is here, and the hub has no such model, or not for you",
            hint="check the spelling; for a private model log in with `hf auth login` or set HF_TOKEN",
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise StorageError(
            f"{at} is not whole in the hub's cache, and the hub cannot be reached or may not be",
            hint="go online once and unset HF_HUB_OFFLINE, or give a local folder",
        ) from error
    except errors.HFValidationError as error:
        raise UsageError(f"the hub does not take {at}: {error}", hint="give a model as owner/name") from error
    except OSError as error:
        raise _refusal(at, error) from error
    return Path(folder)


def _refusal(at: str, error: OSError) -> StorageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"no space on the disk for {at}",
            hint="free some, or set HF_HOME to a larger disk; what has come is kept",
        )
    return StorageError(f"cannot fetch {at}: {error}", hint="check the network, then try again: it goes on")
