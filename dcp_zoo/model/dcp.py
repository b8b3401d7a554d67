"""DCP: a frozen CLIP whose prompts rewrite each other between blocks (DCP, ACL Findings 2023, arXiv 2305.17903).

Shapes: B images, C classes, M prompt tokens, K coupled blocks, widths Dv (vision) and Dt (text), E embedding.
N is the number of contexts: 1, or B where every image has a context of its own.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dcp_zoo.errors import ZooError, check_choice
from dcp_zoo.model import towers
from dcp_zoo.model._cache import WeightCache, version
from dcp_zoo.model.cmpa import CMPA
from dcp_zoo.model.memory import MEMORIES, needs_recompute
from dcp_zoo.model.names import check_classnames, default_tokenizer, tokenize_names
from dcp_zoo.model.timm_contract import TimmContract
from dcp_zoo.model.towers import KeyValue
from dcp_zoo.train import distributed

if TYPE_CHECKING:
    from dcp_zoo.model.fused import FusedDCP

COUPLINGS = ("bidirectional", "text_to_vision")
FUSINGS = ("mean", "max", "first")
CONTEXTS = ("batch", "calibrated", "sample")
SAMPLE_TOKENS = 16384  # text tokens computed at once where every image has a text pass of its own

Images = torch.Tensor | Iterable[Any]


class DCP(TimmContract, nn.Module):
    """A CLIP classifier with deeply coupled prompts. Only the prompts and CMPA require gradients.

    Args:
        clip: an open_clip CLIP with a class-token ViT, taken as it is; widths and depths are read from it.
        classnames: one name a class; underscores are read as spaces.
        tokenizer: open_clip tokenizer of `clip`. Default: open_clip's own BPE tokenizer.
        n_ctx: M, prompt tokens in each tower.
        ctx_init: a phrase whose token embeddings start the text prompts, used when M is at most 4.
        depth: coupled blocks; at most one less than the shorter tower has.
        fusing: how prompts are fused over the batch: "mean", "max" or "first".
        shared: one CMPA for all blocks, or one for each.
        coupling: "bidirectional" (the paper), or "text_to_vision" (what the authors' release computes).
        context: see `context`.

    Raises:
        ZooError: an unsupported CLIP, an unknown choice, or class names that are empty, repeated or too long.
    """

    calibrated: torch.Tensor | None

    def __init__(
        self,
        clip: nn.Module,
        classnames: Sequence[str],
        *,
        tokenizer: Callable[..., torch.Tensor] | None = None,
        n_ctx: int = 16,
        ctx_init: str | None = None,
        depth: int = 9,
        fusing: str = "mean",
        shared: bool = True,
        coupling: str = "bidirectional",
        context: str | None = None,
    ) -> None:
        super().__init__()
        towers.check_supported(clip)
        check_choice("coupling", coupling, COUPLINGS)
        check_choice("fusing", fusing, FUSINGS)
        for name, value in (("n_ctx", n_ctx), ("depth", depth)):
            if value < 1:
                raise ZooError(f"{name} must be at least 1, not {value}.")
        room = len(towers.text_modules(clip).positional_embedding) - 4  # start, a name's token, full stop, end
        if n_ctx > room:
            raise ZooError(f"n_ctx must be at most {room} for this CLIP, not {n_ctx}: no class name would fit.")
        self.clip: Any = clip.requires_grad_(False)
        self.tokenizer = tokenizer or default_tokenizer()
        self.n_ctx, self.depth, self.fusing, self.shared, self.coupling = n_ctx, depth, fusing, shared, coupling
        self._cache = WeightCache()
        self.memory = "auto"
        self._recompute = False
        self.global_batch: int | None = None  # images of the whole batch, where several processes train on parts of it
        # what the factory knows better, for checkpoints and timm
        self.architecture, self.clip_source = "custom", "custom"
        self.info: dict[str, Any] = {}
        self.pretrained_cfg: dict[str, Any] = {}
        self.default_cfg: dict[str, Any] = {}

        dv, dt = self.visual.class_embedding.shape[-1], self.text.positional_embedding.shape[-1]
        self.prompts = nn.ParameterDict(
            {"text": torch.randn(n_ctx, dt) * 0.02, "vision": torch.randn(n_ctx, dv) * 0.02},
        )
        if ctx_init and n_ctx <= 4:
            self._start_from_phrase(ctx_init)
        self.coupled = min(depth, len(self.vision_blocks) - 1, len(self.text_blocks) - 1)  # K
        bidirectional = coupling == "bidirectional"
        self.cmpa = nn.ModuleList(CMPA(dv, dt, bidirectional) for _ in range(1 if shared else self.coupled))
        self.register_buffer("calibrated", None, persistent=False)  # (K, M, Dv)
        self.set_classnames(classnames)
        self.context = context

    # ------------------------------------------------------------------------------------------------ parts and choices

    @property
    def visual(self) -> Any:
        return self.clip.visual

    @property
    def text(self) -> Any:
        return towers.text_modules(self.clip)

    @property
    def vision_blocks(self) -> Any:
        return self.visual.transformer.resblocks

    @property
    def text_blocks(self) -> Any:
        return self.text.transformer.resblocks

    @property
    def num_features(self) -> int:
        """E, the width of image and text features."""
        return self.visual.output_dim

    @property
    def context(self) -> str:
        """How the vision prompts that CMPA reads are fused: "batch", "calibrated" or "sample".

        "batch" fuses over the images at hand, as the paper does; an image's logits then depend on its neighbours.
        "calibrated" takes the stored context that `calibrate` measured; "sample" makes each image its own batch.
        Default: "calibrated" where there is one, else "batch". Training always uses "batch".
        """
        if self.training:
            return "batch"
        return self._context or ("batch" if self.calibrated is None else "calibrated")

    @context.setter
    def context(self, context: str | None) -> None:
        if context is not None:
            check_choice("context", context, CONTEXTS)
        if context == "calibrated" and self.calibrated is None:
            raise ZooError('context="calibrated" needs a stored context: call model.calibrate(images) first.')
        self._context = context

    def set_classnames(self, classnames: Sequence[str]) -> None:
        """Classify into these classes from now on; the prompts do not belong to the classes and stay as they are.

        Raises:
            ZooError: no names, or names that are empty, repeated or longer than the context.
        """
        names = check_classnames(classnames)
        self.names: Any = self._tokenize(names)
        self.classnames = names
        self.num_classes = len(names)

    @property
    def memory(self) -> str:
        """What training does about memory: "fast" keeps all activations for the backward pass; "low" recomputes each
        vision block and each chunk of class names there, for about a third more time; "auto" (the default) does so
        where the activations would fill more than a quarter of the device's memory.
        """
        return self._memory

    @memory.setter
    def memory(self, memory: str) -> None:
        check_choice("memory", memory, MEMORIES)
        self._memory = memory

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm's name for `memory` "low" and "fast"."""
        self.memory = "low" if enable else "fast"

    def train(self, mode: bool = True) -> "DCP":
        """Set training mode for what trains; CLIP is frozen and always in eval mode."""
        super().train(mode)
        self.clip.eval()
        return self

    # ------------------------------------------------------------------------------------------------------- the method

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images (B, 3, H, W), normalised as `create_transform` does -> logits (B, C); without classes, features."""
        if self.num_classes == 0:
            return self.encode_image(images)
        self._recompute = torch.is_grad_enabled() and needs_recompute(self, images)
        if self._text_is_constant:
            prompts, _, text_features = self._constants()
            return self.logits(self._run_vision(images, prompts), text_features)
        chunks = []
        for chunk in self._chunks(images):
            image_features, prefix = self._run_both(chunk)
            chunks.append(self.logits(image_features, self._run_names(self.names, prefix)))
        return torch.cat(chunks)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """images (B, 3, H, W) -> normalised features (B, E), in the current context."""
        if not self._text_is_constant:
            return torch.cat([self._run_both(chunk)[0] for chunk in self._chunks(images)])
        return self._run_vision(images, self._constants()[0])

    def encode_text(self, classnames: Sequence[str] | None = None) -> torch.Tensor:
        """Normalised text features (C, E) of `classnames`, default the model's own.

        Raises:
            ZooError: the text features depend on images (bidirectional coupling without a calibrated context).
        """
        if not self._text_is_constant:
            raise ZooError(
                f'With bidirectional coupling and context="{self.context}" the text features depend on the images: '
                "call model.calibrate(images) and use the calibrated context, or call the model itself."
            )
        names = self.names if classnames is None else self._tokenize(check_classnames(classnames))
        _, prefix, features = self._constants()
        return (features if names is self.names else self._run_names(names, prefix))[0]

    def logits(self, image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
        """image_features (B, E), text_features (N, C, E) -> exp(logit_scale) * cosine (B, C)."""
        return towers.cosine_logits(self.clip, image_features, text_features)

    @property
    def _text_is_constant(self) -> bool:
        """Whether nothing of the text tower depends on the images."""
        return self.coupling == "text_to_vision" or self.context == "calibrated"

    def _run_both(self, images: torch.Tensor) -> tuple[torch.Tensor, list[KeyValue]]:
        """Both towers, block by block, coupled through these images.

        Returns:
            Image features (B, E), and the keys and values of the text prefix (N, H, 1 + M, d) in every block.
        """
        x = self._append(towers.embed_images(self.visual, images), self._first_prompts())
        y, prefix = self._embed_prefix(), []
        for i in range(max(len(self.vision_blocks), len(self.text_blocks))):
            if 1 <= i <= self.coupled:
                v, y = self._couple(i, self._fuse(x[:, -self.n_ctx :]), y)
                x = self._append(x[:, : -self.n_ctx], v)
            if i < len(self.vision_blocks):
                x = self._vision_block(i, x)
            if i < len(self.text_blocks):
                y, key_value = self._prefix_block(i, y)
                prefix.append(key_value)
        return towers.image_features(self.visual, x), prefix

    def _run_prefix(self) -> tuple[list[torch.Tensor], list[KeyValue]]:
        """The shared text prefix alone, where nothing of it depends on images.

        Returns:
            With the calibrated context the vision prompts (1, M, Dv) that enter blocks 0 to K; else the text prompts
            (1, M, Dt) that vision prompts are rewritten from before blocks 1 to K. And the prefix's keys and values.
        """
        calibrated = self.context == "calibrated"
        y, prefix = self._embed_prefix(), []
        prompts = [self._first_prompts()] if calibrated else []
        for i in range(len(self.text_blocks)):
            if 1 <= i <= self.coupled and calibrated:
                v, y = self._couple(i, self.calibrated[i - 1 : i], y)  # type: ignore[index]
                prompts.append(v)
            elif 1 <= i <= self.coupled:
                prompts.append(y[:, 1:])
            y, key_value = self._prefix_block(i, y)
            prefix.append(key_value)
        return prompts, prefix

    def _constants(self) -> tuple[list[torch.Tensor], list[KeyValue], torch.Tensor]:
        """What does not depend on images: `_run_prefix`, and the text features (1, C, E); cached, see `WeightCache`."""
        autocast = torch.is_autocast_enabled(self.names[0].ids.device.type)
        table = version(self.text.token_embedding.weight)
        return self._cache(self._run_text, self._text_weights(), self.names, self.context, autocast, table)

    def _run_text(self) -> tuple[list[torch.Tensor], list[KeyValue], torch.Tensor]:
        prompts, prefix = self._run_prefix()
        return prompts, prefix, self._run_names(self.names, prefix)

    def _text_weights(self) -> Iterable[torch.Tensor]:
        """Every tensor that `_run_text` reads; of the large embedding table the rows of the names alone."""
        text = self.text
        parts = [*self.text_blocks, self.cmpa, self.prompts, self.visual.ln_pre, text.ln_final]
        yield from (p for part in parts for p in part.parameters())
        yield text.positional_embedding
        yield text.token_embedding.weight[torch.cat([chunk.ids for chunk in self.names])]
        yield text.token_embedding.weight[self.names[0].sos_id]
        projection = text.text_projection
        yield from projection.parameters() if isinstance(projection, nn.Module) else ()
        yield from (t for t in (projection, self.calibrated) if isinstance(t, torch.Tensor))

    def _run_names(self, names: Any, prefix: list[KeyValue]) -> torch.Tensor:
        """Class names behind the prefix, in chunks -> text features (N, C, E)."""
        return torch.cat([self._run(towers.name_features, self.text, chunk, prefix) for chunk in names], 1)

    def _run_vision(self, images: torch.Tensor, prompts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The vision tower, given what `_run_prefix` says of prompts -> image features (B, E)."""
        x = self._vision_with(prompts, images) if self.context == "calibrated" else self._vision_asking(prompts, images)
        return towers.image_features(self.visual, x)

    def _vision_with(
        self, prompts: Sequence[torch.Tensor], images: torch.Tensor, stop: int | None = None
    ) -> torch.Tensor:
        """Tokens x as blocks 0 .. stop - 1 leave them, see `towers.prompted_vision`."""
        return towers.prompted_vision(self.visual, images, prompts, stop, self._run)

    def _vision_asking(self, text_prompts: Sequence[torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        """Tokens x after the vision tower, its prompts rewritten from the given text prompts before blocks 1 .. K."""
        x = self._append(towers.embed_images(self.visual, images), self._first_prompts())
        for i in range(len(self.vision_blocks)):
            if 1 <= i <= self.coupled:
                v = self._fuse(x[:, -self.n_ctx :]).to(self.prompts["vision"].dtype)
                v = self._cmpa(i).to_vision(v, text_prompts[i - 1].to(v.dtype))
                x = self._append(x[:, : -self.n_ctx], v)
            x = self._vision_block(i, x)
        return x

    def _couple(self, i: int, v: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """CMPA before block i: fused vision prompts v (N, M, Dv), text prefix y -> new v, y with new prompts.

        The text prompts are the same for every class, so they are their own fusion over the classes.
        """
        cmpa = self._cmpa(i)
        v, t = v.to(self.prompts["vision"].dtype), y[:, 1:].to(self.prompts["text"].dtype)  # t (1 or N, M, Dt)
        new_v = cmpa.to_vision(v, t)
        if cmpa.to_text is not None:
            new_t = cmpa.to_text(t, v)
            y = torch.cat([y[:, :1].expand(len(new_t), -1, -1), new_t.to(y.dtype)], 1)
        return new_v, y

    def _fuse(self, v: torch.Tensor) -> torch.Tensor:
        """Vision prompts (B, M, Dv) -> (N, M, Dv): fused over the batch, or left apart where context="sample"."""
        if self.context == "sample":
            return v
        if self.fusing == "mean":
            if self.training and self.global_batch:
                return distributed.batch_mean(v, self.global_batch)
            return v.mean(0, keepdim=True)
        return v.amax(0, keepdim=True) if self.fusing == "max" else v[:1]

    def _first_prompts(self) -> torch.Tensor:
        """The vision prompts (1, M, Dv) that enter block 0: they pass through ln_pre and get no position."""
        return self.visual.ln_pre(self.prompts["vision"].to(self.visual.class_embedding.dtype))[None]

    def _append(self, x: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, prompts.to(x.dtype).expand(x.shape[0], -1, -1)], 1)

    def _embed_prefix(self) -> torch.Tensor:
        return towers.embed_prefix(self.text, self.prompts["text"], self.names[0].sos_id)

    def _vision_block(self, i: int, x: torch.Tensor) -> torch.Tensor:
        blocks = self.vision_blocks
        return self._run(towers.vision_block, blocks[i], x, None, i == len(blocks) - 1)

    def _prefix_block(self, i: int, y: torch.Tensor) -> tuple[torch.Tensor, KeyValue]:
        return towers.prefix_block(self.text_blocks[i], y, i == len(self.text_blocks) - 1)

    def _cmpa(self, i: int) -> Any:
        """The CMPA that acts before block i."""
        return self.cmpa[0 if self.shared else i - 1]

    def _run(self, function: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
        if self._recompute:
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)

    def _chunks(self, images: torch.Tensor) -> Sequence[torch.Tensor]:
        """The whole batch, or pieces small enough where every image has a text pass of its own."""
        if self.context != "sample" or self.coupling == "text_to_vision":
            return [images]
        return images.split(max(1, SAMPLE_TOKENS // (1 + self.n_ctx + sum(len(chunk.ids) for chunk in self.names))))

    # ------------------------------------------------------------------------------------------- what follows training

    def calibrate(self, images: Images) -> None:
        """Measure and store the context, so that logits no longer depend on the batch.

        All images count as one batch, whose prompts are fused before each coupled block in turn; they run in the
        chunks that they come in, so memory does not grow with their number, and are read once for every block.

        Args:
            images: the few-shot training images without augmentation: (n, 3, H, W), or an iterable that can be read
                again and again (a DataLoader, a list) over batches (b, 3, H, W) or (images, labels) pairs.
        """
        from dcp_zoo.model.calibration import measure_context

        self.calibrated = measure_context(self, images)

    def fuse(self) -> "FusedDCP":
        """Image tower, constant prompts and one classifier matrix, for the calibrated context and the current classes.

        Returns:
            A plain module, images (B, 3, H, W) -> the same logits (B, C), without text tower and open_clip. It pickles,
            exports, compiles, quantises and moves on its own; frozen weights share their memory with this model.

        Raises:
            ZooError: no calibrated context.
        """
        from dcp_zoo.model.fused import fuse

        return fuse(self)

    def save_pretrained(self, directory: str | Path, dtype: torch.dtype = torch.float16, **info: Any) -> Path:
        """Write a checkpoint folder of what trained, never CLIP itself; see `dcp_zoo.checkpoint.save_pretrained`."""
        from dcp_zoo.model.checkpoint import save_pretrained

        return save_pretrained(self, directory, dtype, **info)

    # ---------------------------------------------------------------------------------------------------------- helpers

    def _tokenize(self, classnames: Sequence[str]) -> Any:
        names = tokenize_names(classnames, self.tokenizer, self.text, self.n_ctx)
        return names.to(self.prompts["text"].device)

    @torch.no_grad()
    def _start_from_phrase(self, phrase: str) -> None:
        ids = self.tokenizer([phrase])[0, 1 : 1 + self.n_ctx]
        self.prompts["text"].copy_(self.text.token_embedding(ids))
