"""The paper's experiments beside few-shot classification, which `many_sets.py` measures: other styles, other
classes, and what its parts are worth.

    python benchmarks/paper.py features FEATURES               methods on features of `baselines.py`
    python benchmarks/paper.py prompts --data-root DATA        methods that train prompts or weights
    python benchmarks/paper.py parts --data-root DATA          the paper's recipe with one change at a time
    python benchmarks/paper.py coupling --data-root DATA       what CMPA is worth
    python benchmarks/paper.py coupling-elsewhere --data-root DATA       the same in other styles and new classes

The first two write results/transfer.csv, the others results/parts.csv, results/coupling.csv and
results/coupling_elsewhere.csv. All resume, and measure one draw of everything before the next. Draws and
test images are those of `many_sets.py`, sets those of `sets.py`.

A method that trains is read by its own logits, and with the text probes that follow it by default. A text
probe is also read "without gate": the text then has no say beyond the probe's, however far an image is from
what it has seen. The gate was chosen on PACS' photographs, art paintings and cartoons, and on Caltech-101.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Annotated, Any

import torch
import typer
from baselines import Known
from growing import GrowingTable
from many_sets import MODEL, RESULTS, draw, frozen_clip, test_images
from reads import READINGS
from sets import REPORTING, SETS, Pool
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.backbone.classes import TEMPLATE
from dcp_zoo.backbone.clip import parts_of
from dcp_zoo.benchmark.plan import weights_id
from dcp_zoo.cli.console import progress_bar
from dcp_zoo.data import Split
from dcp_zoo.data.splits import subsample_classes
from dcp_zoo.features.loader import ImageLoader
from dcp_zoo.heads.head import Head
from dcp_zoo.prediction.heads import outputs_of_loader
from dcp_zoo.training.evaluation import EVAL_BATCH, top1
from dcp_zoo.training.methods import METHODS, fit_head
from dcp_zoo.training.methods.text_probe import fit_probe, on_cpu
from dcp_zoo.training.recipes import AUTHORS, Recipe
from dcp_zoo.training.run import Source, plan
from dcp_zoo.training.task import Task

STYLES = ("PACS, photos", "PACS, art paintings", "PACS, cartoons", "PACS, sketches")
OTHERS = ("flowers", "EuroSAT", "groceries", "scenes", "hand signs", "corn leaves", *STYLES)
# protocols
NEW = "base-to-new"
CROSS = "cross-dataset"
SHIFT = "domain-shift"
TRAINED = [*((SHIFT, name) for name in STYLES), (NEW, "Caltech-101"), (NEW, "flowers"), (CROSS, "Caltech-101")]
ON_FEATURES = ("zero-shot", "linear-probe", "gda", "lp-plus-plus", "clap", "text-probe")
NAMED = {"dcp, paper": "paper", "dcp, release": "release"}
PROMPTS = ("dcp", "coop", "maple", "promptsrc", "dcp, paper", "dcp, release", "clip-lora")
IMAGES = 16  # per class
ALL = READINGS["embedding, backbone, inside"]  # what a text probe of the miniature reads
HEAD = "weights protocol trained_on images_per_class seed method".split()
TRANSFER = [*HEAD, "reading", "target", "top1", "test_images", "cpu_seconds"]
PARTS = "weights set images_per_class seed changes stats top1 test_images cpu_seconds".split()
FEW = {"PACS, photos": 4, "EuroSAT": 2, "groceries": 2}  # images per class of `parts`
CHANGES: tuple[Mapping[str, Any], ...] = (
    *({}, {"coupling": "text_to_vision"}, {"share_cmpa": False}, {"pooling": "max"}, {"pooling": "first"}),
    *({"depth": depth} for depth in (1, 3)),
    *({"n_ctx": n} for n in (2, 4, 8)),
)
COUPLED = "weights set images_per_class seed method changes top1 test_images trained_parameters cpu_seconds".split()
ELSEWHERE = "weights protocol trained_on seed method changes target top1 test_images cpu_seconds".split()
PROMPTED: Sequence[tuple[str, Mapping[str, Any]]] = (  # the most telling first
    *(("dcp", {"coupling": coupling}) for coupling in ("bidirectional", "self", "none")),
    *((method, {}) for method in ("zero-shot", "ivlp", "vpt-deep", "coop", "kgcoop", "prograd", "cocoop")),
    *(("dcp", {"coupling": coupling}) for coupling in ("text_to_vision", "vision_to_text")),
    ("ivlp", {"n_ctx": 16}),  # as many prompts as DCP has
)
CROSS_ENTROPY = {"clip_reg": 0.0}  # the paper's loss, and that of the other methods
app = typer.Typer()
Data = Annotated[Path, typer.Option(help="Folder with the sets, see sets.py.")]
Draws = Annotated[int, typer.Option(help="Draws of training images.")]
Test = tuple[Sequence[str], ImageLoader]  # class names, and images


@app.command()
def features(kept: Annotated[Path, typer.Argument(help="As `baselines.py` keeps them.")], draws: Draws = 5) -> None:
    """Measure methods on image features, with 4 and 16 images per class, on the sets whose features are
    there."""
    there = [name for name in SETS if (kept / f"{name}.npz").exists()]
    read = {reading: {name: Known(kept / f"{name}.npz", reading) for name in there} for reading in ("x", ALL)}
    for known in read.values():  # any may read any class
        texts = {name: text for each in known.values() for name, text in each.clip.given_texts.items()}
        for each in known.values():
            each.clip.given_texts = texts
    table = GrowingTable(RESULTS / "transfer.csv", TRANSFER, HEAD)
    cells = product(range(1, draws + 1), (IMAGES, 4), TRAINED, ON_FEATURES)
    for seed, images, (protocol, name), method in cells:
        key = (weights_id(MODEL), protocol, name, images, seed, method)
        targets = targets_of(protocol, name)
        if key in table or not applies(method, protocol) or not {*there} >= {*targets}:
            continue
        known = read[ALL if method == "text-probe" else "x"]
        own = known[name]
        split = of_part(own.drawn(images, seed), protocol)
        task = Task(own.clip, MODEL, split.classnames, TEMPLATE, own.images(split.train), None, None, seed)
        task.recipe = METHODS[method].recipe(MODEL, "folder", images, protocol)
        pools = {target: (known[target].names, known[target].test) for target in targets}
        table.add((*key, *row) for row in measured(method, task, tests_of(protocol, pools)))


@app.command()
def prompts(
    data_root: Data,
    draws: Draws = 3,
    methods: Annotated[str, typer.Option(help="Separated by semicolons.")] = "; ".join(PROMPTS),
    protocols: Annotated[str, typer.Option(help="Separated by semicolons.")] = "; ".join((SHIFT, NEW, CROSS)),
) -> None:
    """Measure methods that train prompts or weights, with 16 images per class."""
    table = GrowingTable(RESULTS / "transfer.csv", TRANSFER, HEAD)
    with TemporaryDirectory() as folder:
        pools = Pools(data_root, Path(folder))
        for seed, method, (protocol, name) in product(range(1, draws + 1), methods.split("; "), TRAINED):
            key = weights_id(MODEL), protocol, name, IMAGES, seed, method
            if key in table or not applies(method, protocol) or protocol not in protocols:
                continue
            split = of_part(draw(pools[name], IMAGES, seed), protocol)
            first = method.split(",")[0]
            recipe = METHODS[first].recipe(MODEL, "folder", IMAGES, protocol)
            recipe = Recipe(**AUTHORS[NAMED[method]]) if method in NAMED else recipe
            run = plan(split, MODEL, first, seed=seed, recipe=recipe, classifier="none", device="cpu")
            tested = {target: (pools[target][0], test_of(pools[target])) for target in targets_of(protocol, name)}
            task = run.task(Source(run, progress_bar, frozen_clip()))
            table.add((*key, *row) for row in measured(first, task, tests_of(protocol, tested)))


@app.command()
def parts(data_root: Data, draws: Draws = 2) -> None:
    """Measure the paper's recipe, and with one change at a time."""
    table = GrowingTable(RESULTS / "parts.csv", PARTS, PARTS[:5])
    with TemporaryDirectory() as folder:
        pools = Pools(data_root, Path(folder))
        for seed, changes, (name, images) in product(range(1, draws + 1), CHANGES, FEW.items()):
            changed = as_text(changes)
            key = (weights_id(MODEL), name, images, seed, changed)
            if key in table:
                continue
            split = without_validation(draw(pools[name], images, seed))
            started = process_time()
            test = test_images(tuple(split.test))
            rows = list[Sequence[Any]]()
            run = plan(split, MODEL, "dcp", seed=seed, recipe="paper", changes=changes, device="cpu")
            head: Any = fit_head("dcp", run.task(Source(run, clip=frozen_clip())))
            seconds = round(process_time() - started, 1)
            for head.stats in ("stored", "batch"):
                logits = torch.from_numpy(outputs_of_loader(head, test, run.recipe.eval_batch_size).logits)
                rows.append((*key, head.stats, top1(logits, test.labels), len(logits), seconds))
            table.add(rows)


