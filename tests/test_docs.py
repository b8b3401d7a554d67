"""README and docs: every page is whole on GitHub. Every code block runs, or its title names what it needs
and it is checked without running. What publishing needs agrees with setup.cfg: the conda recipe, the
citation, the workflows.

A block is fenced and names its language. Blocks of a page run in order in one folder, Python in one
namespace: README's as they are pasted, those of docs with the files that they name, and trained for a few
steps. Not run is a block of which benchmarks/quotes.yaml lists a line with what it needs, one below a line
in italics that begins with "Needs", where readers must know it, and one whose title is the name of a file:
its Python is compiled, and its lines of `dcp-zoo` and of scripts like it are parsed.
"""

import configparser
import json
import re
import shlex
import subprocess
import types
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import build
import convert
import pytest
import quote
import real_table
import submit
import typer.main
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from PIL import Image
from shared import CommandLine

import dcp_zoo
from dcp_zoo.benchmark.pace import Pace
from dcp_zoo.cli import app
from dcp_zoo.data import Split, load_split
from dcp_zoo.data.packaged import SAMPLE_CLASSES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "hub" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOWN_ONLY = ("text", "yaml", "json", "csv", "toml", "bibtex")
RENDERED = [*ROOT.glob("*.md"), *PAGES[1:], *ROOT.glob("hub/*/**/*.md"), *ROOT.glob("benchmarks/*.md")]
NOTEBOOKS = sorted((ROOT / "docs").glob("*.ipynb"))
SCRIPTS = {
    "hub/build.py": build.app,
    "hub/convert.py": convert.app,
    "benchmarks/real_table.py": real_table.app,
    "benchmarks/submit.py": submit.app,
}
GROUPS = {"dcp_zoo.methods", "dcp_zoo.__file__"}  # entry points, and what every module has


class Block(NamedTuple):
    language: str
    code: str
    line: int
    runs: bool


def blocks(page: Path) -> Iterator[Block]:
    """All code blocks of a page."""
    above, listed = "", {*filter(None, map(quote.needs, quote.quotes(page)))}  # the paragraph or the block before
    for token in MarkdownIt().parse(page.read_text()):
        if token.type in ("fence", "code_block"):
            language, _, rest = token.info.partition(" ")
            needs = above.startswith("*Needs ") or re.match(r'title="[\w/]+\.\w+"', rest)
            needs = needs or not listed.isdisjoint(token.content.splitlines())
            yield Block(language, token.content, token.map[0] + 1, runs=not needs)
        above = token.content or above


def commands(code: str) -> list[str]:
    """The lines of a shell block, continued lines joined."""
    lines = code.replace("\\\n", " ").splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


