"""Tables of the documentation from the registry and from results, which `quote.py` writes into the pages."""

import csv
import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import typer.main
from typer.cli import get_docs_for_click

from dcp_zoo.benchmark import report
from dcp_zoo.cli import app
from dcp_zoo.cli.options import recipe_help
from dcp_zoo.heads.config import NO_CLASSIFIER, read_config
from dcp_zoo.rejection import REFUSED
from dcp_zoo.training.methods import METHODS
from dcp_zoo.zoo.registry import WEIGHTS, trained_heads
from dcp_zoo.zoo.specs import MODELS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SUBMITTED = ROOT / "benchmarks" / "leaderboard"
UNBROKEN = re.compile(r"(?<=\d) (?=±)|(?<=±) (?=\d)|(?<=\d) (?=to [+-])|(?<=to) (?=[+-]\d)|(?<=\)) (?=\*)")
COMMANDS = """# Command line

What every command says to `--help`. The [pages of their topics](../README.md#documentation) show them at work.

"""


def as_table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (header, ["---"] * len(header), *rows))


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, in whose cells figures are not broken over lines."""
    return as_table(header, [[UNBROKEN.sub("\u00a0", str(cell)) for cell in row] for row in rows])


def labelled(name: str) -> pd.DataFrame:
    """A results file, ready for the report's tables."""
    return report.with_labels(pd.read_csv(RESULTS / f"{name}.csv"))


def models_table() -> str:
    with (RESULTS / "model_costs.csv").open() as file:  # of one model of each architecture
        costs = {MODELS[row["model"]].clip: row for row in csv.DictReader(file)}
    rows = []
    for spec in MODELS.values():
        clip = f"{spec.clip}/{spec.clip_pretrained}" if spec.clip else "bundled"
        cost = [f"{spec.parameters}", f"{spec.gflops:.0f}"]
        measured = costs.get(spec.clip)
        ms, mb = (float(measured[name]) for name in ("core_ms_per_image", "peak_mb")) if measured else (0.0, 0.0)
        cost += [f"{ms:.0f}", f"{mb / 1000:.1f}"] if measured else ["", ""]
        licence = spec.license or f"[see Hub](https://huggingface.co/{spec.clip_repo})"
        rows.append([f"`{spec.name}`", *spec.accuracies, *cost, f"{spec.image_size}", licence, clip])
    cost = ["parameters, M", "GFLOPs per image", "ms per image", "memory, GB"]
    return table(["model", "ten datasets, %", "ImageNet, %", *cost, "input, px", "licence", "open_clip"], rows)


def every_clip(column: str = "") -> int:
    """How many pairs of an architecture of open_clip and weights were tested, or work with what a column
    says."""
    with (RESULTS / "every_clip.csv").open() as file:
        return sum(len(row["tags"].split()) for row in csv.DictReader(file) if not column or row[column] == "yes")


def heads_table() -> str:
    heads = sorted(trained_heads().values(), key=lambda head: (head.model, head.dataset, head.shots, head.seed))
    rows = []
    for head in heads:
        config = read_config(WEIGHTS / head.name)
        top1 = (_percent(head.metrics, mode) for mode in (NO_CLASSIFIER, "stored", "batch"))
        rows.append([f"`{head.name}`", config["num_classes"], f"{config['dcp']['test_images']:,}", *top1, head.license])
    names = ["DCP alone", "with text probes", "the same, batch statistics"]
    return table(["head", "classes", "test images", *names, "licence"], rows)


def _percent(metrics: Mapping[str, float], stats: str) -> str:
    value = metrics.get(f"top1_{stats}")
    return "not measured" if value is None else f"{value:.1f}"


def methods_table() -> str:
    rows = [[f"`{m.name}`", "yes" if m.abilities.transfers else "no", m.reference] for m in METHODS.values()]
    return table(["name", "new classes", "paper"], rows)


def train_times() -> str:
    """What training costs, on the latest commit that was measured with each model."""
    times = pd.read_csv(RESULTS / "train_time.csv").drop_duplicates(["model", "method"], keep="last")
    cells = {(r.method, r.model): f"{r.processor_seconds:.0f} s, {r.peak_mb / 1000:.1f} GB" for r in times.itertuples()}
    models = times.model.unique()
    header = ["`dcp-zoo train` with 100 photographs of 5 classes", *models]
    return table(header, [[name, *(cells.get((name, m), "") for m in models)] for name in times.method.unique()])


