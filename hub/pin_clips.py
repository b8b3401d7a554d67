"""The weights of all CLIPs with a name, pinned to the Hub's commits of today; for maintainers, before a
release."""

import re
from contextlib import suppress
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError
from typer import Typer

from dcp_zoo.cli import main
from dcp_zoo.cli.console import output
from dcp_zoo.cli.options import Command
from dcp_zoo.errors import ZooError
from dcp_zoo.files import write_file
from dcp_zoo.hub import CLIP_WEIGHTS_NAMES, explained
from dcp_zoo.zoo import specs

app = Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)
MODELS_FILE = Path(specs.__file__).with_name("models.yaml")
REPO = re.compile(r"^  clip_repo: (?!null\n)(\S+)\n(?:  clip_revision: (\S+)\n)?", re.MULTILINE)


@app.command(cls=Command)
def pin_clips() -> None:
    """Ask the Hub for the newest commit of the repo of every CLIP in models.yaml, and write all of them
    there as `clip_revision`; nothing is written if one cannot be had.

    [dim]python hub/pin_clips.py[/]

    Then try each model that changed: heads that were trained on other weights of it are refused from then
    on.
    """
    text = MODELS_FILE.read_text()
    repos = dict(match.groups() for match in REPO.finditer(text))
    newest = {repo: newest_commit(repo) for repo in repos}
    pinned = REPO.sub(lambda match: f"  clip_repo: {match[1]}\n  clip_revision: {newest[match[1]]}\n", text)
    write_file(MODELS_FILE, pinned, "run this in a checkout of dcp_zoo")
    for repo, commit in newest.items():
        if commit != repos[repo]:
            output.print(f"{repo}: {commit}, before {repos[repo]}", soft_wrap=True)


def newest_commit(repo: str) -> str:
    """The newest commit of a Hub repo; ZooError if there is none, or it has no weights as they are loaded
    here."""
    for name in CLIP_WEIGHTS_NAMES:
        with explained(repo, name), suppress(EntryNotFoundError):
            return str(get_hf_file_metadata(hf_hub_url(repo, name)).commit_hash)
    raise ZooError(f"{repo} has neither {' nor '.join(CLIP_WEIGHTS_NAMES)}: open_clip's weights are elsewhere now.")


if __name__ == "__main__":
    main(app)
