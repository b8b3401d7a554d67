"""What a model of each architecture costs: time and memory of one thread of torch in float32.

    python benchmarks/model_costs.py     writes results/model_costs.csv; resumes when repeated

Weights of models that are not part of the package are random. Each row is a process of its own, which
classifies the same batch of decoded images as `dcp-zoo predict` does; its time is the processor's, which
counts on a busy machine too. Caches are shared with other processes, so it is the fastest of some repeats.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from growing import GrowingTable

from dcp_zoo.zoo.specs import MODELS

COLUMNS = "model core_ms_per_image peak_mb".split()
BATCH = 8
REPEATS = 5
CLASSES = 100
ENOUGH = 20  # seconds, after which a large model is not repeated more than once


def main(one: str = "") -> None:
    if one:
        print(json.dumps(cost(one)))
        return
    table = GrowingTable(Path(__file__).parent / "results" / "model_costs.csv", COLUMNS, ["model"])
    by_clip = {spec.clip: name for name, spec in reversed(MODELS.items())}  # weights change neither time nor memory
    for name in (name for name in MODELS if name in by_clip.values() and (name,) not in table):
        command = [sys.executable, __file__, name]
        table.add([json.loads(subprocess.run(command, check=True, capture_output=True).stdout)])


def letters(texts: list[str], context_length: int = 64) -> Any:
    """A tokenizer whose tokens are letters, the first of a text: some towers have little room."""
    import torch

    rows = [[2 + ord(letter) % 1000 for letter in text[:8]] for text in texts]
    return torch.tensor([row + [1] * (context_length - len(row)) for row in rows])


def cost(name: str) -> dict[str, Any]:
    import numpy as np
    import open_clip
    import torch

    from dcp_zoo import create_model
    from dcp_zoo.data import classnames
    from dcp_zoo.prediction.heads import HeadBackend

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = open_clip.get_model_config(MODELS[name].clip or "") or {"text_cfg": {}}
    tokenizer = letters if "hf_tokenizer_name" in config["text_cfg"] else None  # its own must be downloaded
    model = create_model(name, classnames=classnames("caltech101")[:CLASSES], tokenizer=tokenizer).eval()
    size = model.pretrained_cfg["input_size"]
    model.store_stats(torch.randn(1, *size))
    backend = HeadBackend(model, precision="float32")
    seconds = list[float]()
    images = np.random.default_rng(0).integers(0, 256, (BATCH, *size), np.uint8)
    while len(seconds) < 3 or (len(seconds) <= REPEATS and sum(seconds) < ENOUGH):  # the first warms up
        started = time.process_time()
        backend.compute(images)
        seconds.append(time.process_time() - started)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    milliseconds = round(1000 * min(seconds[1:]) / BATCH, 1)
    return {"model": name, "core_ms_per_image": milliseconds, "peak_mb": round(memory)}


if __name__ == "__main__":
    main(*sys.argv[1:])
