"""`dcp-zoo cache`: what was downloaded or computed, and can be had again."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from typer import Argument, Typer

from dcp_zoo.cli.console import output, plain_table
from dcp_zoo.cli.options import Command
from dcp_zoo.errors import ZooError, nearest_hint
from dcp_zoo.files import CACHE_TAG, cache_root
from dcp_zoo.model.config import CONFIG_NAME, read_config
from dcp_zoo.zoo.registry import MODELS, SIZES, get_spec, trained_heads

commands = Typer(
    help="List and remove CLIP models and heads from the Hub, features, and exports.", no_args_is_help=True
)
FOLDERS = {"features": "features of images", "onnx": "heads for demo and serve"}


class Entry(NamedTuple):
    name: str
    size: int  # bytes
    remove: Callable[[], object]
    what: str = ""
    used: float = 0  # seconds since 1970


@commands.command("list", cls=Command)
def list_() -> None:
    """List what this package keeps: in the Hub's cache, which other programs share, and in its own.

    [dim]dcp-zoo cache list[/]
    """
    entries = [*hub_entries(), *own_entries()]
    rows = [(e.name, e.what, f"{e.size / 1e6:,.1f} MB", date.fromtimestamp(e.used).isoformat()) for e in entries]
    output.print(plain_table(("name", "what", "size", "last used"), rows))
    places = f"The Hub's cache is {hub_cache()} (HF_HOME), this package's {cache_root()} (DCP_ZOO_CACHE)."
    output.print(f"{sum(e.size for e in entries) / 1e9:.2f} GB. {places}", style="dim", soft_wrap=True, markup=False)


@commands.command(cls=Command)
def remove(names: list[str] = Argument(metavar="NAME...", help="As in `list`, or a model such as small.")) -> None:
    """Remove entries; what is needed again is downloaded or computed again.

    [dim]dcp-zoo cache remove small features[/]
    """
    entries = {entry.name: entry for entry in (*hub_entries(), *own_entries())}
    chosen = [(get_spec(name).clip_repo or name) if name in {**MODELS, **SIZES} else name for name in names]
    if missing := [name for name in chosen if name not in entries]:
        hint = nearest_hint(missing[0], entries)
        raise ZooError(f"The caches do not have {', '.join(missing)}.{hint} All: dcp-zoo cache list.")
    _remove([entries[name] for name in dict.fromkeys(chosen)])


@commands.command(cls=Command)
def prune() -> None:
    """Remove what is no longer used: unfinished downloads of CLIPs, revisions that a newer one replaces, and exports of
    other versions. Do not run it while something is being downloaded.

    [dim]dcp-zoo cache prune[/]
    """
    from dcp_zoo.deploy.onnx_cache import FOLDER

    old = [entry for entry in own_entries() if entry.name not in (FOLDER, "features")]
    info, pinned = scan(), {head.revision for head in trained_heads().values()}
    ours = {repo.repo_id: repo for repo in our_repos(info)}
    folders = {f"models--{repo.replace('/', '--')}" for repo in (*ours, *(str(s.clip_repo) for s in MODELS.values()))}
    for file in getattr(info, "incomplete_files", ()):
        if folders & set(file.file_path.parts):
            old.append(Entry(file.file_path.name, file.size_on_disk, partial(file.file_path.unlink, True)))
    for repo in ours.values():
        loose = {revision.commit_hash for revision in repo.revisions if not revision.refs} - pinned
        if loose and repo.refs:
            strategy = info.delete_revisions(*loose)
            old.append(Entry(repo.repo_id, strategy.expected_freed_size, strategy.execute))
    _remove(old)


def _remove(entries: list[Entry]) -> None:
    for entry in entries:
        entry.remove()
        output.print(f"Removed {entry.name}: {entry.size / 1e6:,.1f} MB", soft_wrap=True, markup=False)
    output.print(f"{sum(entry.size for entry in entries) / 1e9:.2f} GB are free again.")


def hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def scan() -> Any:
    """What the Hub's client says about its cache; None if there is none."""
    from huggingface_hub import scan_cache_dir

    return scan_cache_dir(hub_cache()) if hub_cache().is_dir() else None


def our_repos(info: Any) -> Iterator[Any]:
    """The repos of CLIPs in open_clip's format, of timm's image models, and of heads."""
    for repo in sorted(info.repos if info else (), key=lambda repo: repo.repo_id):
        files = {file.file_name: file.file_path for revision in repo.revisions for file in revision.files}
        is_ours = repo.repo_id.startswith("timm/") or any(name.startswith("open_clip_") for name in files)
        with suppress(ZooError):
            is_ours = is_ours or bool(CONFIG_NAME in files and read_config(files[CONFIG_NAME].parent))
        if is_ours:
            yield repo


def hub_entries() -> Iterator[Entry]:
    info = scan()
    for repo in our_repos(info):
        users = ", ".join(spec.name for spec in MODELS.values() if spec.clip_repo == repo.repo_id)
        hashes = [revision.commit_hash for revision in repo.revisions]
        remove = info.delete_revisions(*hashes).execute
        yield Entry(repo.repo_id, repo.size_on_disk, remove, users, repo.last_accessed)


def own_entries() -> Iterator[Entry]:
    for tag in sorted(cache_root().glob(f"*/{CACHE_TAG}")):  # others are not this package's
        folder = tag.parent
        files = [path.stat() for path in folder.rglob("*") if path.is_file()]
        what = FOLDERS.get(folder.name.rpartition("-")[0] or folder.name, "")
        used = max(file.st_mtime for file in files)
        yield Entry(folder.name, sum(file.st_size for file in files), partial(shutil.rmtree, folder), what, used)