def few_test_images(*args) -> Split:
    split = load_split(*args)
    return replace(split, test=split.test[::50])


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """The folder that blocks run in: photographs, a folder of them for each class, and an empty data
    root."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("dcp_zoo.training.recipes.steps_needed", lambda *sizes: 5)  # examples run, but not for long
    monkeypatch.setattr("dcp_zoo.training.recipes.FEWEST_STEPS", 5)
    monkeypatch.setattr("dcp_zoo.training.recipes.Recipe.num_epochs", 2)  # whatever a page asks for
    monkeypatch.setattr("dcp_zoo.benchmark.plan.read_split", cache(few_test_images))
    monkeypatch.setattr("dcp_zoo.benchmark.pace.pace", lambda *args: Pace(image=0.01, step=0.1, per_class=0.02))
    monkeypatch.setattr("dcp_zoo.benchmark.pace.gigabytes", lambda specs: None)  # without a network
    for c, name in enumerate(["cat", "dog"]):
        Path("MY_PHOTOS", name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (130, 140), (20 + 150 * c, 90, 40 * i)).save(f"MY_PHOTOS/{name}/{i}.jpg")
    for name in ("photo", "cat", "dog"):
        Image.new("RGB", (200, 180), "purple").save(f"{name}.jpg")
    Path("DATA").mkdir()
    return tmp_path


def run_command(line: str, run: CommandLine) -> None:
    """A line of shell: `dcp-zoo` in this process, which saves its start-up, and anything else by bash."""
    program, *args = shlex.split(line, comments=True)
    if program == "dcp-zoo":
        run.ok(*args)
    else:
        subprocess.run(["bash", "-c", line], check=True)


@cache
def silent_commands() -> Any:
    """The command line, whose commands do nothing."""
    group = typer.main.get_command(app)
    for outer in group.commands.values():
        for command in (outer, *getattr(outer, "commands", {}).values()):
            command.callback = lambda **values: None
    return group


def parse_command(line: str) -> None:
    """Let the command line or a script read its line, and do nothing."""
    args = shlex.split(line, comments=True)
    if "dcp-zoo" in args:
        silent_commands()(args[args.index("dcp-zoo") + 1 :], standalone_mode=False)
    for script in SCRIPTS.keys() & set(args):
        command = typer.main.get_command(SCRIPTS[script])
        command.callback = None
        command(args[args.index(script) + 1 :], standalone_mode=False)


NEAR = 0.015  # relative: machines differ by the last digits, and by an image of the digits


def check_printed(shown: str, printed: str) -> None:
    """Fail unless a line was printed that a page shows, with numbers like its own; `..` stands for what is
    left out."""
    text = shown.strip(". ")
    words = (r"\s+".join(map(re.escape, re.split(r"\s+", part))) for part in re.split(quote.NUMBER, text))
    pattern = f"({quote.NUMBER})".join(words)
    pattern = pattern if shown.startswith("..") else "^" + pattern
    pattern = pattern if shown.endswith("..") else pattern + r"\s*$"
    found = re.search(pattern, printed, re.MULTILINE)
    assert found, f"{shown!r} is not in {printed!r}"
    assert [*map(float, found.groups())] == pytest.approx([*map(float, re.findall(quote.NUMBER, text))], rel=NEAR)


def test_readme_as_it_is_pasted(uploads, tmp_path, monkeypatch, run):
    """In an empty folder, with a Hub where nothing is published: its blocks run, and print what README
    shows. Of those that need the network or the reader's photographs, the sample is predicted and other
    commands are parsed."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setenv("DCP_ZOO_CACHE", str(tmp_path / "kept"))
    namespace: dict = {"__name__": "__main__"}
    compared, said, told = 0, "", ""
    for block in blocks(PAGES[0]):
        printed, shown = "", []
        if block.language == "python":
            exec(compile("\n" * block.line + block.code, str(PAGES[0]), "exec"), namespace)
            printed = run.capsys.readouterr().out
            shown = re.findall(r"^ *print\(.*  # (.*)", block.code, re.MULTILINE)
        elif block.language == "bash":
            shown = re.findall(r"^# (.*)", block.code, re.MULTILINE)
            for command in re.split(" && |\n", "\n".join(commands(block.code))):
                program, *args = shlex.split(command, comments=True)
                if program == "dcp-zoo" and (block.runs or args == ["predict", "--sample"]):
                    _, out, err = run(*args)
                    printed += out
                    said += err
                    told += out if args[:2] == ["train", "digits"] else ""
                else:
                    parse_command(command)
        else:
            assert block.language in SHOWN_ONLY
        for line in shown:
            check_printed(line, printed)
        compared += len(shown)
    assert compared == 6
    (shown_on_page,) = [block.code for block in blocks(ROOT / "docs/train.md") if "test top-1" in block.code]
    for line in shown_on_page.splitlines():
        if "  " not in line and line != "..":  # tables: another machine may order them differently
            check_printed(re.sub(quote.NUMBER, "0", line), re.sub(quote.NUMBER, "0", told))
    assert "Zero-shot: by the names of twelve classes" in said
    assert "images of only one of these, butterfly" in said
    assert {*SAMPLE_CLASSES} & {*namespace["model"].classnames} == {"butterfly"}


@pytest.mark.scripts
@pytest.mark.filterwarnings("ignore::dcp_zoo.errors.ZooWarning")  # which pages announce
@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_code_blocks(page, scratch, run):
    namespace: dict = {"__name__": "__main__"}
    for module in ("ray", "datasets", "pyspark", "webdataset") if page.name == "many_images.md" else ():
        pytest.importorskip(module)
    for block in blocks(page):
        where = f"{page}:{block.line}"
        if block.language == "python":
            code = compile("\n" * block.line + block.code, str(page), "exec")
            if block.runs:
                exec(code, namespace)
        elif block.language == "bash":
            for line in commands(block.code):
                if block.runs:
                    run_command(line, run)
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


