"""Accuracies of few-shot methods that others have published for each dataset, on OpenAI's models, by the protocols of
`dcp-zoo benchmark`: `dcp_zoo/benchmark/published.csv`, which `dcp-zoo report` shows beside measured results.

    python benchmarks/published_methods.py CHECKOUTS

CHECKOUTS has a clone of each repository of `SOURCES`, named OWNER+NAME; its file is read at the commit that stands
there. Nothing here was measured by this project. Seed 0: the source gives a mean, over three draws where it says so.
Rows are left out where the source adapts to test images, and those of zero-shot CLIP, of which it does not name the
prompts.
"""

import csv
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parents[1] / "dcp_zoo" / "benchmark" / "published.csv"
COLUMNS = "protocol,model,weights,method,dataset,shots,seed,target,classes,top1,repository,commit,file,note".split(",")
MODELS = {"ViT-B/16": "dcp_vitb16", "ViT-B/32": "dcp_vitb32"}
DATASETS = {  # as the sources write them, without case and punctuation
    "imagenet": "imagenet",
    "caltech": "caltech101",
    "caltech101": "caltech101",
    "pets": "oxford_pets",
    "oxfordpets": "oxford_pets",
    "cars": "stanford_cars",
    "stanfordcars": "stanford_cars",
    "flowers": "oxford_flowers",
    "flowers102": "oxford_flowers",
    "oxfordflowers": "oxford_flowers",
    "food": "food101",
    "food101": "food101",
    "aircraft": "fgvc_aircraft",
    "fgvcaircraft": "fgvc_aircraft",
    "fgvc": "fgvc_aircraft",
    "sun": "sun397",
    "sun397": "sun397",
    "dtd": "dtd",
    "eurosat": "eurosat",
    "ucf": "ucf101",
    "ucf101": "ucf101",
    "imagenetv2": "imagenetv2",
    "inv2": "imagenetv2",
    "imagenets": "imagenet_sketch",
    "imagenetsketch": "imagenet_sketch",
    "insketch": "imagenet_sketch",
    "imageneta": "imagenet_a",
    "ina": "imagenet_a",
    "imagenetr": "imagenet_r",
    "inr": "imagenet_r",
}
MEAN = 0  # in place of a seed


class Figure(NamedTuple):
    protocol: str
    model: str
    method: str
    dataset: str
    shots: int
    seed: int
    target: str
    classes: str
    top1: float


Reader = Callable[[str], Iterator[Figure]]


def dataset(name: str) -> str:
    return DATASETS[re.sub(r"\W|_", "", name).lower()]


def runs(log: str) -> Iterator[tuple[str, str, str]]:
    """The model, the dataset and the text of each run in a log of GDA, without models that the zoo has not."""
    for text in log.split("Running configs.")[1:]:
        found = re.search(r"'dataset': '(\w+)', 'shots': 16, 'backbone': '([\w/-]+)'", text)
        assert found
        if found[2] in MODELS:
            yield MODELS[found[2]], dataset(found[1]), text


def gda_few_shot(log: str) -> Iterator[Figure]:
    for model, name, text in runs(log):
        for seed, top1 in re.findall(r"^seed (\d) \[([\d.]+)\]", text, re.MULTILINE):
            yield Figure("few-shot", model, "GDA", name, 16, int(seed), name, "all", float(top1))


def gda_base_to_new(log: str) -> Iterator[Figure]:
    for model, name, text in runs(log):
        for seed, *both in re.findall(r"seed: (\d), base_acc: ([\d.]+) \t new_acc: ([\d.]+)", text):
            for classes, top1 in zip(("base", "new"), both, strict=True):
                yield Figure("base-to-new", model, "GDA", name, 16, int(seed), name, classes, float(top1))


def gda_domain_shift(log: str) -> Iterator[Figure]:
    for model, name, text in runs(log):
        (listed,) = re.findall(r"source & target dataset: \[(.*)\]", text)
        for seed, values in re.findall(r"^seed (\d) \[(.*)\]", text, re.MULTILINE):
            for target, top1 in zip(listed.split(","), values.split(","), strict=True):
                yield Figure("domain-shift", model, "GDA", name, 16, int(seed), dataset(target), "all", float(top1))


