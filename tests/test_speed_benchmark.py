"""The speed benchmark: its variants agree, its processes respond, and its grid has what the page states."""

import pandas as pd
import pytest
import speed
import speed_report
import speed_variants as variants
import torch

from dcp_zoo import DCP


@pytest.fixture
def tiny_case(tiny_clip, monkeypatch):
    """A case whose model is the small CLIP of the golden vectors."""

    def build(case: variants.Case) -> DCP:
        torch.manual_seed(0)
        model = DCP(tiny_clip, ["ant", "wild_cat", "crocodile head"], n_ctx=3)
        model.pretrained_cfg = {"input_size": (3, 32, 32)}
        return model.eval()

    monkeypatch.setattr(variants, "build_model", build)
    monkeypatch.setattr(variants, "make_images", lambda case, batch: torch.ones(1, 3, 32, 32).repeat(batch, 1, 1, 1))
    return variants.Case("inference", "tiny", 3, (2,), variants.INFERENCE)


@pytest.mark.scripts
@pytest.mark.filterwarnings("ignore")
def test_variants_agree(tiny_case, tmp_path):
    pytest.importorskip("onnxruntime", reason="the export extra is not installed")
    variants.prepare(tiny_case, tmp_path)
    images = variants.make_images(tiny_case, 2)
    with torch.inference_mode():
        out = {v: variants.inference(tiny_case, v, tmp_path)(images).numpy() for v in variants.INFERENCE}
    assert out.pop("encode_image").shape == (2, 64)
    for variant, logits in out.items():
        assert speed.difference_of(logits, out["plain"]) < speed.TOLERANCE, variant
    steps = {v: variants.training(tiny_case, v, tmp_path) for v in variants.TRAINING if v != "ours-bfloat16"}
    expected = steps["plain"](images)
    for step in steps.values():
        for _ in range(2):
            assert speed.difference_of(step(images), expected) < 1e-4


@pytest.mark.scripts
def test_processes_run_every_batch_size():
    case = variants.Case("training", "dcp_mini", 2, (1, 2), ("ours",))
    rows = list(speed.compare(case, threads=1, repeats=1))
    assert [(r["batch"], r["repeats"], r["note"]) for r in rows] == [(1, 1, ""), (2, 1, "")]
    assert all(float(r["seconds"]) > 0 and float(r["peak_mb"]) > float(r["loaded_mb"]) > 50 for r in rows)


def test_the_grid_covers_every_statement():
    rows = [
        {"task": case.task, "model": case.model, "classes": case.classes, "batch": batch, "variant": variant}
        for case in speed.grid()
        for batch in case.batches
        for variant in case.variants
    ]
    frame = pd.DataFrame(rows).assign(seconds=range(1, len(rows) + 1), peak_mb=100.0)
    figures = speed_report.Figures(frame)
    for statement in speed_report.STATEMENTS:
        assert statement.value(figures) == statement.value(figures), statement.text
