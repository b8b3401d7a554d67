"""CLIP's transformers in steps, so that prompts can enter and be rewritten in between: one block, and an
image tower of blocks; here with the modules of open_clip's own `VisionTransformer`.

The modules' own `forward` cannot attend to prompts without computing their outputs, share one prefix between
classes, or compute only the pooled tokens in the last block. A subclass of `Block` knows where a kind of
module has its parameters. Prompts follow the image's own tokens, and are left out of pooling.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dcp_zoo.backbone._torch import pool
from dcp_zoo.backbone.inputs import Tokens
from dcp_zoo.backbone.mini import STAGE_WIDTH
from dcp_zoo.errors import ZooError

KeyValue = tuple[Tensor, Tensor]  # each (..., H, L, d)
# features that `VisionTower.read` may give, see there
EMBEDDING = "embedding"
HIDDEN = "hidden"
STEM = "stem"
STAGE = "stage"
MIDDLE = "middle"
LAST = "last"
JOINED = frozenset([EMBEDDING, HIDDEN, STEM])  # those that candidates of a text probe always use together
EVERY = 4  # of the last block's tokens, each fourth enters the mean of its patches; the others are not computed


class Block:
    """One block: x + out(attention(norm(x))), then the MLP. It holds the module, and no parameters of its
    own."""

    norm: Callable[[Tensor], Tensor]  # x (..., L, D) -> what attention reads (..., L, D)
    # (normed (..., L, D), "q" or "kv") -> queries (..., L, D), or keys and values (..., L, 2 D)
    project: Callable[[Tensor, str], Tensor]
    finish: Callable[[Tensor, Tensor], Tensor]  # x (..., L, D), attended (..., H, L, d) -> after the block (..., L, D)

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    def rotate(self, x: Tensor) -> Tensor:
        """Queries or keys (..., H, L, d), turned by their positions if the tower has rotary ones."""
        return x

    def query(self, normed: Tensor) -> Tensor:
        """normed (..., L, D) -> queries (..., H, L, d)."""
        return self.rotate(split_heads(self.project(normed, "q"), self.module.attn.num_heads))

    def key_value(self, normed: Tensor, rotate: bool = True) -> KeyValue:
        """normed (..., L, D) -> keys and values, each (..., H, L, d). Tokens that have no position are not
        rotated."""
        heads = self.module.attn.num_heads
        key, value = self.project(normed, "kv").chunk(2, -1)
        key = split_heads(key, heads)
        if rotate:
            key = self.rotate(key)
        return key, split_heads(value, heads)

    def prompts(self, prompts: Tensor) -> KeyValue:
        """Prompts (M, D), which have no position, as they enter the block -> their keys and values (H, M,
        d)."""
        return self.key_value(self.norm(prompts), rotate=False)

    def __call__(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        causal: bool = False,
        given: KeyValue | None = None,
        rows: slice = slice(None),
    ) -> Tensor:
        """x (B, L, D) -> its tokens `rows` after the block, by default all. `mask` is True where a query may
        attend; `given` are keys and values (H, M, d) of prompts that are attended to, but not computed."""
        normed = self.norm(x)
        query = self.query(normed[:, : rows.stop])[..., :: rows.step, :]  # by their positions
        key, value = self.key_value(normed)
        if given is not None:
            given_key, given_value = given
            key = torch.cat([key, given_key.expand(x.shape[0], -1, -1, -1)], 2)
            value = torch.cat([value, given_value.expand(x.shape[0], -1, -1, -1)], 2)
        return self.finish(x[:, rows], attend(query, key, value, mask, causal))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Attention of queries (..., H, Q, d) to keys and values (..., H, L, d) -> (..., H, Q, d). In bfloat16
    on a CPU by plain products, which with their gradients take 0.6 of the time of torch's own kernel."""
    if mask is None and not causal and query.is_cpu and query.dtype == torch.bfloat16:
        return (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(-1) @ value
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)