@app.command()
def coupling(data_root: Data, draws: Draws = 3) -> None:
    """Measure DCP's couplings and methods whose prompts are not coupled, with 4 and 16 images per class, by
    one budget: the miniature's recipes, all with cross-entropy as their loss and without a text probe."""
    table = GrowingTable(RESULTS / "coupling.csv", COUPLED, COUPLED[:6])
    with TemporaryDirectory() as folder:
        pools = Pools(data_root, Path(folder))
        cells = product(range(1, draws + 1), (4, IMAGES), PROMPTED, REPORTING)
        for seed, images, (method, changes), name in cells:
            changed = as_text(changes)
            key = (weights_id(MODEL), name, images, seed, method, changed)
            if key in table:
                continue
            split = without_validation(draw(pools[name], images, seed))
            head, seconds = trained(split, method, changes, seed)
            test = test_images(tuple(split.test))
            logits = torch.from_numpy(outputs_of_loader(head, test, EVAL_BATCH).logits)
            own = head.to_state()
            sizes = (parameter.numel() for part, parameter in head.named_parameters() if part in own)
            table.add([(*key, top1(logits, test.labels), len(logits), sum(sizes), seconds)])


@app.command()
def coupling_elsewhere(data_root: Data, draws: Draws = 3) -> None:
    """Measure what `coupling` does in other styles and on new classes, with 16 images per class."""
    table = GrowingTable(RESULTS / "coupling_elsewhere.csv", ELSEWHERE, ELSEWHERE[:6])
    trained_on = [(protocol, name) for protocol, name in TRAINED if protocol != CROSS]
    with TemporaryDirectory() as folder:
        pools = Pools(data_root, Path(folder))
        for seed, (method, changes), (protocol, name) in product(range(1, draws + 1), PROMPTED, trained_on):
            changed = as_text(changes)
            key = (weights_id(MODEL), protocol, name, seed, method, changed)
            if key in table or not applies(method, protocol):
                continue
            split = of_part(draw(pools[name], IMAGES, seed), protocol)
            head, seconds = trained(split, method, changes, seed)
            tested = {target: (pools[target][0], test_of(pools[target])) for target in targets_of(protocol, name)}
            rows = list[Sequence[Any]]()
            for target, test, labels in for_each_test(head, tests_of(protocol, tested)):
                logits = torch.from_numpy(outputs_of_loader(head, test, EVAL_BATCH).logits)
                rows.append((*key, target, top1(logits, labels), len(logits), seconds))
            table.add(rows)


