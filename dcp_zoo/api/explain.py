"""What a head has learnt: words near its text prompts, how far CMPA moves its prompts, and where these attend to."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from dcp_zoo.errors import ZooError, import_extra
from dcp_zoo.model._torch import in_eval_mode
from dcp_zoo.model.dcp import DCP
from dcp_zoo.model.tokens import Tokenizer

RANDOM_VECTORS = 256  # averaged in `Words.chance`


class Words(NamedTuple):
    """The vocabulary near a head's M text prompts."""

    nearest: list[list[tuple[str, float]]]  # per prompt, the words and their cosines, best first
    lengths: torch.Tensor  # (M,) norms of the prompts, in units of the median norm of the vocabulary's vectors
    chance: float  # cosine of a random vector with its nearest word; words not well above it have no meaning


@torch.inference_mode()
def nearest_words(model: DCP, top_k: int = 5) -> Words:
    """The `top_k` tokens of the vocabulary nearest to each text prompt, before any coupling, by cosine, as distance
    favours the short vectors of rare tokens. Those inside of words end in a hyphen. ZooError for a `top_k` below 1, or
    a tokenizer that cannot decode token ids."""
    if top_k < 1:
        raise ZooError(f"top_k must be at least 1, not {top_k}.")
    prompts, table = model.prompts["text"].float(), model.encoder.text.token_embedding.weight.float()
    directions = F.normalize(table, dim=-1)
    values, ids = (F.normalize(prompts, dim=-1) @ directions.T).topk(min(top_k, len(table)))
    nearest = [
        [(_spell(model.encoder.tokenizer, token), value) for token, value in zip(*row, strict=True)]
        for row in zip(ids.tolist(), values.tolist(), strict=True)
    ]
    generator = torch.Generator().manual_seed(0)
    random = F.normalize(torch.randn(RANDOM_VECTORS, table.shape[1], generator=generator), dim=-1)
    chance = (random.to(directions) @ directions.T).amax(-1).mean().item()
    return Words(nearest, (prompts.norm(dim=-1) / table.norm(dim=-1).median()).cpu(), chance)


def _spell(tokenizer: Tokenizer, token: int) -> str:
    """A token as readable text; the decoder adds a space after tokens that end a word."""
    decode = getattr(tokenizer, "decode", None) or getattr(getattr(tokenizer, "tokenizer", None), "decode", None)
    if decode is None:
        name = type(tokenizer).__name__
        raise ZooError(f"The tokenizer ({name}) has no decode method: its tokens cannot be shown as words.")
    text = decode([token])
    return text.strip() if text.endswith(" ") or text.startswith("<") else f"{text}-"


@torch.inference_mode()
def coupling_moves(model: DCP) -> dict[str, torch.Tensor]:
    """How far CMPA moves each prompt before each coupled block, |new - old| / |old|: "vision" (K, M), and for the
    bidirectional coupling "text" (K, M). Row k belongs to block k + 1. ZooError for no stored statistics."""
    if model.stored_stats is None:
        raise ZooError("This head has no stored statistics: call model.store_stats(images) first.")
    stored = model.stored_stats
    steps = (step for step in model.couplings(lambda i: stored[i - 1]) if step.v is not None)
    rows = [(_relative_change(step.v, step.new_v), _relative_change(step.t, step.new_t)) for step in steps]
    vision, text = map(torch.stack, zip(*rows, strict=True))
    # with the other coupling the text prompts are never rewritten
    return {"vision": vision} | ({"text": text} if model.config.coupling == "bidirectional" else {})


def _relative_change(old: Any, new: Any) -> torch.Tensor:
    """old and new (M, D) -> (M,)"""
    return ((new - old).norm(dim=-1) / old.norm(dim=-1)).float().cpu()


def draw(moves: dict[str, torch.Tensor], path: str | Path, title: str) -> None:
    """Plot `coupling_moves` to a PNG file. ZooError if matplotlib is not installed."""
    axes = import_extra("matplotlib.figure", "plots").Figure((7, 4), layout="constrained").add_subplot()
    for (tower, rows), color in zip(moves.items(), ("tab:blue", "tab:orange"), strict=False):
        blocks = range(1, len(rows) + 1)
        axes.plot(blocks, rows, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(blocks, rows.mean(1), color=color, marker="o", label=f"{tower} prompts, mean and each")
    axes.set(title=title, xlabel="before block", ylabel="|new - old| / |old|", xticks=list(blocks), yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.figure.savefig(path, dpi=150, format="png")


@torch.inference_mode()
def attention_weights(model: DCP, images: torch.Tensor) -> torch.Tensor:
    """Attention weights of the class token and of each prompt over all tokens, averaged over heads. ZooError for an
    image tower without a class token, such as SigLIP's.

    Args:
        model: any DCP; it is run in eval mode, with the statistics of `model.stats`.
        images: (B, 3, H, W), normalised as `create_transform` does.

    Returns:
        (B, blocks with prompts, 1 + M, 1 + patches + M). Rows are queries: class token, prompts. Columns are keys:
        class token, patches, prompts. Every row sums to 1. A tower with registers has these beside its class token.
    """
    tower = model.encoder.vision_tower
    if tower.num_prefix == 0:
        raise ZooError("The image tower of this CLIP has no class token, whose attention could be shown.")
    with in_eval_mode(model):
        weights = []
        for step, x, _ in model.walk(images):
            if model.first_block <= step.block < len(tower.blocks):
                block = tower.blocks[step.block]
                queries = torch.cat([x[:, : tower.num_prefix], x[:, -model.config.n_ctx :]], 1)
                query = block.query(block.norm(queries), rotate=False)  # (B, H, Q, d), as the keys
                key = block.key_value(block.norm(x))[0]
                weights.append((query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1).mean(1))
        return torch.stack(weights, 1)


def attention_maps(model: DCP, images: torch.Tensor) -> torch.Tensor:
    """The patch columns of `attention_weights`, in the shape of the image: (B, blocks, 1 + M, h, w)."""
    patches = attention_weights(model, images)[..., model.encoder.vision_tower.num_prefix : -model.config.n_ctx]
    return patches.unflatten(-1, model.encoder.vision_tower.grid)