def table(page: str, heading: str) -> Iterator[dict[str, str]]:
    """The rows of the first table below a heading, by its columns; what stands in links and bold without these."""
    lines = page[page.index(heading) :].splitlines()
    header: list[str] = []
    for line in lines[1:]:
        if "|" not in line and header:
            return
        cells = [
            re.sub(r"\[([^\]]*)\]\([^)]*\)|\*", r"\1", cell).strip() for cell in line.strip().strip("|").split("|")
        ]
        if len(cells) > 1 and not header:
            header = cells
        elif header and not re.fullmatch(r"[-: ]+", cells[0]):
            yield dict(zip(header, cells, strict=True))


def plot(page: str) -> Iterator[Figure]:
    for row in table(page, "## Evaluation"):
        name = dataset(row.pop("Dataset"))
        for shots in (1, 2, 4, 8, 16):
            yield Figure(
                "few-shot", "dcp_vitb16", "PLOT++", name, shots, MEAN, name, "all", float(row[f"{shots}shots"])
            )


def few_shot_table(heading: str, methods: tuple[str, ...], seed: int = MEAN) -> Reader:
    """Of 16 images per class: methods by datasets."""

    def read(page: str) -> Iterator[Figure]:
        for row in table(page, heading):
            method = row.pop("Dataset")
            if method in methods:
                for column, top1 in row.items():
                    if column != "Average":
                        name = dataset(column)
                        yield Figure("few-shot", "dcp_vitb16", method, name, 16, seed, name, "all", float(top1))

    return read


def shift_table(heading: str, column: str, methods: tuple[str, ...]) -> Reader:
    """Of 16 images per class of ImageNet: methods by its variants."""

    def read(page: str) -> Iterator[Figure]:
        for row in table(page, heading):
            method = row.pop(column)
            if method in methods:
                for target, top1 in row.items():
                    if not target.endswith("Average"):
                        where = dataset(target)
                        yield Figure(
                            "domain-shift", "dcp_vitb16", method, "imagenet", 16, MEAN, where, "all", float(top1)
                        )

    return read


class Source(NamedTuple):
    repository: str
    commit: str
    file: str
    read: Reader
    note: str


GDA = "mrflogs/ICLR24", "560fe211700964c915442ff98dbe47dd09656a35"
GALLOP = "MarcLafon/gallop", "f75999e1601cc66e44bc6ff6faa8612021055ff3", "README.md"
CHOSEN = "by the authors, on draws of their own; alpha chosen on all validation images"
SOURCES = (
    Source(*GDA, "logs/architecture.log", gda_few_shot, f"{CHOSEN}, of ImageNet on the test images"),
    Source(*GDA, "logs/base2new.log", gda_base_to_new, f"{CHOSEN} of the base classes"),
    Source(*GDA, "logs/robustness.log", gda_domain_shift, "by the authors, on draws of their own"),
    Source("CHENGY12/PLOT", "728539feac3f8471a1663ce79020b236880e5e7b", "plot-pp/README.md", plot, "by the authors"),
    Source(
        *GALLOP,
        few_shot_table("## Few-shots classification results", ("CoOp", "PromptSRC", "GalLoP")),
        "as the authors of GalLoP list them",
    ),
    Source(
        *GALLOP,
        shift_table("## Imagenet domain generalization", "Dataset", ("CoOp", "PLOT", "PromptSRC", "GalLoP")),
        "as the authors of GalLoP list them",
    ),
    Source(
        "jameelhassan/PromptAlign",
        "929056429ddbe9da449e7e55d3b16e267089a29c",
        "README.md",
        shift_table("#### Domain Generalization", "Method", ("CoOp", "CoCoOp", "MaPLe")),
        "as the authors of PromptAlign list them, without ImageNet itself",
    ),
    Source(
        "sdc17/CrossGET",
        "dc3297534ecc2cbd7c0d3806df3e6426dc5c1a53",
        "README.md",
        few_shot_table("the following scripts to evaluate.\n\n    ```bash\n    # Second last", ("CoOp",), seed=1),
        "as the authors of CrossGET list it; their script has one seed",
    ),
)


def main(checkouts: str) -> None:
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for source in SOURCES:
            clone = Path(checkouts, source.repository.replace("/", "+"))
            show = ["git", "-C", str(clone), "show", f"{source.commit}:{source.file}"]
            text = subprocess.run(show, check=True, capture_output=True, text=True).stdout
            for figure in source.read(text):
                protocol, model, *others = figure._replace(top1=round(figure.top1, 2))
                where = (source.repository, source.commit, source.file, source.note)
                writer.writerow([protocol, model, "openai", *others, *where])


if __name__ == "__main__":
    main(*sys.argv[1:])
