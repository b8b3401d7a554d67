"""The first contact with a CLIP's weights at full size, rehearsed: `results/first_contact.csv`.

    python benchmarks/first_contact.py

The Hub of the tests serves repos with the file names, keys, types and sizes of the real ones, and random values. Each
step is a process of its own, with empty caches at the start. The first download is killed half way; the check is that
random weights recognise nothing. Needs the extra `all`.
"""

import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

from dcp_zoo.fields import Values
from dcp_zoo.hub import CLIP_WEIGHTS_NAMES
from dcp_zoo.zoo.factory import build_open_clip
from dcp_zoo.zoo.registry import ModelSpec, get_spec

RESULTS = Path(__file__).parent / "results" / "first_contact.csv"
MODELS = ["dcp_vitb16", "dcp_datacomp_b32_256", "dcp_siglip2_b16", "dcp_pe_b16", "dcp_dfn_b16"]
PICKLED = {"dcp_dfn_b16"}  # whose repo has no safetensors file
PREPROCESS = ("mean", "std", "interpolation", "resize_mode")
KILLED, REFUSED = -9, 2


def write_repo(folder: Path, spec: ModelSpec, write_tokenizer: Callable[[Path], object]) -> dict[str, bytes]:
    """Write the files of a CLIP's repo with random weights, in float32 as the real ones are; their content by name."""
    assert spec.clip
    folder.mkdir()
    config = open_clip.get_model_config(spec.clip)
    described = open_clip.get_pretrained_cfg(spec.clip, spec.clip_pretrained)
    clip = build_open_clip(config, quick_gelu=bool(described.get("quick_gelu")))
    state = {name: tensor.contiguous() for name, tensor in clip.state_dict().items()}
    safe, pickled = (folder / name for name in CLIP_WEIGHTS_NAMES)
    if spec.name in PICKLED:
        torch.save(state, pickled)
    else:
        save_file(state, safe)
    preprocess = {name: described[name] for name in PREPROCESS}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
    (folder / "open_clip_config.json").write_text(text)
    if "hf_tokenizer_name" in config["text_cfg"]:
        write_tokenizer(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def main() -> None:
    """Rehearse each model, and write the table."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from helpers import photo
    from test_open_clip_models import write_tokenizer
    from upload_hub import Repo, serve_uploads

    rows = []
    for name in MODELS:
        with tempfile.TemporaryDirectory() as temporary, serve_uploads() as hub:
            folder, spec = Path(temporary), get_spec(name)
            hub.repos[str(spec.clip_repo)] = repo = Repo(private=False)
            repo.commit(write_repo(folder / "repo", spec, write_tokenizer), spec.clip_revision)
            for number in range(12):
                photo(folder / "photos" / ("rose", "tulip")[number % 2] / f"{number}.jpg", number)
            rows += rehearse(name, folder, hub.url)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def rehearse(name: str, folder: Path, endpoint: str) -> list[dict[str, Any]]:
    """The steps, each with its time and memory, and what is in the Hub's cache after it."""
    caches = {"HF_HOME": str(folder / "hf"), "DCP_ZOO_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    online, offline = caches | {"HF_ENDPOINT": endpoint}, caches | {"HF_HUB_OFFLINE": "1"}
    head, onnx, image = folder / "head", folder / "head.onnx", next(folder.glob("photos/rose/*"))
    steps: list[tuple[str, Values, int, list[object]]] = [
        ("download, killed", online, KILLED, ["info", name, "--check"]),
        ("download and check", online, REFUSED, ["info", name, "--check"]),
        ("train", online, 0, ["train", folder / "photos", "--model", name, "--output", head]),
        ("predict", online, 0, ["predict", image, "--head", head]),
        ("export", online, 0, ["export", "--head", head, "--output", onnx]),
        ("predict offline, ONNX", offline, 0, ["predict", image, "--head", onnx]),
        ("predict offline", offline, 0, ["predict", image, "--head", head]),
    ]
    half = max(path.stat().st_size for path in (folder / "repo").iterdir()) // 2
    rows = []
    for step, env, code, args in steps:
        seconds, memory, ended, said = timed([*map(str, args)], env, folder, half if code == KILLED else None)
        assert ended == code, said
        assert code != REFUSED or f"{name} recognises" in said, said
        size = sum(path.stat().st_size for path in (folder / "hf").rglob("*") if not path.is_symlink())
        row = {"model": name, "step": step, "seconds": round(seconds, 1), "peak_mb": round(memory)}
        rows.append(row | {"hub_cache_mb": round(size / 1e6)})
        print(rows[-1], flush=True)
    return rows


def timed(args: list[str], env: Values, folder: Path, kill_at: int | None) -> tuple[float, float, int, str]:
    """Run `dcp-zoo ARGS`; kill it once so many bytes have arrived. Seconds, peak in MB, exit code, and what it said."""
    started, peak = time.monotonic(), 0
    with (folder / "said").open("w") as out:
        command = [sys.executable, "-m", "dcp_zoo", *args]
        process = subprocess.Popen(command, env={**os.environ, **env}, stdout=out, stderr=out)
        while process.poll() is None:
            found = re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{process.pid}/status").read_text())
            peak = max(peak, int(found[1]) if found else 0)  # rusage's would include this process's, which holds a Hub
            if kill_at and any(path.stat().st_size > kill_at for path in (folder / "hf").rglob("*.incomplete")):
                process.kill()
            time.sleep(0.02)
    return time.monotonic() - started, peak / 1024, process.returncode, (folder / "said").read_text()


if __name__ == "__main__":
    main()
