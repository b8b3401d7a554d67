"""README and docs: every code block runs, or its title names what it needs and it is checked without running.

A block is fenced and names its language. Blocks of a page run in order in one folder, Python in one namespace. A block
whose title begins with "Needs" (CLIP's weights, a network, a server, minutes) or is the name of a file is not run: its
Python is compiled, and its `dcp-zoo` lines are parsed by the command line.
"""

import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import typer.main
from markdown_it import MarkdownIt
from PIL import Image

from dcp_zoo.cli import main
from dcp_zoo.cli.app import app
from dcp_zoo.data import Split, load_split

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOWN_ONLY = ("text", "yaml", "json", "csv", "toml")


class Block(NamedTuple):
    language: str
    code: str
    line: int
    runs: bool


def blocks(page: Path) -> Iterator[Block]:
    """All code blocks of a page."""
    for token in MarkdownIt().parse(page.read_text()):
        if token.type in ("fence", "code_block"):
            language, _, rest = token.info.partition(" ")
            runs = re.match(r'title="(Needs |[\w/]+\.\w+")', rest) is None
            yield Block(language, token.content, token.map[0] + 1, runs)


def commands(code: str) -> list[str]:
    """The lines of a shell block, continued lines joined."""
    lines = code.replace("\\\n", " ").splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


def few_test_images(*args) -> Split:
    split = load_split(*args)
    return replace(split, test=split.test[::50])


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """The folder that blocks run in: photographs, a folder of them for each class, and an empty data root."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("dcp_zoo.training.recipes.steps_needed", lambda *sizes: 5)  # examples run, but not for long
    monkeypatch.setattr("dcp_zoo.benchmark.images.load_split", few_test_images)
    for c, name in enumerate(["cat", "dog"]):
        Path("MY_PHOTOS", name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (130, 140), (20 + 150 * c, 90, 40 * i)).save(f"MY_PHOTOS/{name}/{i}.jpg")
    for name in ("photo", "cat", "dog"):
        Image.new("RGB", (200, 180), "purple").save(f"{name}.jpg")
    Path("DATA").mkdir()
    return tmp_path


def run_command(line: str, monkeypatch) -> None:
    """A line of shell: `dcp-zoo` in this process, which saves its start-up, and anything else by bash."""
    args = shlex.split(line, comments=True)
    if args[0] != "dcp-zoo":
        subprocess.run(["bash", "-c", line], check=True)
        return
    monkeypatch.setattr("sys.argv", args)
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code, line


def parse_command(line: str) -> None:
    """Let the command line read a `dcp-zoo` line, and do nothing."""
    args = shlex.split(line, comments=True)
    if "dcp-zoo" not in args:
        return
    group = typer.main.get_command(app)
    for command in (
        *group.commands.values(),
        *group.commands["data"].commands.values(),
        *group.commands["classes"].commands.values(),
    ):
        command.callback = lambda **values: None
    group(args[args.index("dcp-zoo") + 1 :], standalone_mode=False)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks(page, scratch, monkeypatch):
    namespace: dict = {"__name__": "__main__"}
    for block in blocks(page):
        where = f"{page}:{block.line}"
        if block.language == "python":
            code = compile("\n" * block.line + block.code, str(page), "exec")
            if block.runs:
                exec(code, namespace)
        elif block.language == "bash":
            for line in commands(block.code):
                if block.runs:
                    run_command(line, monkeypatch)
                else:
                    parse_command(line)
        else:
            assert block.language in SHOWN_ONLY, f"{where}: fence code blocks, and name their language"


def helps(group, prefix: str = "dcp-zoo") -> dict[str, str]:
    """The help of every command, by what one types for it."""
    found: dict[str, str] = {}
    for name, command in group.commands.items():
        inner = hasattr(command, "commands")
        found |= helps(command, f"{prefix} {name}") if inner else {f"{prefix} {name}": command.help}
    return found


@pytest.mark.parametrize(("name", "help"), list(helps(typer.main.get_command(app)).items()))
def test_examples_in_help(name, help, scratch):
    examples = [" ".join(text.split()) for text in re.findall(r"\[dim\](.*?)\[/\]", help, flags=re.DOTALL)]
    assert examples, f"{name} --help shows no example"
    for example in examples:
        parse_command(example)