def real_clip_summary() -> str:
    """Of the methods that a reader would compare, on the classes with text: 1, 4 and the most images per
    class."""
    rows = pd.read_csv(RESULTS / "real_clip.csv")
    rows = rows[rows.classes_used != "all, without text"]
    methods = ("zero-shot", "linear-probe", "lp-plus-plus", "text-probe")
    lines = []
    for dataset in ("imagenet", "caltech101", "sun397", "food101"):
        own = rows[rows.dataset == dataset]
        for shots in sorted({1, 4, own.shots.max()}):
            tested = own[own.shots == shots].images.max()  # of each draw of ImageNet there are others
            found = own[own.shots.isin([0, shots]) & (own.images == tested)].set_index("method").top1
            lines.append([dataset, shots, *(f"{found[m]:.1f}" if m in found else "-" for m in methods)])
    return as_table(["dataset", "images per class", *map(report.title, methods)], lines)


SPEED: dict[str, tuple[str, Callable[[Any, Any], float]]] = {  # unit and figure by the two look-ups of `speed_runs`
    "Fused inference, 100 classes, against `encode_image`": ("x", lambda run, _: run("fused") / run("encode_image")),
    "Fused inference, 1,000 classes: faster than plain": ("x", lambda run, _: run("plain", 1000) / run("fused", 1000)),
    "ONNX Runtime against fused in torch, 100 classes": ("x", lambda run, _: run("onnxruntime") / run("fused")),
    "Peak memory of the fused model against the image tower alone": (
        "x",
        lambda run, _: run("fused", column="peak_mb") / run("encode_image", column="peak_mb"),
    ),
    "Training step, 100 classes: faster than plain": ("x", lambda _, step: step("plain") / step("ours")),
    "The same, with bfloat16: faster than plain in float32": (
        "x",
        lambda _, step: step("plain") / step("ours-bfloat16"),
    ),
    "Training step, 1,000 classes: peak memory": ("GB", lambda _, step: step("ours", 1000, "peak_mb") / 1000),
    "Training step, 1,000 classes against 10": ("x", lambda _, step: step("ours", 1000) / step("ours", 10)),
    "Each additional class in a training step (ours 10 to 1,000, plain 10 to 100): faster than plain": (
        "x",
        lambda _, step: (step("plain") - step("plain", 10)) / 90 / ((step("ours", 1000) - step("ours", 10)) / 990),
    ),
}


def speed_runs(rows: pd.DataFrame, model: str) -> tuple[Any, Any]:
    """Look-ups in the rows of `speed.py`, by variant, number of classes and column: at batch 16, and in
    training."""
    found = rows[rows.model == model].set_index(["task", "batch", "variant", "classes"])

    def of(task: str, batch: int) -> Any:
        return lambda variant, classes=100, column="seconds": found[column].loc[task, batch, variant, classes]

    return of("inference", 16), of("training", 4)


def speed_files() -> list[Path]:
    """The last run, and those of other machines, `speed-MACHINE.csv` and .json."""
    return [RESULTS / "speed.csv", *sorted(RESULTS.glob("speed-*.csv"))]


def speed(start: str, machine: int = 0, model: str = "dcp_vitb16") -> float:
    """The figure of a statement of the speed page, named by its first words, on one of the machines."""
    runs = speed_runs(pd.read_csv(speed_files()[machine]), model)
    return next(figure(*runs) for text, (_, figure) in SPEED.items() if text.startswith(start))


def speed_table() -> str:
    """The figures of the speed benchmark, with a column for each machine."""
    machines = [json.loads(file.with_suffix(".json").read_text())["cpu"] for file in speed_files()]
    rows = [
        [text, *(f"{speed(text, i):.2f} {unit}" for i in range(len(machines)))] for text, (unit, _) in SPEED.items()
    ]
    return as_table(["ViT-B/16, inference at batch 16, training at batch 4", *machines], rows)


def like_accepted(head: str) -> float:
    """The estimated percentage of images of similar classes that a bundled head does not reject."""
    return read_config(WEIGHTS / head)["dcp"]["text_probe"]["like_accepted"][f"{REFUSED:g}"]