def run(again: bool, function: Callable[..., Tensor], *args: object, **options: Any) -> Tensor:
    """`function(*args)`; for `again`, computed once more in the backward pass instead of keeping its
    activations."""
    if again and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False, **options)
    return function(*args, **options)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(..., L, D) -> (..., heads, L, D / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merge_heads(x: Tensor) -> Tensor:
    """(..., heads, L, d) -> (..., L, heads d)."""
    return x.transpose(-3, -2).flatten(-2)


# of open_clip's block, with torch's attention or its own
PARAMETERS = {
    *"ln_1.weight ln_1.bias attn.in_proj_weight attn.in_proj_bias attn.out_proj.weight attn.out_proj.bias".split(),
    *"ln_2.weight ln_2.bias mlp.c_fc.weight mlp.c_fc.bias mlp.c_proj.weight mlp.c_proj.bias".split(),
}
SCALES = {"ls_1.gamma", "ls_2.gamma"}  # which it may have


def missing_parts(blocks: Iterable[nn.Module]) -> str:
    """What these blocks lack to be an `OpenClipBlock`, or ""."""
    wrong = set[str]()
    for block in blocks:
        wrong |= PARAMETERS ^ {name for name, _ in block.named_parameters() if name not in SCALES}
    return f"blocks of open_clip's usual layers, without norms inside, not {', '.join(sorted(wrong))}" if wrong else ""


class OpenClipBlock(Block):
    """open_clip's residual block."""

    def norm(self, x: Tensor) -> Tensor:
        return self.module.ln_1(x)

    def project(self, normed: Tensor, parts: str) -> Tensor:
        attn = self.module.attn
        width = normed.shape[-1]
        rows = slice(width) if parts == "q" else slice(width, None)
        return F.linear(normed, attn.in_proj_weight[rows], attn.in_proj_bias[rows])

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """QuickGELU, h * sigmoid(1.702 h), is computed as silu(1.702 h) / 1.702: the same function, and the
        backward pass needs one tensor of the hidden width instead of two."""
        block = self.module
        mlp = block.mlp
        x = x + block.ls_1(block.attn.out_proj(merge_heads(attended)))  # (..., L, D)
        y = block.ln_2(x)
        is_quick = type(mlp.gelu).__name__ == "QuickGELU"
        y = mlp.c_proj(F.silu(1.702 * mlp.c_fc(y)) / 1.702) if is_quick else mlp(y)
        return x + block.ls_2(y)


class VisionTower:
    """An image tower in steps: `embed`, `blocks`, `pool`. It holds the modules, and no parameters of its
    own."""

    visual: Any  # the image tower of the CLIP
    block_path: str  # name of the list of blocks in it
    blocks: list[Block]
    recomputes = False  # blocks in the backward pass, see `Head.set_grad_checkpointing`
    width: int  # Dv
    grid: tuple[int, int]  # rows and columns of patches
    patch_size: tuple[int, int]  # pixels per patch, height and width
    num_prefix: int  # tokens before the patches: class token and registers
    pooled: int  # tokens that `pool` reads, counted from the first: 1 for the class token, otherwise all N
    has_stem: bool  # whether the patch embedding is more than one convolution, so that its maps are worth keeping
    stem: Any = None  # the miniature's, in the patch embedding
    extra: dict[str, int]  # the features that `read` gives besides CLIP's embedding, in order, and their widths
    norm: nn.Module  # after the last block
    embed: Callable[[Tensor], Tokens]  # images (B, 3, H, W) -> tokens (B, N, Dv) that enter block 0, with positions
    # prompts (M, Dv) as they enter block 0: normalised as all tokens are, but without position
    embed_prompts: Callable[[Tensor], Tensor]
    # the `pooled` tokens after the last block (B, 1 or N, Dv) -> what enters CLIP's projection (B, V')
    hidden: Callable[[Tensor], Tensor]
    project: Callable[[Tensor], Tensor]  # that -> the embedding (B, E), not normalised

    @property
    def num_tokens(self) -> int:
        """N, the tokens of an image."""
        return self.num_prefix + self.grid[0] * self.grid[1]

    @property
    def middle(self) -> int:
        """The block whose entering tokens `read` reads, too."""
        return len(self.blocks) // 2

    @property
    def dtype(self) -> torch.dtype:
        """Of the embedded images."""
        return next(self.visual.parameters()).dtype

    def checked(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in the tower's dtype; ZooError for raw pixels, and for images of another
        size."""
        size = (3, *self.visual.image_size)
        if images.shape[1:] == size and images.is_floating_point():
            return images.to(self.dtype)
        raise ZooError(
            f"This model reads images (n, {', '.join(map(str, size))}) of floats, as create_transform(model) returns "
            f"them, not {tuple(images.shape)} of {images.dtype}. For files, PIL images and raw pixels of any size: "
            "dcp_zoo.predict(model, images)."
        )

    def features(self, x: Tensor) -> Tensor:
        """CLIP's embedding (B, E), normalised, of the tokens after the last block; further ones are
        ignored."""
        return F.normalize(self.project(self.hidden(x[:, : self.pooled])), dim=-1)

    def of_blocks(self) -> dict[str, int]:
        """The `extra` features from the blocks of a transformer, and their widths."""
        extra = {}
        if len(self.blocks) > 1:
            extra[MIDDLE] = 2 * self.width if self.num_prefix else self.width
        if self.pooled == 1:
            extra[LAST] = self.width
        return extra

    def read(self, entering: Tokens, prompts: Sequence[Tensor] = (), parts: int | None = None) -> Tensor:
        """Tokens -> the first `parts` kinds of features (B, ..), by default all, each normalised: CLIP's
        embedding (`EMBEDDING`) and, of `extra`, what enters CLIP's projection (`HIDDEN`), means over
        positions of a stem's last maps (`STEM`) and of earlier ones (`STAGE`), class token and mean patch as
        the block after the middle one reads them (`MIDDLE`), and the mean patch after the last block
        (`LAST`). Prompts are for the embedding alone."""
        if parts == 1:
            return self.features(self.run(entering.x, prompts))
        names = list(self.extra)
        if parts is not None:
            names = names[: parts - 1]
        x = entering.x
        start = 0
        by_name = {}
        if entering.stem is not None:
            by_name[STEM], by_name[STAGE] = entering.stem.split([self.extra[STEM], self.extra[STAGE]], 1)
        if MIDDLE in self.extra:
            start = self.middle
            x = self.run(x, (), 0, start)
            normed = self.blocks[start].norm(x)
            mean_patch = normed[:, self.num_prefix :].mean(1)
            by_name[MIDDLE] = torch.cat([normed[:, 0], mean_patch], 1) if self.num_prefix else mean_patch
        x = self.run(x, (), start, len(self.blocks) - 1)
        x = self.blocks[-1](x, rows=slice(0, None, EVERY) if LAST in names else slice(self.pooled))
        by_name[HIDDEN] = self.hidden(x[:, : self.pooled])
        if LAST in names:
            first_patch = math.ceil(self.num_prefix / EVERY)
            by_name[LAST] = self.norm(x[:, first_patch:]).mean(1)
        features = [self.project(by_name[HIDDEN]), *(by_name[name] for name in names)]
        return torch.cat([F.normalize(part, dim=-1) for part in features], -1)

    def block(self, i: int, x: Tensor, prompts: Tensor | None = None, last: bool = False) -> Tensor:
        """Block i: x (B, L, Dv) -> (B, L, Dv), or with `last` only the pooled tokens (B, 1 or N, Dv). They
        also attend to `prompts` (M, Dv), whose outputs are not computed: the next block has new ones."""
        block = self.blocks[i]
        given = None if prompts is None else block.prompts(prompts.to(x.dtype))
        return run(self.recomputes, block, x, given=given, rows=slice(self.pooled if last else None))

    def run(self, x: Tensor, prompts: Sequence[Tensor], start: int = 0, stop: int | None = None) -> Tensor:
        """x (B, N, Dv) after blocks start .. stop - 1, given the prompts (M, Dv) that enter the first of
        these blocks. A block's output at its prompts is discarded if the next block has new ones, so only
        the last of `prompts` join the sequence; others are only attended to."""
        last = len(self.blocks) - 1
        for i in range(start, last + 1 if stop is None else stop):
            attended = None
            if i - start < len(prompts) - 1:
                attended = prompts[i - start]
            elif i - start == len(prompts) - 1:
                x = append_prompts(x, prompts[-1])
            x = self.block(i, x, attended, i == last)
        return x


def append_prompts(x: Tensor, prompts: Tensor) -> Tensor:
    """x (B, L, Dv), prompts (M, Dv) -> (B, L + M, Dv). As everywhere in image towers, `x.shape[0]` and not
    `len(x)`, at which torch.export would fix the batch size."""
    return torch.cat([x, prompts.to(x.dtype).expand(x.shape[0], -1, -1)], 1)


class ImageRun:
    """A batch of images on its way through the blocks: `x` (B, N + M, Dv), prompts last.

    Args:
        tower: of the images.
        x: (B, N, Dv), what enters its first block.
        pooled_only: whether only the pooled tokens leave the last block.
    """

    def __init__(self, tower: VisionTower, x: Tensor, pooled_only: bool = False) -> None:
        self.tower = tower
        self.x = x
        self.pooled_only = pooled_only
        self.done = 0  # blocks so far

    def prompts(self, pooling: str) -> Tensor:
        """The prompts (M, Dv), pooled over the batch."""
        return pool(self.x[:, self.tower.num_tokens :], pooling)

    def replace(self, prompts: Tensor) -> None:
        """New prompts (M, Dv), the same for every image."""
        self.x = append_prompts(self.x[:, : self.tower.num_tokens], prompts)

    def step(self) -> None:
        """One block."""
        is_last = self.done == len(self.tower.blocks) - 1
        self.x = self.tower.block(self.done, self.x, last=self.pooled_only and is_last)
        self.done += 1


class OpenClipViT(VisionTower):
    """open_clip's `VisionTransformer`, pooled at its class token, by their mean (CLIPA) or by attention
    (CoCa)."""

    block_path = "transformer.resblocks"
    num_prefix = 1

    def __init__(self, visual: Any) -> None:
        self.visual = visual
        self.norm = visual.ln_post
        self.has_stem = not isinstance(visual.conv1, nn.Conv2d)
        self.blocks = [OpenClipBlock(block) for block in visual.transformer.resblocks]
        self.width = visual.class_embedding.shape[-1]
        self.grid = tuple(visual.grid_size)
        self.patch_size = tuple(visual.patch_size)
        self.token_only = visual.pool_type == "tok" and getattr(visual, "attn_pool", None) is None
        self.pooled = 1 if self.token_only else self.num_tokens
        self.stem = getattr(visual.conv1, "stem", None)
        if self.stem:
            self.extra = {STEM: visual.conv1.proj.in_channels, STAGE: STAGE_WIDTH}
        else:
            hidden = {} if visual.proj is None else {HIDDEN: visual.proj.shape[0]}
            self.extra = hidden | self.of_blocks()

    @staticmethod
    def missing(visual: Any) -> str:
        """What an image tower lacks to be of this kind, or ""."""
        if visual.pool_type not in ("tok", "avg"):
            return "pooling of kind tok or avg"
        return missing_parts(visual.transformer.resblocks)

    def embed(self, images: Tensor) -> Tokens:
        visual = self.visual
        images = self.checked(images)
        stem_means = None
        if self.stem is None:
            maps = visual.conv1(images)
        else:
            maps, stem_means = self.stem.read(images)
            maps = visual.conv1.proj(maps)
        tokens = maps.flatten(2).transpose(1, 2)  # (B, patches, Dv)
        class_token = visual.class_embedding.to(tokens.dtype).expand(tokens.shape[0], 1, -1)
        x = torch.cat([class_token, tokens], 1) + visual.positional_embedding.to(tokens.dtype)
        return Tokens(visual.ln_pre(visual.patch_dropout(x)), stem_means)

    def embed_prompts(self, prompts: Tensor) -> Tensor:
        return self.visual.ln_pre(prompts.to(self.dtype))

    def hidden(self, x: Tensor) -> Tensor:
        return self.visual.ln_post(x[:, 0]) if self.token_only else self.visual._pool(x)[0]

    def project(self, hidden: Tensor) -> Tensor:
        return hidden if self.visual.proj is None else hidden @ self.visual.proj
