"""What mkdocs adds while it builds the pages: the notebooks as pages, and files outside `docs`.

Everything else of the documentation, tables and pictures included, is committed: see benchmarks/quote.py.
"""

import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import ExecutePreprocessor

DOCS = Path(__file__).parent
ROOT = DOCS.parent
NOTEBOOKS = sorted(DOCS.glob("*.ipynb"))
OUTSIDE = {  # pages of the site that are files of the repository, as links inside `docs` name them
    "../README.md": "index.md",
    "../CONTRIBUTING.md": "contributing.md",
    "../CHANGELOG.md": "changelog.md",
    "../SECURITY.md": "security.md",
    "../hub/recipes/miniature/README.md": "miniature.md",
}
WITHOUT_CONTENTS = {"results.md"}  # room for wide tables
NAME = re.compile(r"^- \*\*`(dcp_zoo[\w.]+)`\*\*.*\n  .*$", re.MULTILINE)  # with its parameters and first sentence


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and pictures that are made from something else."""
    made: dict[str, str | bytes] = {}
    for notebook in NOTEBOOKS:
        page, pictures = run_notebook(notebook)
        made |= {f"{notebook.stem}.md": page, **pictures}
    made |= {name: moved(ROOT, DOCS / path) for path, name in OUTSIDE.items()}
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def moved(root: Path, path: Path) -> str:
    """A file of the repository as a page of the site, its links as they are inside `docs`."""

    def link(match: re.Match) -> str:
        to, _, anchor = match[1].partition("#")
        target = (path.parent / to).resolve()
        inside = target.relative_to(DOCS) if target.is_relative_to(DOCS) else f"../{target.relative_to(root)}"
        return f"]({inside}{'#' * bool(anchor)}{anchor})"

    path = path.resolve()
    return re.sub(r"\]\((?!https?:|#)([^)\s]+)\)", link, path.read_text())


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Links to files of the repository lead to their pages, and lists of names become the reference."""
    if page.file.src_uri in WITHOUT_CONTENTS:
        page.meta["hide"] = ["toc"]
    for path, name in OUTSIDE.items():
        markdown = re.sub(rf"\]\({re.escape(path)}(?=[)#])", f"]({name}", markdown)
    for notebook in NOTEBOOKS:
        markdown = markdown.replace(f"]({notebook.name})", f"]({notebook.stem}.md)")
    # what the site does not contain is named, without a link
    markdown = re.sub(r"\[([^\]]*)\]\(\.\./[^)]*\)", r"\1", markdown)
    return NAME.sub(r"::: \1", markdown)


def on_post_page(output: str, **kwargs: Any) -> str:
    """What screen readers miss: a name of the theme's search, and headings of columns that are no empty
    ones."""
    named = output.replace('class="md-search"', 'class="md-search" aria-label="Search"')
    return re.sub(r"<th([^>]*)></th>", r"<td\1></td>", named)


@cache
def run_notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """The notebook, run from top to bottom in an empty folder, as a page and its pictures. A cell that fails
    raises, as does one that shows something else than when it was committed."""
    notebook = nbformat.read(path, as_version=4)
    committed = [shape(cell) for cell in notebook.cells]
    execute(notebook)
    for cell, before in zip(notebook.cells, committed, strict=True):
        if shape(cell) != before:
            raise ValueError(f"Run python docs/hooks.py: this cell shows {shape(cell)}, not {before}:\n{cell.source}")
    page, resources = MarkdownExporter().from_notebook_node(notebook, {"unique_key": path.stem})
    return page, resources["outputs"]


def execute(notebook: nbformat.NotebookNode) -> None:
    """Run all cells in an empty folder. Warnings of libraries depend on the machine, and are left out."""
    with tempfile.TemporaryDirectory() as folder:
        ExecutePreprocessor(timeout=1800).preprocess(notebook, {"metadata": {"path": folder}})
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        cell.metadata.pop("execution", None)


def shape(cell: nbformat.NotebookNode) -> list[str]:
    """What a cell shows, without figures and words that depend on the machine: lines of text, and kinds of
    output."""
    text = ""
    kinds = []
    for output in cell.get("outputs", []):
        text += output.get("text", "")  # one stream may come in pieces that end within a line
        kinds += sorted(output.get("data", {}))
    return [f"{len(text.splitlines())} lines", *kinds]


if __name__ == "__main__":
    for path in NOTEBOOKS:
        renewed = nbformat.read(path, as_version=4)
        execute(renewed)
        nbformat.write(renewed, path)
