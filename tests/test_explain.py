"""What a head has learnt: words near its prompts, how far the coupling moves them, and where its tokens attend to: a
plain softmax over all keys, for the tokens that the model itself computes."""

import sys

import pytest
import torch
from helpers import vision_blocks

from dcp_zoo import DCP, ZooError, create_model
from dcp_zoo.api.explain import attention_maps, attention_weights, coupling_moves, draw, nearest_words
from dcp_zoo.model.config import COUPLINGS, STATS
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
    return model.encoder.text.token_embedding(model.encoder.tokenizer([text])[0, 1])


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
    inside = model.encoder.tokenizer.encoder["tea"]  # "tea" alone ends a word and is "tea</w>"
    with torch.no_grad():
        model.prompts["text"][0] = model.encoder.text.token_embedding.weight[inside]
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
        y = embed_prefix(model.encoder.text, model.prompts["text"], model.name_tokens.start_id)
        y, _ = prefix_block(model.encoder.text_tower.blocks[0], y)
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
    model.encoder.tokenizer = lambda texts: None
    with pytest.raises(ZooError, match="no decode"):
        nearest_words(model)


def test_a_figure(model, tmp_path):
    pytest.importorskip("matplotlib")
    figure = tmp_path / "coupling.png"
    draw(coupling_moves(model), figure, "title")
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ZooError, match=r"dcp_zoo\[plots\]"):
        draw({"vision": torch.ones(2, 3)}, tmp_path / "x.png", "title")


# ----------------------------------------------------------------------------------------------------------- attention


@pytest.fixture(params=COUPLINGS)
def coupled(request, tiny_clip):
    torch.manual_seed(1)
    model = DCP(tiny_clip, ["cat", "dog"], n_ctx=3, depth=2, coupling=request.param).eval()
    model.store_stats(torch.randn(4, 3, 32, 32))
    return model


@pytest.mark.parametrize("stats", STATS)
def test_weights_equal_torchs_for_the_models_tokens(coupled, stats, monkeypatch):
    """Each block's weights as returned by `nn.MultiheadAttention`, for tokens that lead to the model's features."""
    model = coupled
    model.stats = stats
    images = torch.randn(2, 3, 32, 32)
    inputs, block_of = [], model.encoder.vision_tower.block

    def record(i, x, *args):
        inputs.append(x)
        return block_of(i, x, *args)

    expected_features = model.encode_image(images)
    monkeypatch.setattr(model.encoder.vision_tower, "block", record)
    weights = attention_weights(model, images)
    tokens = 1 + 16 + 3
    assert weights.shape == (2, 4, 4, tokens)
    queries = [0, *range(tokens - 3, tokens)]
    for i, (block, x) in enumerate(zip(vision_blocks(model), inputs, strict=True)):
        normed = block.ln_1(x)
        expected = block.attn(normed, normed, normed, need_weights=True)[1]
        torch.testing.assert_close(weights[:, i], expected[:, queries])
    x = block_of(3, inputs[-1])
    features = torch.nn.functional.normalize(model.encoder.visual.ln_post(x[:, 0]) @ model.encoder.visual.proj, dim=-1)
    torch.testing.assert_close(features, expected_features)


def test_rows_sum_to_one_and_match_a_plain_softmax(coupled):
    model = coupled
    images = torch.randn(2, 3, 32, 32)
    weights = attention_weights(model, images)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 4))

    patches = model.encoder.visual.conv1(images).flatten(2).transpose(1, 2)
    x = (
        torch.cat([model.encoder.visual.class_embedding.expand(2, 1, -1), patches], 1)
        + model.encoder.visual.positional_embedding
    )
    x = model.encoder.visual.ln_pre(torch.cat([x, model.prompts["vision"].expand(2, -1, -1)], 1))
    block = vision_blocks(model)[0]
    x = block.ln_1(x)
    w_q, w_k, _ = block.attn.in_proj_weight.chunk(3)
    b_q, b_k, _ = block.attn.in_proj_bias.chunk(3)
    heads = []
    for rows in torch.arange(len(w_q)).chunk(block.attn.num_heads):
        q, k = x[:, 0] @ w_q[rows].T + b_q[rows], x @ w_k[rows].T + b_k[rows]
        scores = torch.einsum("bd,bld->bl", q, k) / len(rows) ** 0.5
        heads.append(scores.exp() / scores.exp().sum(-1, keepdim=True))
    torch.testing.assert_close(weights[:, 0, 0], torch.stack(heads).mean(0))


def test_maps_have_the_shape_of_the_image():
    model = create_model("dcp_mini", classnames=["cat", "dog"], n_ctx=2).eval()
    images = torch.randn(1, 3, 192, 192)
    maps, weights = attention_maps(model, images), attention_weights(model, images)
    assert maps.shape == (1, 6, 3, 6, 6)
    torch.testing.assert_close(maps[0, 2, 1, 3, 4], weights[0, 2, 1, 1 + 3 * 6 + 4])  # row by row
