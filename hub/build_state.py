"""The folder of a build, kept in a private repository of the Hub, for machines whose disk does not outlive them."""

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from dcp_zoo.benchmark.plan import SAVED_HEADS
from dcp_zoo.errors import ZooError
from dcp_zoo.hub import HUB_LIBRARY, explained, is_absent
from dcp_zoo.release.publish import retried

LEFT_OUT = ["unfinished/*", "*.lock", ".*"]  # what a training changes at every epoch stays on this machine


def restore(repo_id: str, folder: Path) -> None:
    """Fetch what `save` has kept into a new folder; nothing if there is no such repository yet. A stopped call
    leaves no folder, and the next one goes on. ZooError if the Hub refuses."""
    part = folder.with_name(f".{folder.name}.restored")

    def fetch() -> None:
        with explained(repo_id):
            snapshot_download(repo_id, local_dir=part, library_name=HUB_LIBRARY)

    try:
        retried(fetch)
    except ZooError as error:
        if is_absent(error):
            return
        raise
    part.replace(folder)


def save(repo_id: str, folder: Path) -> None:
    """Commit what is new in the folder, without published heads, which have repositories of their own. ZooError
    if the Hub refuses."""
    api = HfApi(library_name=HUB_LIBRARY)
    heads = [f"{SAVED_HEADS}/{record.stem}/*" for record in (folder / "published").glob("*.json")]

    def commit() -> None:
        with explained(repo_id):
            api.create_repo(repo_id, private=True, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=[*LEFT_OUT, *heads])

    retried(commit)
