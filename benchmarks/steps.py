"""Time of a training step of DCP beside MaPLe's and CLIP-LoRA's as their authors compute them.

    python benchmarks/steps.py      writes results/steps.csv

ViT-B/16 with random weights, batch size 4, one thread; steps are timed in turn: medians of processor time. DCP runs as
`dcp-zoo train` runs it here, in its precision "auto". MaPLe (Khattak et al., CVPR 2023: 2 tokens, 9 blocks) and
CLIP-LoRA (Zanella and Ben Ayed, CVPRW 2024: rank 2 of queries, keys and values in both towers) are written out on
open_clip's own blocks: each class runs all 77 tokens in every step, as in their code, which computes in float32 on
CPUs; of ten classes once more under autocast in DCP's precision.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcp_zoo.model.dcp import DCP
from dcp_zoo.model.inputs import Inputs, Pixels
from dcp_zoo.training.device import autocast, cast_frozen, pick_precision
from dcp_zoo.training.loop import objective
from dcp_zoo.training.recipes import default_recipe, named_recipe
from dcp_zoo.zoo.factory import plain_clip

RESULTS = Path(__file__).parent / "results" / "steps.csv"
MODEL, CLASSES, BATCH, TURNS = "dcp_vitb16", (10, 100), 4, 2
MAPLE_TOKENS, MAPLE_DEPTH, RANK, DROPOUT = 2, 9, 2, 0.25
CPU = torch.device("cpu")


class PlainMaPLe(nn.Module):
    """Text prompts in the first blocks, each with a projection to its vision prompts."""

    def __init__(self, clip: Any, ids: Tensor) -> None:
        super().__init__()
        self.__dict__["clip"], self.ids = clip, ids
        dt, dv = clip.positional_embedding.shape[1], clip.visual.class_embedding.shape[0]
        self.text = nn.ParameterList(0.02 * torch.randn(MAPLE_TOKENS, dt) for _ in range(MAPLE_DEPTH))
        self.project = nn.ModuleList(nn.Linear(dt, dv) for _ in range(MAPLE_DEPTH))

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> logits (B, C)."""
        clip, visual, n = self.clip, self.clip.visual, MAPLE_TOKENS
        x = visual.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + visual.positional_embedding
        x = torch.cat([x, self.project[0](self.text[0]).expand(len(x), -1, -1)], 1)
        x = visual.ln_pre(x)
        y = clip.token_embedding(self.ids)
        y = torch.cat([y[:, :1], self.text[0].expand(len(y), -1, -1), y[:, 1 + n :]], 1) + clip.positional_embedding
        for i, (image_block, text_block) in enumerate(
            zip(visual.transformer.resblocks, clip.transformer.resblocks, strict=True)
        ):
            if 1 <= i < MAPLE_DEPTH:
                x = torch.cat([x[:, :-n], self.project[i](self.text[i]).expand(len(x), -1, -1)], 1)
                y = torch.cat([y[:, :1], self.text[i].expand(len(y), -1, -1), y[:, 1 + n :]], 1)
            x, y = image_block(x), text_block(y, attn_mask=clip.attn_mask)
        image = F.normalize(visual.ln_post(x[:, 0]) @ visual.proj, dim=-1)
        text = clip.ln_final(y)[torch.arange(len(y)), self.ids.argmax(-1)] @ clip.text_projection
        return clip.logit_scale.exp() * image @ F.normalize(text, dim=-1).T


