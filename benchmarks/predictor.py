"""What `dcp_zoo.Predictor` costs beside a bare loop, and in the engines that call it: processor time and
memory.

    python benchmarks/predictor.py                        the miniature
    python benchmarks/predictor.py --model dcp_vitb16     with random weights
    python benchmarks/predictor.py --memory 20000         memory of the command, on so many small images

Each writes its rows into results/predictor.csv. JPEGs of 500 x 375 pixels are read from files; one thread
computes in each process. The bare loop decodes a batch of 64, normalises it, and calls the fused head; in
one process it takes turns with Predictor, batch by batch. An engine runs in processes of its own, with few
images and with many: an image costs the difference, so that what it takes to start is left out, and stands
beside it. All its processes count. For the memory, the tower gives every image the same features: what grows
is not the model.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
from huggingface_hub import constants
from speed import cache_clip

import dcp_zoo
from dcp_zoo.data import load_image
from dcp_zoo.data.packaged import sample_images
from dcp_zoo.prediction.job import OutputFiles, run

RESULTS = Path(__file__).parent / "results" / "predictor.csv"
BATCH = 64
SIZES = {"dcp_mini": (160, 544), "dcp_vitb16": (8, 40)}  # images, few and many
ENGINES = {"command": (1,), "datasets": (1, 2), "ray": (1, 2)}  # processes that compute


def inside(head: str, paths: list[str]) -> dict[str, float]:
    """Processor seconds per image of the bare loop and of Predictor, which take turns."""
    import torch

    from dcp_zoo.prediction.heads import loaded

    fused = loaded(head, "cpu").fuse()
    predictor = dcp_zoo.Predictor(head, batch_size=BATCH)
    transform = dcp_zoo.create_transform(fused)
    spent = {"bare loop": [], "Predictor": []}

    @torch.inference_mode()
    def bare(batch: list[str]) -> None:
        fused(torch.stack([transform(load_image(path)) for path in batch])).softmax(-1)

    size = min(BATCH, len(paths) // 5)
    for start in range(0, len(paths), size):
        batch = paths[start : start + size]
        for way, work in (("bare loop", bare), ("Predictor", lambda batch: predictor({"image": batch}))):
            began = time.process_time()
            work(batch)
            spent[way].append((time.process_time() - began) / len(batch))
    return {way: pd.Series(seconds[1:]).median() for way, seconds in spent.items()}  # the first loads and fuses


def engine(name: str, processes: int, head: str, paths: list[str]) -> None:
    """What a process does with these images that an engine reads."""
    predictor = dcp_zoo.Predictor(head, image="bytes")
    if name == "road":
        backend = predictor.backend
        outputs = backend.compute(np.zeros((predictor.batch_size, *backend.preprocessing["input_size"]), np.uint8))
        backend.compute = lambda pixels: outputs.of(slice(len(pixels)))
        run(paths, predictor, OutputFiles(Path("p.parquet"), overwrite=True))
    elif name == "datasets":
        import datasets
        import multiprocess

        multiprocess.set_start_method("spawn")
        rows = datasets.Dataset.from_dict({"bytes": paths})
        rows.map(predictor, batched=True, batch_size=BATCH, num_proc=processes if processes > 1 else None)
    else:
        import ray

        ray.init(num_cpus=processes + 1, log_to_driver=False)
        rows = ray.data.read_binary_files(paths, include_paths=True, override_num_blocks=8)
        rows = rows.map_batches(predictor.decode, batch_size=BATCH)
        pool = ray.data.ActorPoolStrategy(size=processes)
        options = {"fn_constructor_args": [predictor], "batch_size": BATCH, "compute": pool}
        rows.map_batches(dcp_zoo.Predictor, **options).write_parquet(str(Path("answers").absolute()))


def measured(command: list[str], folder: str) -> tuple[float, float, float]:
    """Processor seconds of a process and all that it starts, wall seconds, and the most memory of one of
    them in MB."""
    began = time.monotonic()
    seconds = dict[int, float]()
    memory = 0.0
    process = psutil.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        for each in [process, *process.children(recursive=True)]:
            try:
                used = each.cpu_times()
                seconds[each.pid] = used.user + used.system
                memory = max(memory, each.memory_info().rss / 1e6)
            except psutil.Error:  # it has ended
                continue
        time.sleep(0.1)
    assert process.returncode == 0, command
    return sum(seconds.values()), time.monotonic() - began, memory


def commanded(head: str, folder: str, name: str, processes: int, paths: list[str]) -> list[str]:
    """The command line of an engine on these images."""
    Path(folder, "list.txt").write_text("\n".join(paths))
    if name != "command":
        return [sys.executable, __file__, "--engine", name, str(processes), head, "list.txt"]
    command = ["predict", "list.txt", "--head", head, "--output", "p.parquet", "--overwrite", "--precision", "float32"]
    return [sys.executable, "-m", "dcp_zoo", *command]


def write_photos(folder: str, images: int, side: int | None = None) -> None:
    """JPEGs, parts of the sample photographs by turns, in the folder `photos`."""
    Path(folder, "photos").mkdir()
    whole = [load_image(path) for path in sample_images()]
    for i in range(images):
        part = whole[i % len(whole)].crop((20 * (i % 4), 0, 20 * (i % 4) + 560, 420))
        part.resize((side, side) if side else (500, 375)).save(f"{folder}/photos/{i:06}.jpg", quality=90)


def head_of(model: str, folder: str) -> str:
    """A head of the model: the bundled one, or a fresh DCP on a CLIP with random weights."""
    if model == "dcp_mini":
        return "dcp_mini.caltech101-16shot"
    cache_clip(Path(folder, "hub"), model)
    constants.HF_HUB_CACHE = f"{folder}/hub"  # of this process, and of those that it starts:
    os.environ |= {"HF_HUB_CACHE": f"{folder}/hub", "HF_HUB_OFFLINE": "1"}
    code = "import torch, dcp_zoo; m = dcp_zoo.create_model({!r}, 'clip', classnames=['cat', 'dog', 'owl']); "
    code += "m.store_stats(torch.randn(4, 3, 224, 224)); m.save_pretrained('head')"
    subprocess.run([sys.executable, "-c", code.format(model)], cwd=folder, check=True)
    return f"{folder}/head"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dcp_mini", choices=SIZES)
    parser.add_argument("--memory", type=int)
    parser.add_argument("--turns", type=int, nargs="*", default=[0, 1, 2], help="which, to go on with another")
    parser.add_argument("--ways", nargs="*", default=["inside", *ENGINES], choices=["inside", *ENGINES])
    parser.add_argument("--engine", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        name, processes, head, file = args.engine
        engine(name, int(processes), head, Path(file).read_text().split("\n"))
        return
    os.environ |= {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0", "HF_DATASETS_DISABLE_CACHING": "1"}
    few, many = (args.memory // 20, args.memory) if args.memory else SIZES[args.model]
    engines = {"road": (1,)} if args.memory else {way: ENGINES[way] for way in args.ways if way != "inside"}
    with tempfile.TemporaryDirectory() as folder:
        head = head_of(args.model, folder)
        write_photos(folder, many, 64 if args.memory else None)
        paths = sorted(map(str, Path(folder, "photos").iterdir()))
        for turn in args.turns[:1] if args.memory else args.turns:
            common = {"model": args.model, "images": many, "turn": turn}
            takes_turns = "inside" in args.ways and not args.memory
            for way, seconds in inside(head, paths).items() if takes_turns else ():
                add(common | {"way": way, "processes": 1, "seconds_per_image": seconds})
            for name, processes in [(name, n) for name, numbers in engines.items() for n in numbers]:
                commands = (commanded(head, folder, name, processes, paths[:images]) for images in (few, many))
                (start, _, least), (whole, wall, most) = (measured(command, folder) for command in commands)
                each = (whole - start) / (many - few)
                row = {"way": name, "processes": processes, "seconds_per_image": each, "wall_seconds": wall}
                row |= {"start_seconds": start - few * each, "peak_mb_few": least, "peak_mb": most}
                table = Path(folder, "p.parquet")  # of the command
                add(
                    common
                    | row
                    | {"bytes_per_row": table.stat().st_size / many if name in ("command", "road") else None}
                )


def add(row: dict) -> None:
    """A row more, in place of an earlier one of the same."""
    old = pd.read_csv(RESULTS) if RESULTS.exists() else pd.DataFrame()
    rows = pd.concat([old, pd.DataFrame([row])]).drop_duplicates(
        ["model", "way", "processes", "images", "turn"], keep="last"
    )
    rows.to_csv(RESULTS, index=False, float_format="%.4g")
    print(row, flush=True)


if __name__ == "__main__":
    main()
