"""Names of the hub: its real client on a cache made here, and stand-ins for what it may answer."""

from __future__ import annotations

import errno
import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import errors, snapshot_download

from moiety.config import AttentionConfig, ModelConfig, MoEConfig
from moiety.errors import FormatError, MoietyError, StorageError, UsageError
from moiety.model import hub
from moiety.model.checkpoint import load, load_config, save
from moiety.model.hub import is_hub_name, resolve
from moiety.model.transformer import Transformer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = ModelConfig(
    vocab_size=19,
    d_model=8,
    layers=2,
    attention=AttentionConfig(heads=2, kv_heads=1, head_dim=6),
    d_ff=12,
    moe=MoEConfig(experts=3, experts_per_token=2, d_ff=5),
)


def cached(cache: Path, source: Path, name: str = "owner/model") -> Path:
    """Put a folder's files into a cache as the hub's client does; returns the snapshot."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(source.iterdir())):
        if file.name != "manifest.json":
            shutil.copy(file, repository / "blobs" / f"{number:040x}")
            (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Transformer, Path]:
    model = Transformer(CONFIG)
    save(model, tmp_path / "saved", max_shard_bytes=900)
    return model, tmp_path / "saved"


def test_a_cached_snapshot_loads(tmp_path: Path, saved: tuple[Transformer, Path]) -> None:
    model, source = saved
    snapshot = cached(tmp_path / "cache", source)
    client = functools.partial(snapshot_download, cache_dir=tmp_path / "cache")
    for revision in (None, "main", COMMIT):
        found = resolve("owner/model", revision=revision, offline=True, download=client)
        assert found == snapshot and any(file.is_symlink() for file in found.iterdir())
    back = load(snapshot)
    assert all(torch.equal(one, back.state_dict()[name]) for name, one in model.state_dict().items())
    assert load_config(snapshot) == CONFIG
    (tmp_path / "elsewhere").symlink_to(tmp_path / "cache")
    load(tmp_path / "elsewhere" / snapshot.relative_to(tmp_path / "cache"))
    for name, revision in (("owner/other", None), ("owner/model", "v2")):
        with pytest.raises(StorageError, match="not whole in the hub's cache") as caught:
            resolve(name, revision=revision, offline=True, download=client)
        assert name in caught.value.message and "HF_HUB_OFFLINE" in str(caught.value.hint)


def test_only_links_to_its_own_blobs_are_followed(tmp_path: Path, saved: tuple[Transformer, Path]) -> None:
    snapshot = cached(tmp_path / "cache", saved[1])
    other = cached(tmp_path / "cache", saved[1], "owner/other")
    config = snapshot / "config.json"
    good = config.readlink()
    blobs = snapshot.parents[1] / "blobs"
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (blobs / "outside").symlink_to(secret)
    (blobs / "folder").mkdir()
    (blobs / "folder" / "file").write_text("{}")
    for target in (
        secret,
        "../../../../secret",
        other.parents[1] / "blobs" / good.name,
        "../../blobs/outside",
        "../../blobs/folder",
        "../../blobs/folder/file",
        "../../blobs/none",
        "../../blobs/../refs/main",
        "config.json",
    ):
        config.unlink()
        config.symlink_to(target)
        with pytest.raises(FormatError, match=r"config\.json is a symbolic link"):
            load(snapshot)
    config.unlink()
    config.symlink_to(blobs / good.name)  # as the client writes it across volumes
    load(snapshot)
    plain = tmp_path / "plain"
    shutil.copytree(snapshot, plain, symlinks=True)
    with pytest.raises(FormatError, match="symbolic link"):
        load(plain)
    blobs.rename(tmp_path / "moved")
    blobs.symlink_to(tmp_path / "moved")
    with pytest.raises(FormatError, match="symbolic link"):
        load(snapshot)


def test_what_is_asked_of_the_client(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    def download(repo_id: str, **options: Any) -> str:
        asked.append({"name": repo_id, **options})
        (tmp_path / "config.json").touch()
        return str(tmp_path)

    assert resolve("a/b", revision="v1", token="secret", download=download) == tmp_path
    assert resolve("a/b", offline=True, weights=False, download=download) == tmp_path
    first, second = asked
    assert (first["name"], first["revision"], first["token"], first["local_files_only"]) == (
        "a/b",
        "v1",
        "secret",
        False,
    )
    assert second["local_files_only"] and not any("safetensors" in one for one in second["allow_patterns"])
    from huggingface_hub.utils import filter_repo_objects

    repository = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "chat_template.jinja",
        "consolidated.safetensors",
        "original/model.safetensors",
        "pytorch_model.bin",
        "weights.pt",
        "modeling_model.py",
        "tokenizer.model",
        "README.md",
        "manifest.json",
    ]
    patterns = {name: first[name] for name in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(repository, **patterns)) == repository[:5]


def answers(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    """An error of the client as it comes from the hub."""
    from httpx2 import Request, Response

    return kind("no", response=Response(404, request=Request("GET", "https://hub.invalid")))


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (answers(errors.RepositoryNotFoundError), UsageError, "no such model.*hint: .*spelling"),
        (answers(errors.RevisionNotFoundError), UsageError, "the hub has no a/b at revision v1"),
        (answers(errors.GatedRepoError), StorageError, "gated.*hint: accept.*HF_TOKEN"),
        (answers(errors.HfHubHTTPError), StorageError, "cannot fetch a/b.*hint: check the network"),
        (errors.LocalEntryNotFoundError("no"), StorageError, "cache.*hint: go online"),
        (errors.OfflineModeIsEnabled("no"), StorageError, "cache.*HF_HUB_OFFLINE"),
        (errors.HFValidationError("no"), UsageError, "does not take"),
        (OSError(errno.ENOSPC, "No space left"), StorageError, "no space.*hint: .*HF_HOME"),
        (ConnectionError("reset"), StorageError, "cannot fetch.*reset"),
    ],
)
def test_what_the_hub_refuses(error: Exception, kind: type[MoietyError], said: str) -> None:
    def download(repo_id: str, **options: Any) -> str:
        raise error

    with pytest.raises(kind, match=f"(?s){said}") as caught:
        resolve("a/b", revision="v1", download=download)
    assert caught.value.__cause__ is error and caught.value.hint


def test_what_is_here_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("a/b") and is_hub_name("mistralai/Mixtral-8x7B-v0.1")
    Path("a/b").mkdir(parents=True)
    assert not is_hub_name("a/b") and resolve("a/b") == Path("a/b")
    with pytest.raises(UsageError, match="no revision 'v1'"):
        resolve("a/b", revision="v1")
    for source in (
        "c",
        "/a/b/c",
        "./c/d",
        "../c",
        "a/b/c",
        "",
        "a//b",
        "a/b ",
        "ä/b",
        "a/x.gguf",
        Path("c/d"),
        "-/b",
    ):
        assert not is_hub_name(source)
    for source in ("c", "./c/d", "a/x.gguf", Path("c/d")):
        with pytest.raises(FormatError, match="does not exist"):
            resolve(source)
    for revision in ("", "-x", "a b", "x" * 300):
        with pytest.raises(UsageError, match="no revision"):
            resolve("c/d", revision=revision)


def test_a_repository_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"a/b has no config\.json"):
        resolve("a/b", download=lambda repo_id, **options: str(tmp_path))


def test_offline_by_the_environment() -> None:
    """The suite sets HF_HUB_OFFLINE: nothing here may wait for a network."""
    with pytest.raises(StorageError, match="nobody/nothing is not whole"):
        load("nobody/nothing")
    assert hub.__all__ == ["Download", "is_hub_name", "resolve"]
