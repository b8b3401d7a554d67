"""Distil CLIP's vectors of names into the text tower, and make it robust to learned prompts."""

import random
from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
from loop import fit, mixed_precision, ridge
from phrases import TEMPLATES, Phrases, bpe_words, centred, main_directions
from torch import Tensor
from torch.nn import functional as F

SOS = 49406
EOT = 49407
INIT_PHRASES = 8192  # that the projection is fitted on before training
TEXT = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection")  # names in CLIP


def init_tokens(clip: open_clip.CLIP, embed: Callable[[list[str]], Tensor]) -> None:
    """Initialise the token table with the embeddings of the tokens' texts, in their principal directions."""
    rows, width = clip.token_embedding.weight.shape
    tokens = centred(embed(list(bpe_words().values())).float())
    table = torch.cat([tokens @ main_directions(tokens, width), torch.zeros(rows - len(tokens), width)])
    table[SOS:] = 0.02 * torch.randn(2, width)
    clip.token_embedding.weight.data.copy_(0.04 * table / table.pow(2).mean().sqrt())


@torch.no_grad()
def init_projection(clip: open_clip.CLIP, phrases: Phrases) -> None:
    """The least-squares projection of the blocks' output to the targets, for "a photo of a {}."."""
    before, after = template_tokens()[TEMPLATES.index("a photo of a {}.")]
    picks = torch.multinomial(phrases.weights, min(INIT_PHRASES, len(phrases.ids)))
    states = [
        hidden(clip, *pad([torch.cat([before, phrases.ids[i], after]) for i in rows.tolist()])).cpu()
        for rows in picks.split(256)
    ]
    clip.text_projection.data.copy_(ridge(torch.cat(states), phrases.targets[picks]))


def encode(clip: open_clip.CLIP, ids: Tensor, ends: Tensor, prompts: Tensor | None = None, noise: float = 0) -> Tensor:
    """Unnormalised text features: tokens (B, L), position of EOT (B,) -> (B, embed)."""
    return hidden(clip, ids, ends, prompts, noise) @ clip.text_projection


def hidden(clip: open_clip.CLIP, ids: Tensor, ends: Tensor, prompts: Tensor | None = None, noise: float = 0) -> Tensor:
    """The blocks' output at EOT, (B, width).

    prompts (M, width) are inserted after SOS, as in DCP. With noise, their states are perturbed after every
    block, as DCP's coupling rewrites them. The tower is causal, so nothing after the last EOT is computed.
    """
    x = clip.token_embedding(ids.to(clip.logit_scale.device))
    count = 0 if prompts is None else len(prompts)
    if prompts is not None:
        x = torch.cat([x[:, :1], prompts.expand(len(x), -1, -1), x[:, 1:]], dim=1)
    length = x.shape[1]
    x = x + clip.positional_embedding[:length]
    for block in clip.transformer.resblocks:
        x = block(x, attn_mask=clip.attn_mask[:length, :length])
        if noise and count:
            states = x[:, 1 : 1 + count]
            spread = noise * states.detach().float().pow(2).mean().sqrt()
            x = torch.cat([x[:, :1], states + spread * torch.randn_like(states[:1]), x[:, 1 + count :]], dim=1)
    return clip.ln_final(x[torch.arange(len(x)), ends + count])


def pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of tokens -> SOS row EOT, padded to the longest (B, L), and the position of EOT (B,)."""
    ends = torch.tensor([len(r) + 1 for r in rows])
    ids = torch.full((len(rows), int(ends.max()) + 1), 0)
    for line, row in zip(ids, rows, strict=True):
        line[0] = SOS
        line[1 : len(row) + 1] = row
        line[len(row) + 1] = EOT
    return ids, ends


def template_tokens() -> list[tuple[Tensor, Tensor]]:
    """Tokens before and after the name, for every template."""
    encode_text = open_clip.get_tokenizer("ViT-B-32").encode
    halves = [template.split("{}") for template in TEMPLATES]
    return [tuple(torch.tensor(encode_text(h), dtype=torch.long) for h in half) for half in halves]


def random_prompts(table: Tensor) -> Tensor:
    """2 to 16 vectors like those of prompt learning: noise of various scales, or random words."""
    count = random.randint(2, 16)
    if random.random() < 0.5:
        return table[torch.randint(len(table), (count,))].detach()
    return torch.randn(count, table.shape[1], device=table.device) * 10 ** random.uniform(-2, -0.7)


def encode_phrases(clip: open_clip.CLIP, rows: list[Tensor], templates: list, p_random: float = 0.45) -> Tensor:
    """Features of the phrases in one random template, or after random vectors and with a full stop, as in
    DCP."""
    if random.random() < p_random:
        stop = templates[1][1]
        prompts = random_prompts(clip.token_embedding.weight)
        return encode(clip, *pad([torch.cat([r, stop]) for r in rows]), prompts, random.choice([0, 0.25, 0.5]))
    before, after = random.choice(templates)
    return encode(clip, *pad([torch.cat([before, r, after]) for r in rows]))


def sample_batches(phrases: Phrases, batch: int, seed: int) -> list[Tensor]:
    """16 batches of indices in random order, each with phrases of similar length."""
    g = torch.Generator().manual_seed(seed)
    picks = torch.multinomial(phrases.weights, 16 * batch, replacement=True, generator=g)
    lengths = torch.tensor([len(phrases.ids[i]) for i in picks.tolist()])
    batches = picks[lengths.argsort()].view(16, batch)
    return list(batches[torch.randperm(16, generator=g)])


def distil_loss(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """1 - cosine plus a contrastive loss over the batch, and the mean cosine.

    CLIP's texts are all alike, cosine 0.65 on average, which the weights of the two parts make up for.
    """
    features = F.normalize(features.float(), dim=1)
    cosine = (features * targets).sum(1).mean()
    contrast = F.cross_entropy(
        features @ targets.T / 0.02, torch.arange(len(targets), device=targets.device), label_smoothing=0.05
    )
    return 3 * (1 - cosine) + 0.1 * contrast, cosine.detach()


def train_text(clip: open_clip.CLIP, phrases: Phrases, *, steps: int, batch: int, lr: float, output: Path) -> None:
    """Distil the targets into the text tower; the log's metric is the mean cosine of a batch."""
    if steps and not (output / "text.pt").exists():
        init_projection(clip, phrases)
    templates = template_tokens()
    parameters = [p for name, p in clip.named_parameters() if name.startswith(TEXT)]
    device = clip.logit_scale.device

    def step_loss(step: int) -> tuple[Tensor, str, float]:
        index = sample_batches(phrases, batch, step // 16)[step % 16]
        with mixed_precision(device):
            features = encode_phrases(clip, [phrases.ids[i] for i in index.tolist()], templates)
        loss, cosine = distil_loss(features, phrases.targets[index].to(device))
        return loss, "cosine", cosine.item()

    fit("text", clip, parameters, step_loss, steps=steps, lr=lr, output=output)