class Pools(dict[str, Pool]):
    """The sets that are asked for, whose images lie in a folder."""

    def __init__(self, data: Path, folder: Path) -> None:
        super().__init__()
        self.places = data, folder

    def __missing__(self, name: str) -> Pool:
        self[name] = SETS[name](*self.places)
        return self[name]


def as_text(changes: Mapping[str, Any]) -> str:
    """Changes to a recipe, as a table has them."""
    return ", ".join(f"{option}={value}" for option, value in changes.items())


def trained(split: Split, method: str, changes: Mapping[str, Any], seed: int) -> tuple[Head, float]:
    """A head of `PROMPTED`, and the CPU seconds of its training."""
    if method == "dcp":
        changes = CROSS_ENTROPY | changes
    run = plan(split, MODEL, method, seed=seed, changes=changes, classifier="none", device="cpu")
    task = run.task(Source(run, clip=frozen_clip()))
    started = process_time()
    head = fit_head(method, task)
    return head, round(process_time() - started, 1)


def applies(method: str, protocol: str) -> bool:
    """Whether a method can be tested so."""
    return protocol == SHIFT or METHODS[method.split(",")[0]].abilities.transfers


def targets_of(protocol: str, name: str) -> Sequence[str]:
    """The sets to test on after training on one."""
    return {SHIFT: STYLES, NEW: (name,), CROSS: (name, *OTHERS)}[protocol]


