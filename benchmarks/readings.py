"""What reading a head both ways costs: one image through fused heads, ViT-B/16 with random weights, one thread.

    python benchmarks/readings.py      writes results/readings.csv

The heads are timed in turn: the median over the turns of each head's processor time in units of the text probe's on the
frozen tower in the same turn. Each fused head is first checked against the head that it was made of.
"""

import statistics
import time
from pathlib import Path

import pandas as pd
import torch

from dcp_zoo.model.dcp import DCP
from dcp_zoo.model.head import Head, LinearHead
from dcp_zoo.model.text_probe import TextProbe
from dcp_zoo.zoo.factory import plain_clip

RESULTS = Path(__file__).parent / "results" / "readings.csv"
MODEL, CLASSES, TURNS, BATCHES = "dcp_vitb16", 100, 7, (1, 4)
SIZE = (3, 224, 224)


def heads() -> dict[str, Head]:
    """With random prompts and an empty text probe, which costs what a fitted one does."""
    clip, names = plain_clip(MODEL, with_weights=False), [f"thing {i}" for i in range(CLASSES)]
    images = torch.randn(4, *SIZE)

    def dcp(readings: int, **options: object) -> Head:
        head = DCP(clip, names, **options).eval()
        head.store_stats(images)
        head.text_probe = TextProbe(
            head.classes, [reading.widths for reading in head.readings[:readings]], clip.num_features
        )
        return head

    probe = LinearHead(clip, names, *clip.scaled(clip.zero_shot_classifier(names)))
    probe.text_probe = probe.probe_of(probe.classes, sum(clip.widths))
    every = len(clip.vision_tower.blocks)
    return {
        "text probe": probe,
        "DCP, last three blocks": dcp(1, prompted_blocks=3),
        "DCP, last three blocks, both readings": dcp(2, prompted_blocks=3),
        "DCP, all blocks": dcp(1, prompted_blocks=every),
        "DCP, all blocks, both readings": dcp(2, prompted_blocks=every),
    }


@torch.inference_mode()
def main() -> None:
    """Measure and write the table."""
    torch.set_num_threads(1)
    rows, found = [], heads()
    fused = {name: head.fuse() for name, head in found.items()}
    for batch in BATCHES:
        images = torch.randn(batch, *SIZE)
        for name, model in fused.items():
            assert torch.allclose(model(images), found[name](images), atol=1e-3), name
        turns = [{name: seconds(model, images) for name, model in fused.items()} for _ in range(TURNS)]
        for name in fused:
            ratio = statistics.median(turn[name] / turn["text probe"] for turn in turns)
            middle = statistics.median(turn[name] for turn in turns) / batch
            rows.append({"head": name, "batch": batch, "seconds_per_image": round(middle, 3), "ratio": round(ratio, 2)})
    pd.DataFrame(rows).to_csv(RESULTS, index=False)
    print(pd.DataFrame(rows).to_string(index=False))


def seconds(model: torch.nn.Module, images: torch.Tensor) -> float:
    started = time.process_time()
    model(images)
    return time.process_time() - started


if __name__ == "__main__":
    main()
