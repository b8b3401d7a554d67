"""What it costs to read more than CLIP's embedding: one image through fused heads, random weights, one
thread.

    python benchmarks/readings.py      writes results/readings.csv; resumes when repeated

The heads are timed in turn: the median over the turns of the processor time, relative to that of CLIP's
`encode_image` in the same turn. Each fused head is first checked against the head that it was made of.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import torch
from growing import GrowingTable

from dcp_zoo.backbone.clip import FrozenCLIP, ImageEncoder
from dcp_zoo.heads.dcp import DCP
from dcp_zoo.heads.head import Head
from dcp_zoo.heads.kinds import LinearHead
from dcp_zoo.probe import TextProbe
from dcp_zoo.zoo.build import plain_clip

RESULTS = Path(__file__).parent / "results" / "readings.csv"
WITH_PROMPTS = "dcp_vitb16"
MODELS = ("dcp_mini", "dcp_vitb32", "dcp_vitb16")
ENCODER = "vit_small_patch14_dinov2"
CLASSES = 100
TURNS = 7
BATCHES = (1, 4)
BARE = "encode_image"
NAMES = [f"thing {i}" for i in range(CLASSES)]


def probed(clip: FrozenCLIP, widths: Sequence[Sequence[int]], encoders: Sequence[ImageEncoder] = ()) -> Head:
    """A head with an empty text probe on parts of these widths, which costs what a fitted one does."""
    head = LinearHead(clip, NAMES, *clip.scaled(clip.zero_shot_classifier(NAMES)))
    head.image_encoders.extend(encoders)
    head.text_probe = TextProbe(head.classes, widths)
    return head.eval()


def prompted(clip: FrozenCLIP, images: torch.Tensor, readings: int) -> Head:
    """A DCP with random prompts, whose text probe reads its own features, or also plain CLIP's."""
    head = DCP(clip, NAMES).eval()
    head.store_stats(images)
    widths = [reading.widths for reading in head.available_readings[:readings]]
    head.text_probe = TextProbe(head.classes, widths, clip.num_features)
    return head


def heads(model: str) -> dict[str, Head]:
    clip = plain_clip(model, with_weights=False)
    size = clip.visual.image_size
    patches = size[0] // 14 * 14, size[1] // 14 * 14
    dino = ImageEncoder(timm.create_model(ENCODER, num_classes=0, img_size=patches), ENCODER, patches, clip)
    found = {
        "text probe": probed(clip, [clip.widths]),
        "beside DINOv2-S": probed(clip, [clip.widths, dino.widths], [dino]),
    }
    if model != WITH_PROMPTS:
        return found
    images = torch.randn(4, 3, *size)
    return found | {"DCP": prompted(clip, images, 1), "DCP, both readings": prompted(clip, images, 2)}


@torch.inference_mode()
def main() -> None:
    """Measure what the table does not have yet."""
    torch.set_num_threads(1)
    table = GrowingTable(RESULTS, "model head batch seconds_per_image ratio".split(), ["model", "batch"])
    for model in MODELS:
        left = [batch for batch in BATCHES if (model, batch) not in table]
        found = heads(model) if left else {}
        fused = {name: head.fuse() for name, head in found.items()}
        for batch in left:
            clip = found["text probe"].encoder
            images = torch.randn(batch, 3, *clip.visual.image_size)
            for name, head in fused.items():
                assert torch.allclose(head(images), found[name](images), atol=1e-3), name
            timed = {BARE: clip.encode_image, **fused}
            turns = [{name: seconds(head, images) for name, head in timed.items()} for _ in range(TURNS)]
            rows = []
            for name in timed:
                ratio = statistics.median(turn[name] / turn[BARE] for turn in turns)
                middle = statistics.median(turn[name] for turn in turns) / batch
                rows.append((model, name, batch, round(middle, 4), round(ratio, 2)))
            table.add(rows)


def seconds(model: Callable[[torch.Tensor], object], images: torch.Tensor) -> float:
    started = time.process_time()
    model(images)
    return time.process_time() - started


if __name__ == "__main__":
    main()
