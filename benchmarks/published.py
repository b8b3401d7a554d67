"""Zero-shot accuracies that others have published for the zoo's models: `results/published.csv`.

    python benchmarks/published.py OPEN_CLIP MOBILECLIP

The folders are checkouts of mlfoundations/open_clip and apple/ml-mobileclip. Top-1 in percent, of
Caltech-101, Pets and Flowers the mean over classes, as in open_clip's table, on ten of the zoo's 11
datasets: no table has UCF101. Nothing here was measured by this project. `date`: of the last change of the
table, or else of its reading. A model that is in no table is left out. `zoo/models.yaml` has the means.
"""

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from dcp_zoo.zoo.specs import MODELS, ModelSpec

OPEN_LICENSES = ("mit", "apache-2.0")  # which allow every use
RESULTS = Path(__file__).parent / "results" / "published.csv"
NAMES = {  # of the datasets, here and in both tables
    "imagenet": "ImageNet 1k",
    "caltech101": "Caltech-101",
    "oxford_pets": "Oxford-IIIT Pet",
    "stanford_cars": "Stanford Cars",
    "oxford_flowers": "Oxford Flowers-102",
    "food101": "Food-101",
    "fgvc_aircraft": "FGVC Aircraft",
    "sun397": "SUN397",
    "dtd": "Describable Textures",
    "eurosat": "EuroSAT",
}
SIGLIP2 = ("google-research/big_vision README_siglip2.md", "2026-11-29")
PE = ("facebookresearch/perception_models apps/pe/README.md", "2025-12-18")
READ = {  # by eye: in the order of NAMES, as far as there are figures
    "dcp_siglip2_b32": (*SIGLIP2, 74.0),
    "dcp_siglip2_b16": (*SIGLIP2, 78.2),
    "dcp_siglip2_l16": (*SIGLIP2, 82.5),
    "dcp_siglip2_so400m": (*SIGLIP2, 83.2),
    "dcp_siglip2_gopt": (*SIGLIP2, 84.5),
    "dcp_pe_b16": (*PE, 78.4),
    "dcp_pe_l14_336": (*PE, 83.5),
    "dcp_dfn_l14": (
        *("huggingface.co/apple/DFN2B-CLIP-ViT-L-14-39B", "2026-11-29"),
        *(82.19, 95.00, 96.11, 94.65, 87.84, 94.98, 48.29, 75.94, 66.81, 68.19),
    ),
}
MOBILECLIP = {"dcp_mobileclip2_b": "mobileclip2_b", "dcp_mobileclip2_l14": "mobileclip2_l14"}


def frontier(figure: str, licenses: Sequence[str] = ()) -> list[ModelSpec]:
    """The models that are more accurate than every cheaper one by `figure`, "zero_shot" or "imagenet"; the
    cheapest first. Of the weights with one of these licences, if some are passed."""
    rated = [s for s in MODELS.values() if getattr(s, figure) and (s.license in licenses or not licenses)]
    chosen: list[ModelSpec] = []
    for spec in sorted(rated, key=lambda spec: (spec.gflops, -getattr(spec, figure))):
        if not chosen or getattr(spec, figure) > getattr(chosen[-1], figure):
            chosen.append(spec)
    return chosen


def rows(open_clip: Path, mobileclip: Path) -> Iterator[tuple[str | float, ...]]:
    with (open_clip / "docs" / "openclip_results.csv").open() as file:
        table = {(row["name"].removesuffix("-quickgelu"), row["pretrained"]): row for row in csv.DictReader(file)}
    for name, spec in MODELS.items():
        row = table.get((str(spec.clip), spec.clip_pretrained))
        if row:
            source = ("mlfoundations/open_clip docs/openclip_results.csv", "2023-11-22")
            found = row
        elif name in MOBILECLIP:
            file = MOBILECLIP[name]
            lines = map(json.loads, (mobileclip / "results" / f"{file}.jsonl").read_text().splitlines())
            found = {line["dataset"]: line["metrics"].get("main_metric") for line in lines}
            source = (f"apple/ml-mobileclip results/{file}.jsonl", "2025-08-28")
        else:
            if name in READ:
                yield name, *READ[name]
            continue
        yield name, *source, *(round(100 * float(found[title]), 2) for title in NAMES.values())


def main(open_clip: str, mobileclip: str) -> None:
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["model", "source", "date", *NAMES])
        for row in rows(Path(open_clip), Path(mobileclip)):
            writer.writerow([*row, *[""] * (3 + len(NAMES) - len(row))])


if __name__ == "__main__":
    main(*sys.argv[1:])