HELPS = helps(typer.main.get_command(app)) | {
    script: typer.main.get_command(program).help for script, program in SCRIPTS.items()
}


def test_examples_in_help(scratch):
    for name, text in HELPS.items():
        examples = [" ".join(found.split()) for found in re.findall(r"\[dim\](.*?)\[/\]", text, flags=re.DOTALL)]
        assert examples, f"{name} --help shows no example"
        for example in examples:
            parse_command(example)


@cache
def tokens(page: Path) -> list[Token]:
    """The page as blocks and, inside them, text, links and pictures, in order."""
    text = re.sub(r"\A---\n.*?\n---\n", "", page.read_text(), flags=re.DOTALL)  # a Space's settings
    parsed = MarkdownIt("commonmark").enable("table").parse(text)
    return [token for block in parsed for token in (block, *(block.children or ()))]


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    found = set()
    for heading, inline in zip(tokens(page), tokens(page)[1:], strict=False):
        if heading.type == "heading_open":
            text = "".join(child.content for child in inline.children if child.type in ("text", "code_inline"))
            found.add(re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", RENDERED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_pictures(page):
    for token in tokens(page):
        to = token.attrGet("href") or token.attrGet("src") or ""
        if token.type == "image":
            assert token.content.strip(), f"{to} has no text for those who cannot see it"
        if not to or re.match(r"\w+:", to):
            continue
        path, _, anchor = to.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), to
        assert not anchor or anchor in anchors(target), to


def test_pictures_are_current():
    import pictures  # and Matplotlib

    assert pictures.outdated() == [], "run python benchmarks/pictures.py"


@pytest.mark.scripts
def test_notebooks_have_their_outputs():
    for notebook in NOTEBOOKS:
        cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "python docs/hooks.py"
        assert [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"] == []


def documented() -> Iterator[tuple[str, str]]:
    """Every path below dcp_zoo that README, docs and the notebook name, and where."""
    for page in (*PAGES, *NOTEBOOKS):
        text = page.read_text()
        for module, names in re.findall(r"from (dcp_zoo[\w.]*) import ([\w, ]+)", text):
            yield from ((f"{module}.{name.strip()}", page.name) for name in names.split(","))
        for path in re.findall(r"(?<!from )(?<![\w/.])dcp_zoo(?:\.\w+)+", text):
            yield path, page.name


def test_documented_names_are_public():
    """Importable from `dcp_zoo`, or from one level below."""
    for path in sorted({path for path, _ in documented()} - GROUPS):
        found, public = import_module("dcp_zoo"), 0
        for name in path.split(".")[1:]:
            public += isinstance(found, types.ModuleType)
            if isinstance(found, types.ModuleType) and name not in found.__all__:
                import_module(f"{found.__name__}.{name}")
            found = getattr(found, name)
        assert public <= 2, f"{path} is deeper"


CONDA_NAMES = {"torch": "pytorch", "open_clip_torch": "open-clip-torch"}


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["metadata"]["version"] == "attr: dcp_zoo.__version__"
    config["metadata"]["version"] = dcp_zoo.__version__
    return config


def test_conda_recipe(setup):
    version, text = setup["metadata"]["version"], (ROOT / "hub/conda/meta.yaml").read_text()
    assert f'{{% set version = "{version}" %}}' in text
    text = re.sub(r"{%.*%}", "", text).replace("{{ PYTHON }}", "python")
    recipe = yaml.safe_load(re.sub(r"{{ (\w+) }}", r"\1", text))
    required = [line for line in setup["options"]["install_requires"].split("\n") if line and line[0] != "#"]
    names = [re.split(r"(?=[<>=])", line, maxsplit=1) for line in required]
    run = {f"{CONDA_NAMES.get(name, name).lower()} {bounds}" for name, bounds in names}
    assert set(recipe["requirements"]["run"]) == run | {"python >=python_min"}
    assert recipe["build"]["entry_points"] == ["dcp-zoo = dcp_zoo.cli:main"]


def test_citation(setup):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (setup["metadata"]["version"], setup["metadata"]["license"])
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda path: path.name)
def test_actions_are_pinned(path):
    used = re.findall(r"uses: (\S+)", path.read_text())
    assert used
    assert [action for action in used if not re.search(r"@[0-9a-f]{40}$", action)] == []