class LoRAAttention(nn.Module):
    """In place of a block's attention: updates B A of the query, key and value weights."""

    def __init__(self, attn: Any) -> None:
        super().__init__()
        self.__dict__["attn"], width = attn, attn.embed_dim
        self.a = nn.ParameterList(0.02 * torch.randn(RANK, width) for _ in range(3))
        self.b = nn.ParameterList(torch.zeros(width, RANK) for _ in range(3))

    def forward(self, x: Tensor, *_: Any, attn_mask: Tensor | None = None, **__: Any) -> tuple[Tensor, None]:
        weights, biases = self.attn.in_proj_weight.chunk(3), self.attn.in_proj_bias.chunk(3)
        heads = (
            (F.linear(x, w, bias) + F.dropout(x, DROPOUT) @ a.T @ b.T).unflatten(-1, (self.attn.num_heads, -1))
            for w, bias, a, b in zip(weights, biases, self.a, self.b, strict=True)
        )
        q, k, v = (h.transpose(1, 2) for h in heads)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask).transpose(1, 2).flatten(2)
        return self.attn.out_proj(out), None


class PlainLoRA(nn.Module):
    """CLIP with `LoRAAttention` in every block of both towers, classifying by its own text features."""

    def __init__(self, clip: Any, ids: Tensor) -> None:
        super().__init__()
        self.clip, self.ids = clip, ids
        for block in (*clip.visual.transformer.resblocks, *clip.transformer.resblocks):
            block.attn = LoRAAttention(block.attn)

    def forward(self, images: Tensor) -> Tensor:
        image, text = self.clip.encode_image(images, True), self.clip.encode_text(self.ids, True)
        return self.clip.logit_scale.exp() * image @ text.T


def main() -> None:
    """Time all steps."""
    torch.set_num_threads(1)
    rows, fastest = [], pick_precision("auto", MODEL, CPU)
    for classes in CLASSES:
        names = [f"thing {n}" for n in range(classes)]
        steps = {
            "DCP": dcp_step(names, default_recipe(MODEL), fastest),
            "DCP, recipe fast": dcp_step(names, named_recipe("fast", MODEL), fastest),
        }
        for name, method in (("MaPLe", PlainMaPLe), ("CLIP-LoRA", PlainLoRA)):
            for precision in {"float32"} | ({fastest} if classes == CLASSES[0] else set()):
                steps[f"{name}, {precision}"] = plain_step(method, names, precision)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(TURNS + 1):
            for name, step in steps.items():
                started = time.process_time()
                step()
                times[name] += [time.process_time() - started] * (turn > 0)  # the first warms up
        seconds = {name: statistics.median(found) for name, found in times.items()}
        rows += [(classes, name, round(s, 2), round(seconds["DCP"] / s, 2)) for name, s in seconds.items()]
    table = pd.DataFrame(rows, columns=["classes", "step", "seconds", "dcp_takes"])
    table.to_csv(RESULTS, index=False)
    print(table.to_string(index=False))


def plain_step(method: Any, names: list[str], precision: str) -> Callable[[], None]:
    """A step of one of the peers."""
    clip = plain_clip(MODEL, with_weights=False)
    model = method(clip.clip.requires_grad_(False), clip.tokenizer([f"a photo of a {name}." for name in names]))
    return descent(lambda x, y: F.cross_entropy(model(x).float(), y), model, precision)


@torch.no_grad()
def dcp_step(names: list[str], recipe: Any, precision: str) -> Callable[[], None]:
    """A step of DCP, with what is frozen computed beforehand."""
    clip = plain_clip(MODEL, with_weights=False)
    model, recipe = DCP(clip, names, recipe.config), recipe.fitted(64, len(names))
    loss_of = objective(model, recipe)
    inputs: Inputs = Pixels(images())
    targets = clip.encode_image(inputs)
    if precision != "float32":
        cast_frozen(model, precision)
    if model.first_block:
        inputs = clip.enter(inputs, model.first_block).to(torch.half)
    return descent(lambda _, y: loss_of(inputs, y, targets)[0], model.train(), precision)


def descent(loss_of: Callable[[Tensor, Tensor], Tensor], model: Any, precision: str) -> Callable[[], None]:
    """A step of gradient descent on four random images."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)
    inputs, labels = images(), torch.arange(BATCH)

    def step() -> None:
        with autocast(CPU, precision):
            loss = loss_of(inputs, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def images() -> Tensor:
    return torch.randn(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    main()
