"""DCP: a frozen CLIP whose prompts rewrite each other between blocks (DCP, ACL Findings 2023, arXiv 2305.17903).

Shapes: B images, C classes, M prompt tokens, K coupled blocks, widths Dv (vision) and Dt (text), E embedding.
N is the number of contexts: 1, or B where every image has a context of its own.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from . import towers
from .cmpa import CMPA
from .errors import ZooError
from .towers import ClassNames

COUPLINGS = ("bidirectional", "text_to_vision")
FUSINGS = ("mean", "max", "first")
CONTEXTS = ("batch", "calibrated", "sample")
SAMPLE_TOKENS = 16384  # text tokens computed at once where every image has a text pass of its own

Images = torch.Tensor | Iterable[Any]


class DCP(nn.Module):
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
        self.clip: Any = clip.requires_grad_(False)
        self.tokenizer = tokenizer or default_tokenizer()
        self.n_ctx, self.depth, self.fusing, self.shared, self.coupling = n_ctx, depth, fusing, shared, coupling
        self.grad_checkpointing = False
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
        shorter = min(len(self.visual.transformer.resblocks), len(self.text.transformer.resblocks))
        self.coupled = min(depth, shorter - 1)  # K
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
        self.names = self._tokenize(names)
        self.classnames = names
        self.num_classes = len(names)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def train(self, mode: bool = True) -> "DCP":
        """Set training mode for what trains; CLIP is frozen and always in eval mode."""
        super().train(mode)
        self.clip.eval()
        return self

    # ------------------------------------------------------------------------------------------------------- the method

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images (B, 3, H, W), normalised as `create_transform` does -> logits (B, C)."""
        if self.context == "calibrated":
            contexts, text_features = self._run_text(self.names)
            return self.logits(self._run_vision(images, contexts), text_features)
        return torch.cat([self.logits(*self._run_both(chunk, self.names)) for chunk in self._chunks(images)])

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """images (B, 3, H, W) -> normalised features (B, E), in the current context."""
        if self.context == "calibrated":
            return self._run_vision(images, self._run_text(self._no_names())[0])
        return torch.cat([self._run_both(chunk, self._no_names())[0] for chunk in self._chunks(images)])

    def encode_text(self, classnames: Sequence[str] | None = None) -> torch.Tensor:
        """Normalised text features (C, E) of `classnames`, default the model's own.

        Raises:
            ZooError: the text features depend on images (bidirectional coupling without a calibrated context).
        """
        if self.coupling == "bidirectional" and self.context != "calibrated":
            raise ZooError(
                f'With bidirectional coupling and context="{self.context}" the text features depend on the images: '
                "call model.calibrate(images) and use the calibrated context, or call the model itself."
            )
        names = self.names if classnames is None else self._tokenize(check_classnames(classnames))
        return self._run_text(names)[1][0]

    def logits(self, image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
        """image_features (B, E), text_features (N, C, E) -> exp(logit_scale) * cosine (B, C)."""
        if len(text_features) == 1:
            cosine = image_features @ text_features[0].T
        else:
            cosine = torch.einsum("be,bce->bc", image_features, text_features)
        logits = self.clip.logit_scale.exp() * cosine
        return logits if self.clip.logit_bias is None else logits + self.clip.logit_bias

    def _run_both(self, images: torch.Tensor, names: ClassNames) -> tuple[torch.Tensor, torch.Tensor]:
        """Both towers, block by block, coupled through these images -> image (B, E) and text features (N, C, E)."""
        x = towers.embed_images(self.visual, images, self.prompts["vision"])  # (B, 1 + patches + M, Dv)
        y = towers.embed_text(self.text, self.prompts["text"], names)  # (1, 1 + M + S, Dt)
        vision_blocks, text_blocks = self.visual.transformer.resblocks, self.text.transformer.resblocks
        for i in range(max(len(vision_blocks), len(text_blocks))):
            if 1 <= i <= self.coupled:
                v = self._fuse(x[:, -self.n_ctx :])
                v, y = self._couple(i, v, y)
                x = self._put_vision_prompts(x, v)
            if i < len(vision_blocks):
                x = self._vision_block(i, x)
            if i < len(text_blocks):
                y = self._text_block(i, y, names)
        return towers.image_features(self.visual, x), towers.text_features(self.text, y, names)

    def _run_text(self, names: ClassNames) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The text tower alone, where nothing of it depends on images -> vision prompts per block, text features."""
        y = towers.embed_text(self.text, self.prompts["text"], names)
        vision_prompts = []
        for i in range(len(self.text.transformer.resblocks)):
            if 1 <= i <= self.coupled and self.context == "calibrated":
                v, y = self._couple(i, self.calibrated[i - 1 : i], y)  # type: ignore[index]
                vision_prompts.append(v)
            y = self._text_block(i, y, names)
        return vision_prompts, towers.text_features(self.text, y, names)

    def _run_vision(self, images: torch.Tensor, vision_prompts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The vision tower with given prompts (1, M, Dv) per coupled block -> image features (B, E)."""
        x = self._vision_until(len(self.visual.transformer.resblocks), images, vision_prompts)
        return towers.image_features(self.visual, x)

    def _vision_until(self, stop: int, images: torch.Tensor, vision_prompts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Tokens x as blocks 0 .. stop - 1 leave them."""
        x = towers.embed_images(self.visual, images, self.prompts["vision"])
        for i in range(stop):
            if 1 <= i <= self.coupled:
                x = self._put_vision_prompts(x, vision_prompts[i - 1])
            x = self._vision_block(i, x)
        return x

    def _couple(self, i: int, v: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """CMPA before block i: fused vision prompts v (N, M, Dv), text tokens y -> new v, y with new prompts.

        The text prompts are the same for every class, so they are their own fusion over the classes.
        """
        cmpa: Any = self.cmpa[0 if self.shared else i - 1]
        t = y[:, 1 : 1 + self.n_ctx]  # (1 or N, M, Dt)
        new_v = cmpa.to_vision(v, t)
        if cmpa.to_text is not None:
            new_t = cmpa.to_text(t, v)
            y = y.expand(len(new_t), -1, -1)
            y = torch.cat([y[:, :1], new_t.to(y.dtype), y[:, 1 + self.n_ctx :]], 1)
        return new_v, y

    def _fuse(self, v: torch.Tensor) -> torch.Tensor:
        """Vision prompts (B, M, Dv) -> (N, M, Dv): fused over the batch, or left apart where context="sample"."""
        if self.context == "sample":
            return v
        if self.fusing == "mean":
            return v.mean(0, keepdim=True)
        return v.amax(0, keepdim=True) if self.fusing == "max" else v[:1]

    def _put_vision_prompts(self, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, : -self.n_ctx], v.to(x.dtype).expand(len(x), -1, -1)], 1)

    def _vision_block(self, i: int, x: torch.Tensor) -> torch.Tensor:
        blocks = self.visual.transformer.resblocks
        return self._run(towers.vision_block, blocks[i], x, i == len(blocks) - 1)

    def _text_block(self, i: int, y: torch.Tensor, names: ClassNames) -> torch.Tensor:
        blocks = self.text.transformer.resblocks
        return self._run(towers.text_block, blocks[i], y, names, 1 + self.n_ctx, i == len(blocks) - 1)

    def _run(self, function: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)

    def _chunks(self, images: torch.Tensor) -> Sequence[torch.Tensor]:
        """The whole batch, or pieces small enough where every image has a text pass of its own."""
        if self.context != "sample" or self.coupling == "text_to_vision":
            return [images]
        return images.split(max(1, SAMPLE_TOKENS // (1 + self.n_ctx + len(self.names.ids))))

    # ------------------------------------------------------------------------------------------------------ calibration

    @torch.no_grad()
    def calibrate(self, images: Images) -> None:
        """Measure and store the context, so that logits no longer depend on the batch.

        All images count as one batch, whose prompts are fused before each coupled block in turn; they run in the
        chunks that they come in, so memory does not grow with their number, and are read once for every block.

        Args:
            images: the few-shot training images without augmentation: (n, 3, H, W), or an iterable that can be read
                again and again (a DataLoader, a list) over batches (b, 3, H, W) or (images, labels) pairs.
        """
        training = self.training
        self.eval()
        chunks: Iterable[Any] = images.split(64) if isinstance(images, torch.Tensor) else images
        if iter(chunks) is chunks:
            raise ZooError("calibrate reads the images once for every block: give a tensor, a list or a DataLoader.")
        device = self.prompts["vision"].device
        contexts: list[torch.Tensor] = []
        vision_prompts: list[torch.Tensor] = []
        no_names = self._no_names()
        y = towers.embed_text(self.text, self.prompts["text"], no_names)
        for i in range(1, self.coupled + 1):
            y = self._text_block(i - 1, y, no_names)
            states = (
                self._vision_until(i, _images_of(chunk).to(device), vision_prompts)[:, -self.n_ctx :]
                for chunk in chunks
            )
            contexts.append(self._fuse_stream(states))
            v, y = self._couple(i, contexts[-1], y)
            vision_prompts.append(v)
        self.calibrated = torch.cat(contexts) if contexts else None
        self.train(training)

    def _fuse_stream(self, states: Iterable[torch.Tensor]) -> torch.Tensor:
        """`_fuse` over batches (b, M, Dv) that come one after the other, as if they were one -> (1, M, Dv)."""
        total, count = None, 0
        for v in states:
            v = v.float()
            if self.fusing == "first":
                return v[:1]
            part = v.sum(0, keepdim=True) if self.fusing == "mean" else v.amax(0, keepdim=True)
            join = torch.add if self.fusing == "mean" else torch.maximum
            total = part if total is None else join(total, part)
            count += len(v)
        if total is None:
            raise ZooError("calibrate needs at least one image.")
        return total / count if self.fusing == "mean" else total

    # ---------------------------------------------------------------------------------------------------------- helpers

    def _tokenize(self, classnames: Sequence[str]) -> ClassNames:
        names = towers.tokenize_names(classnames, self.tokenizer, self.text, self.n_ctx)
        return names.to(self.prompts["text"].device)

    def _no_names(self) -> ClassNames:
        """For the prompts alone, where no text features are asked for."""
        return ClassNames([], self.names.sos_id, 1 + self.n_ctx).to(self.prompts["text"].device)

    @torch.no_grad()
    def _start_from_phrase(self, phrase: str) -> None:
        ids = self.tokenizer([phrase])[0, 1 : 1 + self.n_ctx]
        self.prompts["text"].copy_(self.text.token_embedding(ids))


def check_choice(what: str, value: str, valid: Sequence[str]) -> None:
    """Raise ZooError, naming the valid choices, unless `value` is one of them."""
    if value not in valid:
        raise ZooError(f"Unknown {what} {value!r}: choose from {', '.join(valid)}.")


def check_classnames(classnames: Sequence[str]) -> list[str]:
    """The names as a list; ZooError if there are none, or if one is empty or repeated."""
    if isinstance(classnames, str):
        raise ZooError(f"classnames must be a list of names, not the single string {classnames!r}.")
    names = list(classnames)
    spoken = [name.replace("_", " ").strip().lower() for name in names]
    if not names or not all(spoken):
        raise ZooError("Class names must not be empty: give at least one name, and text in each.")
    counts = Counter(spoken)
    repeated = sorted({name for name, s in zip(names, spoken, strict=True) if counts[s] > 1})
    if repeated and not _is_known_list(names):
        raise ZooError(f"Repeated class names cannot be told apart: {', '.join(map(repr, repeated))}. Rename them.")
    return names


def _is_known_list(names: list[str]) -> bool:
    """ImageNet's own list names two pairs of classes alike; it is taken as it is."""
    from .data import classnames

    return names == classnames("imagenet")


def default_tokenizer() -> Callable[..., torch.Tensor]:
    """open_clip's BPE tokenizer, which OpenAI's CLIP models use."""
    import open_clip

    return open_clip.tokenizer.SimpleTokenizer()


def _images_of(chunk: Any) -> torch.Tensor:
    return chunk[0] if isinstance(chunk, (tuple, list)) else chunk