def without_validation(split: Split) -> Split:
    return Split(split.name, split.classnames, split.train, [], split.test)


def of_part(split: Split, protocol: str) -> Split:
    """What is trained on: all classes or the base ones, without validation images."""
    return subsample_classes(without_validation(split), "base" if protocol == NEW else "all")


def test_of(pool: Pool) -> ImageLoader:
    """The test images of a set, which are the same in all draws."""
    return test_images(tuple(draw(pool, 1, 1).test))


def tests_of(protocol: str, pools: Mapping[str, Test]) -> dict[str, Test]:
    """The tests by what the table calls them: of one set its base and its new classes."""
    if protocol != NEW:
        return dict(pools)
    ((names, test),) = pools.values()
    half = -(-len(names) // 2)
    rows = {"base": test.labels < half, "new": test.labels >= half}
    halves = {"base": names[:half], "new": names[half:]}
    return {part: (halves[part], test.of(of.nonzero().flatten().tolist())) for part, of in rows.items()}


def measured(method: str, task: Task, tests: Mapping[str, Test]) -> Iterator[tuple[Any, ...]]:
    """Reading, target, top-1, test images and CPU seconds of training, of every way to read a head."""
    started = process_time()
    head: Any = fit_head(method, task)
    if not head.text_probe and method not in ON_FEATURES:
        fit_probe(head, task.images)
    seconds = round(process_time() - started, 1)
    for target, test, labels in for_each_test(head, tests):
        for reading, logits in answers(head, test):
            yield reading, target, top1(logits, labels), len(logits), seconds


def for_each_test(head: Any, tests: Mapping[str, Test]) -> Iterator[tuple[str, ImageLoader, Tensor]]:
    """Each target with its images and labels, while the head has the target's classes."""
    for target, (names, test) in tests.items():
        if list(names) != head.classnames:
            head.set_classnames(names)
        first = test.labels.min() if target == "new" else 0  # classes that are counted from the middle
        yield target, test, test.labels - first


def answers(head: Any, test: ImageLoader) -> Iterator[tuple[str, Tensor]]:
    """The logits of images by every way to read a head."""
    outputs = outputs_of_loader(head, test, EVAL_BATCH)
    assert outputs.features is not None
    logits = torch.from_numpy(outputs.logits)
    features = torch.from_numpy(outputs.features)
    if not head.text_probe:
        yield "", logits
        return
    if head.method != "text-probe":
        weight, bias = on_cpu(head.method_linear())
        yield "", F.linear(features[:, : weight.shape[1]] * parts_of(head.readings) ** 0.5, weight, bias)
    yield "text probes", logits
    gate = head.text_probe.gate
    head.text_probe.gate = head.text_probe.gate[:0]
    with torch.no_grad():
        yield "text probes, without gate", head.classify(features)
    head.text_probe.gate = gate


if __name__ == "__main__":
    app()
