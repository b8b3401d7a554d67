"""What mkdocs adds while it builds the pages: tables from the registry and from results, and pages made from code.

A line `<!-- table: NAME -->` in a page is replaced with the table that `TABLES[NAME]` makes, and a line
`<!-- results: FILE PART -->` with tables of `benchmarks/results/FILE.csv`: its accuracy, its `ece` or `nll` (few-shot
only), its differences from the text probe, or the effect of changed options.
"""

import csv
import re
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import typer
import typer.main
from leaderboard import leaderboard
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import ExecutePreprocessor
from typer.cli import get_docs_for_click

import dcp_zoo
from dcp_zoo.api.explain import coupling_moves, draw
from dcp_zoo.benchmark.report import paired, tables
from dcp_zoo.benchmark.report.figures import LearningCurves
from dcp_zoo.cli.app import app
from dcp_zoo.data import DATASETS
from dcp_zoo.training.methods import METHODS
from dcp_zoo.zoo.registry import MODELS, SHOTS, trained_heads

DOCS = Path(__file__).parent
ROOT = DOCS.parent
RESULTS = ROOT / "benchmarks" / "results"
NOTEBOOK = DOCS / "first_steps.ipynb"
UNBROKEN = re.compile(r"(?<=\d) (?=±)|(?<=±) (?=\d)|(?<=\d) (?=to [+-])|(?<=to) (?=[+-]\d)|(?<=\)) (?=\*)")

# ------------------------------------------------------------------------------------------------------ generated files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and pictures that are made from something else."""
    page, pictures = run_notebook(NOTEBOOK)
    made: dict[str, str | bytes] = {
        "cli.md": command_line(),
        "demo.png": (ROOT / "hub/space/demo.png").read_bytes(),
        "explained.png": explained("dcp_mini.caltech101-16shot"),
        "first_steps.md": page,
        "index.md": home(),
        "inspection.png": (ROOT / "hub/inspection.png").read_bytes(),
        "miniature.md": (ROOT / "hub/recipes/miniature/README.md").read_text(),
        "predictions.png": (ROOT / "hub/predictions.png").read_bytes(),
        **pictures,
        **curves(),
    }
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def home() -> str:
    """README as the home page, its links as they are inside `docs`."""
    text = re.sub(r"\]\((?:docs|hub)/([\w.]+(?:#[\w-]+)?)\)", r"](\1)", (ROOT / "README.md").read_text())
    text = re.sub(r"\]\(([A-Z]+\.md)\)", lambda match: match[0].lower(), text)
    return text.replace(".ipynb)", ".md)").replace("[CITATION.cff](CITATION.cff)", "`CITATION.cff`")


def command_line() -> str:
    """Help of every command as Markdown; its examples, which are dim on the terminal, become code blocks."""
    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="dcp-zoo")
    text = re.sub(r"(?<=`: ).*", lambda match: match[0].replace("*", r"\*"), text)  # wildcards are no emphasis
    text = re.sub(r"(?:\[dim\].*?\[/\]\n*)+", _examples, text, flags=re.DOTALL)
    return "# Command line\n\n" + re.sub(r"\[bold\](.*?)\[/\]", r"**\1**", text.replace("# `dcp-zoo`\n", "", 1))


def _examples(match: re.Match) -> str:
    lines = (re.sub(r"\s*\n\s*", " ", line) for line in re.findall(r"\[dim\](.*?)\[/\]", match[0], flags=re.DOTALL))
    return "\n```bash\n" + "\n".join(lines) + "\n```\n\n"


@cache
def run_notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """The notebook, run from top to bottom in an empty folder, as a page and its pictures; a cell that fails raises."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        ExecutePreprocessor(timeout=1800).preprocess(notebook, {"metadata": {"path": folder}})
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        # warnings of libraries depend on the machine
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    page, resources = MarkdownExporter().from_notebook_node(notebook, {"unique_key": path.stem})
    return page, resources["outputs"]


@cache
def explained(head: str) -> bytes:
    """The figure of `dcp-zoo explain`."""
    model = dcp_zoo.create_model(head, pretrained=True).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "coupling.png"
        draw(coupling_moves(model), path, f"{head}: how far CMPA moves the prompts")
        return path.read_bytes()


# ------------------------------------------------------------------------------------------------------------- tables


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Replace the lines that stand for tables; an unknown name is a KeyError."""
    markdown = re.sub(r"<!-- table: ([\w-]+) -->", lambda match: TABLES[match[1]](), markdown)
    return re.sub(r"<!-- results: ([\w-]+) (\w+) -->", lambda match: result_tables(match[1], match[2]), markdown)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, in whose cells figures are not broken over lines."""
    lines = [header, ["---"] * len(header), *[[UNBROKEN.sub("\u00a0", str(cell)) for cell in row] for row in rows]]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def results(name: str) -> pd.DataFrame | None:
    """A committed results file, ready for the report's tables; None if there is none yet."""
    path = RESULTS / f"{name}.csv"
    return tables.with_labels(pd.read_csv(path)) if path.is_file() else None


def result_tables(name: str, part: str) -> str:
    """Tables of the report for a file; all but those of changed options leave these out."""
    rows = results(name)
    if rows is None:
        return "*Not measured yet.*"
    if part == "options":
        made = paired.options_against_default(rows[rows.stats != "batch"])
        # without training times, which are of a busy machine
        made = [replace(t, header=t.header[:-1], rows=[row[:-1] for row in t.rows]) for t in made]
    elif part == "differences":
        made = paired.against(unchanged(rows), "Text probe")
    elif part in ("ece", "nll"):
        made = tables.few_shot_tables(unchanged(rows), part)
    else:
        made = ACCURACIES[rows.protocol.iloc[0]](unchanged(rows))
    return "\n\n".join(f"**{t.caption}**\n\n{table(t.header, t.rows)}\n\n{t.note}" for t in made)


