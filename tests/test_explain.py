"""What a head has learnt: words near its prompts, and how far the coupling moves them."""

import csv
import sys

import pytest
import torch

from dcp_zoo import DCP, ZooError
from dcp_zoo.api.explain import coupling_moves, nearest_words
from dcp_zoo.cli import main
from dcp_zoo.model.towers.text import embed_prefix, prefix_block

NAMES = ["cat", "dog", "tea cup"]


@pytest.fixture
def model(tiny_clip):
    """Two coupled blocks, three prompts, calibrated; its vocabulary has random vectors."""
    torch.manual_seed(1)  # differs from the seed of the random vectors in `nearest_words`
    torch.nn.init.normal_(tiny_clip.token_embedding.weight, std=0.02)
    model = DCP(tiny_clip, NAMES, n_ctx=3, depth=2).eval()
    model.store_stats(torch.randn(4, 3, 32, 32))
    return model


def token(model, text: str) -> torch.Tensor:
    return model.text.token_embedding(model.tokenizer([text])[0, 1])


def test_a_prompt_that_is_a_word_is_found_whatever_its_length(model):
    with torch.no_grad():
        model.prompts["text"].copy_(torch.stack([token(model, "cat"), 3 * token(model, "violet"), torch.randn(64)]))
    words = nearest_words(model, top_k=2)
    assert [row[0] for row in words.nearest[:2]] == [
        ("cat", pytest.approx(1, abs=1e-5)),
        ("violet", pytest.approx(1, abs=1e-5)),
    ]
    ratio = (3 * token(model, "violet").norm() / token(model, "cat").norm()).item()
    assert (words.lengths[1] / words.lengths[0]).item() == pytest.approx(ratio, rel=1e-4)
    assert words.nearest[2][0][1] == pytest.approx(words.chance, abs=0.1)  # the third prompt is a random vector
    assert all(len(row) == 2 and row[0][1] >= row[1][1] for row in words.nearest)


def test_a_token_inside_a_word_is_marked(model):
    inside = model.tokenizer.encoder["tea"]  # "tea" alone ends a word and is "tea</w>"
    with torch.no_grad():
        model.prompts["text"][0] = model.text.token_embedding.weight[inside]
    assert nearest_words(model, 1).nearest[0][0][0] == "tea-"


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_the_coupling_moves_are_relative_to_the_prompts(model, tower):
    """With all of CMPA zero but one bias b, new = old + b in each block."""
    direction = model.cmpa[0].to_vision if tower == "vision" else model.cmpa[0].to_text
    with torch.no_grad():
        for p in model.cmpa.parameters():
            p.zero_()
        assert all((rows == 0).all() for rows in coupling_moves(model).values())
        direction.mlp.c_proj.bias.fill_(0.5)
    moves = coupling_moves(model)
    assert {k: tuple(v.shape) for k, v in moves.items()} == {"vision": (2, 3), "text": (2, 3)}
    size = direction.mlp.c_proj.bias.norm()
    if tower == "vision":
        assert torch.allclose(moves["vision"], size / model.stored_stats.norm(dim=-1))
        assert (moves["text"] == 0).all()
    else:
        y = embed_prefix(model.text, model.prompts["text"], model.name_tokens[0].sos_id)
        y, _ = prefix_block(model.text_tower.blocks[0], y)
        assert torch.allclose(moves["text"][0], size / y[1:].norm(dim=-1))
        assert (moves["vision"] == 0).all()


def test_text_prompts_that_are_never_rewritten_have_no_moves(tiny_clip):
    model = DCP(tiny_clip, NAMES, n_ctx=2, coupling="text_to_vision").eval()
    model.store_stats(torch.randn(2, 3, 32, 32))
    assert coupling_moves(model).keys() == {"vision"}


def test_models_that_cannot_be_explained_are_rejected(tiny_clip):
    model = DCP(tiny_clip, NAMES, n_ctx=2)
    with pytest.raises(ZooError, match="no stored statistics"):
        coupling_moves(model)
    with pytest.raises(ZooError, match="at least 1"):
        nearest_words(model, 0)
    model.tokenizer = lambda texts: None
    with pytest.raises(ZooError, match="no decode"):
        nearest_words(model)


def test_command(monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "explained"
    monkeypatch.setattr(
        "sys.argv",
        ["dcp-zoo", "explain", "--head", "dcp_mini.caltech101-1shot", "--top-k", "2", "--output", str(folder)],
    )
    with pytest.raises(SystemExit) as stop:
        main()
    out = capsys.readouterr().out
    assert not stop.value.code
    assert "Text prompts" in out
    words = list(csv.DictReader((folder / "words.csv").open()))
    moves = list(csv.DictReader((folder / "coupling.csv").open()))
    assert {row["rank"] for row in words} == {"1", "2"}
    assert {row["tower"] for row in moves} == {"vision", "text"}
    assert len(words) == 2 * len({row["prompt"] for row in words})
    assert (folder / "coupling.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(folder.iterdir())) == 3


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    from dcp_zoo.api.explain import draw

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ZooError, match=r"dcp_zoo\[plots\]"):
        draw({"vision": torch.ones(2, 3)}, tmp_path / "x.png", "title")