def leaderboard() -> str:
    """Few-shot results of this project, means over seeds, and of submissions: one row per setup, by
    shots."""
    own = labelled("few-shot")
    own = own.groupby(["dataset", "model", "label", "selection", "shots"], sort=False, as_index=False).top1.mean()
    rows = pd.concat([own, *map(_submitted, sorted(SUBMITTED.glob("*.json")))])
    rows["selection"] = rows.selection.replace("few-shot validation images", "validation")
    shots = sorted(set(rows.shots) - {0})
    lines = []
    for (dataset, model, *key), group in rows.groupby(["dataset", "model", "label", "selection"], sort=False):
        found = dict(zip(group.shots, group.top1, strict=True))
        cells = [found.get(k, found.get(0)) for k in shots]
        lines.append([f"{dataset}, {model}", *key, *("" if cell is None else f"{cell:.1f}" for cell in cells)])
    lines.sort(key=lambda line: (line[0], -float(line[-1] or 0)))
    return table(["dataset, model", "method", "chosen on", *map(str, shots)], lines)


def _submitted(path: Path) -> pd.DataFrame:
    """A submission: what was measured here, or else what its source reports."""
    entry = json.loads(path.read_text())
    measured = entry["measured"] is not None
    row = {name: entry[name] for name in ("dataset", "shots", "model", "selection")}
    by = "" if measured else ", as its authors report it"
    row |= {"label": f"[{entry['method']}]({entry['where']}){by}"}
    return pd.DataFrame([row | {"top1": entry["measured"] if measured else entry["reported"]}])


def predictor_costs(model: str) -> pd.DataFrame:
    """Processor seconds per image and to start, of the ways to call a Predictor and their number of
    processes: medians over turns, the bare loop first."""
    rows = pd.read_csv(RESULTS / "predictor.csv")
    rows = rows[(rows.model == model) & (rows.way != "road")]
    return rows.groupby(["way", "processes"], sort=False)[["seconds_per_image", "start_seconds"]].median()


def predictor_rate(way: str) -> float:
    """Images per second of processor time of one process with the miniature, beside the bare loop's."""
    found = predictor_costs("dcp_mini").seconds_per_image
    return found["bare loop", 1] / found[way, 1]


def commands() -> str:
    """The page with the help of every command; its examples, which are dim on the terminal, become code
    blocks."""
    command: Any = typer.main.get_command(app)
    command.commands["train"].epilog = recipe_help()  # otherwise of the method that is given
    every = [command, *(c for c in command.commands.values() if hasattr(c, "commands"))]
    first = [" ".join(re.split(r"(?<=\.)\s", c.help)[0].split()) for group in every for c in group.commands.values()]
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="dcp-zoo")
    text = re.sub(r"(?<=`: ).*", lambda match: match[0].replace("*", r"\*"), text)  # wildcards are no emphasis
    text = re.sub(r"(?:\[dim\].*?\[/\]\n*)+", _examples, text, flags=re.DOTALL)
    text = re.sub(r"\[bold\](.*?)\[/\]", r"**\1**", text.replace("# `dcp-zoo`\n", "", 1))
    for start in re.findall(r"^\* `[\w-]+`: (.*)\.\.\.$", text, flags=re.MULTILINE):  # Typer shortens them
        text = text.replace(f"{start}...\n", f"{next(help for help in first if help.startswith(start.strip()))}\n")
    return COMMANDS + text.replace("```console\n$ ", "```text\n").strip()


def _examples(match: re.Match[str]) -> str:
    lines = (re.sub(r"\s*\n\s*", " ", line) for line in re.findall(r"\[dim\](.*?)\[/\]", match[0], flags=re.DOTALL))
    return "\n```text\n" + "\n".join(lines) + "\n```\n\n"


def names(module: str, listed: str) -> str:
    """Public names of a module with their parameters, and the first sentence of what each says of itself. On
    the site, the whole reference takes the place of this list."""
    lines = []
    for name in listed.split():
        found = getattr(import_module(module), name)
        first = re.split(r"(?<=\.)\s|:\n|\n\n", inspect.getdoc(found) or "")[0].replace("\n", " ")
        signature = f"`{parameters(found)}`" if callable(found) else ""
        lines.append(f"- **`{module}.{name}`**{signature}\n  {first}")
    return "\n".join(lines)


def parameters(called: Any) -> str:
    """The parameters of a function or a class and their defaults, without types."""
    signature = inspect.signature(called)
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    text = str(signature.replace(parameters=plain, return_annotation=signature.empty))
    return re.sub(r"<(?:function|class) '?(?:\w+\.)*(\w+).*?>", r"\1", text)