def unchanged(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of methods as they are, without changed options."""
    return rows[rows.options == ""]


def curves() -> dict[str, str]:
    """The figure of the few-shot results."""
    rows = results("few-shot")
    if rows is None:
        return {}
    return {"curves.svg": LearningCurves(unchanged(rows)).file()}


def models_table() -> str:
    rows = []
    for spec in MODELS.values():
        clip = f"open_clip {spec.clip}, {spec.clip_pretrained}" if spec.clip else "the bundled miniature"
        trained = sum(head.model == spec.name for head in trained_heads().values())
        size = [
            f"{spec.parameters} M",
            f"{spec.gflops:.0f}",
            spec.license or f"[see Hub](https://huggingface.co/{spec.clip_repo})",
        ]
        rows.append([f"`{spec.name}`", clip, f"{spec.image_size} px", *size, trained or "none yet"])
    return table(["model", "CLIP", "input", "parameters", "GFLOPs per image", "licence", "trained heads"], rows)


def every_clip_table() -> str:
    """What works on each architecture of open_clip, and with how many of its weights."""
    with (RESULTS / "every_clip.csv").open() as file:
        rows = list(csv.DictReader(file))
    pairs = [len(row["tags"].split()) for row in rows]
    dcp, features = (sum(n for row, n in zip(rows, pairs, strict=True) if row[k] == "yes") for k in ("dcp", "features"))
    lines = [[f"`{row['architecture']}`", n, row["dcp"], row["features"]] for row, n in zip(rows, pairs, strict=True)]
    total = f"Of {sum(pairs)} pairs of architecture and weights, {dcp} work with DCP and {features} with features."
    return f"{total}\n\n{table(['architecture', 'weights', 'DCP', 'features'], lines)}"


def heads_table() -> str:
    rows = [
        [f"`{head.name}`", head.status, *(_percent(head.metrics, c) for c in ("stored", "batch")), head.license]
        for head in sorted(trained_heads().values(), key=lambda head: (head.model, head.dataset, head.shots, head.seed))
    ]
    return table(["head", "status", "stored statistics", "batch statistics", "licence"], rows)


def _percent(metrics: dict[str, float], stats: str) -> str:
    value = metrics.get(f"top1_{stats}")
    return "not measured" if value is None else f"{value:.1f}"


def datasets_table() -> str:
    rows = [
        [f"`{name}`", DATASETS[name].num_classes, ", ".join(f"`{name}-{k}shot`" for k in SHOTS)]
        for name in dcp_zoo.list_datasets()
    ]
    return table(["dataset", "classes", "tags"], rows)


def methods_table() -> str:
    rows = [[f"`{m.name}`", m.title, "yes" if m.transfers else "no", m.reference] for m in METHODS.values()]
    return table(["name", "method", "new classes", "paper"], rows)


def columns_table(name: str, columns: dict[str, str]) -> str:
    """Some columns of a results file under other names, medians over the turns of each part if it has turns."""
    path = RESULTS / f"{name}.csv"
    if not path.is_file():
        return "*Not measured yet.*"
    rows = pd.read_csv(path)
    if "turn" in rows:
        rows = rows.groupby("part", sort=False).median(numeric_only=True).round(1).reset_index()
    shown = rows[list(columns)].astype(object).where(rows[list(columns)].notna(), "")
    return table(list(columns.values()), shown.values.tolist())


def real_clip_table(with_text: bool) -> str:
    """Accuracies on the real CLIP's features, with the calibration error if text is used: methods by shots."""
    rows = pd.read_csv(RESULTS / "real_clip.csv")
    rows = rows[(rows.classes_used != "all, without text") == with_text]
    shots, lines = sorted(rows.shots.unique()), []
    for (dataset, used, method), group in rows.groupby(["dataset", "classes_used", "method"], sort=False):
        found = {row.shots: f"{row.top1:.1f}" + f" ({row.ece:.1f})" * with_text for row in group.itertuples()}
        found |= dict.fromkeys(shots, found[0]) if 0 in found else {}
        name = f"{dataset}, named classes" if used == "named" else dataset
        lines.append([name, tables.title(method), *(found.get(k, "") for k in shots if k)])
    return table(["dataset", "method", *(f"{k} shot{'s' if k != 1 else ''}" for k in shots if k)], lines)


ACCURACIES = {
    "few-shot": tables.few_shot_tables,
    "base-to-new": tables.base_to_new_tables,
    "domain-shift": lambda rows: tables.target_tables(rows, "domain-shift"),
}
FORMATS = {
    "format": "file",
    "mb": "size",
    "speed": "speed",
    "difference": "difference",
    "same_answer": "same answer",
    "top1": "top-1",
}
SERVING = {
    "part": "",
    "per_second": "images per second",
    "per_cpu_second": "images per second of processor time",
    "p50_ms": "median, ms",
    "p99_ms": "99th percentile, ms",
    "failures": "wrong answers",
    "rss_before_mb": "memory before, MB",
    "rss_after_mb": "memory after, MB",
}
TABLES = {
    "leaderboard": leaderboard,
    "every-clip": every_clip_table,
    "models": models_table,
    "heads": heads_table,
    "datasets": datasets_table,
    "methods": methods_table,
    "real-clip": lambda: real_clip_table(with_text=False),
    "real-clip-text": lambda: real_clip_table(with_text=True),
    "formats": lambda: columns_table("formats", FORMATS),
    "serving": lambda: columns_table("serving", SERVING),
}
