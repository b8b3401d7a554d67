"""Image towers: prompts follow the image's own tokens, and are left out of pooling. Here open_clip's own."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcp_zoo.errors import ZooError
from dcp_zoo.model.towers.blocks import Block, KeyValue, OpenClipBlock, call, missing_parts


class Step(NamedTuple):
    """A block of the vision tower, and for a DCP the text tower's beside it: what CMPA reads before them (None where
    they are not coupled), the prompts that newly enter, and the text tower after its block."""

    block: int
    v: Tensor | None = None  # (M, Dv), pooled
    t: Tensor | None = None  # (M, Dt)
    new_v: Tensor | None = None  # (M, Dv)
    new_t: Tensor | None = None  # (M, Dt)
    text: Any = None  # the tower's run


class VisionTower:
    """An image tower in steps: `embed`, `blocks`, `pool`. It holds the modules, and no parameters of its own."""

    visual: Any  # the image tower of the CLIP
    block_path: str  # name of the list of blocks in it
    blocks: list[Block]
    width: int  # Dv
    grid: tuple[int, int]  # rows and columns of patches
    patch_size: tuple[int, int]  # pixels per patch, height and width
    num_prefix: int  # tokens before the patches: class token and registers
    pooled: int  # tokens that `pool` reads, counted from the first: 1 for the class token, otherwise all N
    has_stem: bool  # whether the patch embedding is more than one convolution, so that its maps are worth keeping
    norm: nn.Module  # after the last block
    patch_maps: Callable[[Tensor], Tensor]  # images (B, 3, H, W) -> patch maps (B, Dv, h, w), without positions
    # (images, patches): images, or with `patches` their patch maps -> x (B, N, Dv), with positions
    embed: Callable[..., Tensor]
    # prompts (M, Dv) as they enter block 0: normalised as all tokens are, but without position
    embed_prompts: Callable[[Tensor], Tensor]
    # the `pooled` tokens after the last block (B, 1 or N, Dv) -> features (B, E), not normalised
    pool: Callable[[Tensor], Tensor]

    @property
    def num_tokens(self) -> int:
        """N, the tokens of an image."""
        return self.num_prefix + self.grid[0] * self.grid[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the embedded images."""
        return next(self.visual.parameters()).dtype

    def checked(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in the tower's dtype; ZooError for raw pixels, and for images of another size."""
        size = (3, *self.visual.image_size)
        if images.shape[1:] == size and images.is_floating_point():
            return images.to(self.dtype)
        raise ZooError(
            f"This model reads images (n, {', '.join(map(str, size))}) of floats, as create_transform(model) returns "
            f"them, not {tuple(images.shape)} of {images.dtype}. For files, PIL images and raw pixels of any size: "
            "dcp_zoo.predict(model, images)."
        )

    def features(self, x: Tensor) -> Tensor:
        """`pool`, normalised; further tokens of x are ignored."""
        return F.normalize(self.pool(x[:, : self.pooled]), dim=-1)

    def block(self, i: int, x: Tensor, prompts: Tensor | KeyValue | None = None, last: bool = False) -> Tensor:
        """Block i: x (B, L, Dv) -> (B, L, Dv), or with `last` only the pooled tokens (B, 1 or N, Dv). `prompts` (M, Dv)
        are additional keys and values, or given as such; there no output is computed: the next block has new ones."""
        given = self.blocks[i].prompts(prompts.to(x.dtype)) if isinstance(prompts, Tensor) else prompts
        return self.blocks[i](x, given=given, rows=self.pooled if last else None)

    def run(
        self,
        x: Tensor,
        prompts: Sequence[Any],
        start: int = 0,
        stop: int | None = None,
        run: Callable[..., Tensor] = call,
    ) -> Tensor:
        """x (B, N, Dv) after blocks start .. stop - 1, given the prompts (M, Dv) that enter the first of these blocks.
        A block's output at its prompts is discarded if the next block has new ones, so only the last of `prompts` join
        the sequence; others are only attended to, and may be keys and values. `run` calls each block."""
        for i in range(start, len(self.blocks) if stop is None else stop):
            left = len(prompts) - (i - start)
            if left == 1:
                x = append_prompts(x, prompts[-1])
            attended = prompts[i - start] if left > 1 else None
            x = run(self.block, i, x, attended, i == len(self.blocks) - 1)
        return x


def append_prompts(x: Tensor, prompts: Tensor) -> Tensor:
    """x (B, L, Dv), prompts (M, Dv) -> (B, L + M, Dv)."""
    return torch.cat([x, prompts.to(x.dtype).expand(x.shape[0], -1, -1)], 1)


class OpenClipViT(VisionTower):
    """open_clip's `VisionTransformer`, pooled at its class token, by their mean (CLIPA) or by attention (CoCa)."""

    block_path = "transformer.resblocks"
    num_prefix = 1

    def __init__(self, visual: Any) -> None:
        self.visual, self.norm = visual, visual.ln_post
        self.has_stem = not isinstance(visual.conv1, nn.Conv2d)
        self.blocks = [OpenClipBlock(block) for block in visual.transformer.resblocks]
        self.width = visual.class_embedding.shape[-1]
        self.grid, self.patch_size = tuple(visual.grid_size), tuple(visual.patch_size)
        self.token_only = visual.pool_type == "tok" and getattr(visual, "attn_pool", None) is None
        self.pooled = 1 if self.token_only else self.num_tokens

    @staticmethod
    def missing(visual: Any) -> list[str]:
        """What an image tower lacks to be of this kind."""
        known = visual.pool_type in ("tok", "avg")
        return missing_parts(visual.transformer.resblocks) + ["pooling of kind tok or avg"] * (not known)

    def patch_maps(self, images: Tensor) -> Tensor:
        return self.visual.conv1(self.checked(images))

    def embed(self, images: Tensor, patches: bool = False) -> Tensor:
        visual = self.visual
        maps = images.to(self.dtype) if patches else self.patch_maps(images)
        tokens = maps.flatten(2).transpose(1, 2)  # (B, patches, Dv)
        class_token = visual.class_embedding.to(tokens.dtype).expand(tokens.shape[0], 1, -1)
        x = torch.cat([class_token, tokens], 1) + visual.positional_embedding.to(tokens.dtype)
        return visual.ln_pre(visual.patch_dropout(x))

    def embed_prompts(self, prompts: Tensor) -> Tensor:
        return self.visual.ln_pre(prompts.to(self.dtype))

    def pool(self, x: Tensor) -> Tensor:
        features = self.visual.ln_post(x[:, 0]) if self.token_only else self.visual._pool(x)[0]
        return features if self.visual.proj is None else features @ self.visual.proj
