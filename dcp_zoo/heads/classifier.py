"""What every head computes: features of images, and logits of its classes from these.

Of images x, reading r gives one or more normalised features f_p (B, E_p), its parts, and a classifier on the first of
them starts at f_p W_p^T + b_p, if the encoder reads text. With P parts, of which T have text, features and logits are

    f = [f_1, .., f_P] / sqrt(P)                                                            (B, F)
    z = f W^T + b    with W = [W_1, .., W_P] sqrt(P) / T, 0 without text, b the mean of b_p  (B, C)

followed by the text probe, if the head has one; without one only the method's own first part is read. The first reading
is the method's own. If the method changed the image features, by prompts or by CLIP's weights, a text probe reads those
of plain CLIP, too, and starts there at its text. Besides CLIP's embedding it reads what CLIP's image tower has before
it, see `VisionTower.read`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcp_zoo.answers import is_rejected
from dcp_zoo.backbone._torch import WeightCache, in_eval_mode
from dcp_zoo.backbone.classes import NO_CLASSES, TEMPLATE, Texts
from dcp_zoo.backbone.clip import FrozenCLIP, Linear, Reading, join, joined, parts_of
from dcp_zoo.backbone.inputs import Images
from dcp_zoo.backbone.towers import FORMATS, take_blocks
from dcp_zoo.backbone.towers.open_clip import append_prompts, checkpointed
from dcp_zoo.errors import ZooError, check_choice
from dcp_zoo.fields import Values
from dcp_zoo.heads.config import Abilities
from dcp_zoo.heads.fused import FusedHead
from dcp_zoo.probe.model import TextProbe
from dcp_zoo.tables import REFUSED

Intermediate = Tensor | tuple[Tensor, Tensor]  # patches, or with the tokens before them


class Classifier(nn.Module, ABC):
    """See the module; in timm's terms, too, whose functions and scripts call the methods at the end. A `Head` is one
    whose classes can change, and which is saved.

    Args:
        clip: whose features and texts it reads.
        original: the CLIP before a method changed its weights, if one did.

    Attributes:
        encoder: the CLIP that the method's own features and the texts of classes come from.
        image_encoders: `ImageEncoder`s that a text probe reads besides.
        classes: their names, in the order of the logits; you may set those of `fc`.
        named: the classes of the method's own classifier: these, unless `reset_classifier` replaced it.
        fc: the layer of `reset_classifier`, or None.
        texts: what CLIP reads of each class: a template for its name, or sentences; "" if the method reads none.
        template: what it reads of a class without sentences, where the others have some.
        text_probe: or None.
        method, abilities: the name of the method that made it, and what such a head can do.
        info: how it was made: dataset, shots, seed, recipe, metrics, ...; a change of its classes takes metrics out.
        origin: what timm's `pretrained_cfg` says of the head of the zoo that was loaded: tag, place, licence.
    """

    def __init__(self, clip: FrozenCLIP, original: FrozenCLIP | None = None) -> None:
        super().__init__()
        self.encoder = clip
        self.image_encoders: Any = nn.ModuleList()
        self._original = original
        self.text_probe: TextProbe | None = None
        self.fc: nn.Linear | None = None
        self.classes, self.named = list[str](), list[str]()
        self.texts: Texts = TEMPLATE
        self.template = TEMPLATE
        self.method, self.abilities = "", Abilities()
        self.info, self.origin = Values(), Values()
        with suppress(ZooError):  # of a CLIP that this kind of head cannot read, which says more
            _ = clip.parts, self.frozen.parts  # cached before torch.compile traces a forward, which cannot take a lock
        self._zero_shot = WeightCache()
        self._grad_checkpointing = False

    # --- what a kind of head defines ---

    @abstractmethod
    def _own_reading(self) -> Reading:
        """The method's image features, and its logits; `start` raises ZooError if these are no linear function."""

    @property
    def stats_modes(self) -> tuple[str, ...]:
        """The statistics that it can be evaluated with, the default first."""
        return ("stored",)

    @property
    def stats(self) -> str:
        """What logits depend on besides an image: on nothing if "stored". Only a DCP has others, see `DCP.stats`."""
        return "stored"

    @stats.setter
    def stats(self, stats: str | None) -> None:
        if stats is not None:
            check_choice("stats", stats, self.stats_modes)

    # --- from images to logits ---

    @property
    def readings(self) -> list[Reading]:
        """What a classifier on it can read: the method's own features, plain CLIP's, and those of image encoders."""
        own, clip = self._own_reading(), self.frozen
        of_clip = [own]
        if own.encoder is not clip or own.prompts is not None:  # the method changed the image features
            of_clip = [own.only(), Reading(clip, clip.parts, clip.read, self.zero_shot_linear)]
        return [*of_clip, *(Reading(encoder, encoder.parts, encoder.read) for encoder in self.image_encoders)]

    @property
    def has_own_features(self) -> bool:
        """Whether the method changed the image features: those of plain CLIP can then be read beside them."""
        return sum(reading.start is not None for reading in self.readings) == 2

    @property
    def frozen(self) -> FrozenCLIP:
        """Zero-shot CLIP, before the method changed anything."""
        return self._original or self.encoder

    @property
    def reads(self) -> list[Reading]:
        """The readings of its classifier."""
        if self.text_probe is None:
            return [self.readings[0].only()]
        pairs = zip(self.readings, self.text_probe.widths, strict=False)
        return [reading.only(len(widths)) for reading, widths in pairs]

    def _probe_of(self, classes: Sequence[str], columns: int, examples: int = 0) -> TextProbe:
        """An empty text probe that reads so many columns: all parts of each reading, or fewer, as one does that
        was fitted on given features."""
        widths = [reading.widths for reading in self.readings]
        parts = max(map(len, widths))
        while parts > 1 and columns != sum(sum(each[:parts]) for each in widths):
            parts -= 1
        own = widths[0][0] if self.has_own_features else 0
        return TextProbe(classes, [each[:parts] for each in widths], own, examples)

    @torch.compiler.disable  # reads texts, and is kept
    def zero_shot_linear(self) -> Linear:
        """Zero-shot CLIP's logits of these classes by its image features."""
        clip, names, texts = self.frozen, self.named, self.texts or TEMPLATE
        text = self._zero_shot(lambda: clip.zero_shot_classifier(names, texts), [clip.clip.logit_scale], names, texts)
        return clip.scaled(text)

    def forward(self, images: Images) -> Tensor:
        """Images (B, 3, H, W), normalised as `create_transform` does -> logits (B, C), without classes features."""
        features = self.encode_image(images)
        return self.classify(features) if self.classes else features

    def encode_image(self, images: Images) -> Tensor:
        """Images (B, 3, H, W), or other `Inputs` -> f, the normalised features (B, F) that the classifier reads."""
        reads, clip, shared = self.reads, self.encoder, images
        if sum(reading.encoder is clip for reading in reads) > 1:  # what both need is computed once
            shared = clip.enter(images)
        features = [reading.encode(shared if reading.encoder is clip else images) for reading in reads]
        return joined(features, parts_of(reads))

    def classify(self, features: Tensor) -> Tensor:
        """f (B, F) -> logits z (B, C), in the precision of the classifier's weights. ZooError as of `linear`."""
        probe = self.gated_probe
        weight, bias = self.linear() if probe is None else join(self.reads)
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(weight.dtype)
            logits = F.linear(features, weight, bias)
            return logits if probe is None else probe(logits, features, self.classes)

    @property
    def gated_probe(self) -> TextProbe | None:
        """Its text probe, if that has a gate."""
        probe = self.text_probe
        return probe if probe is not None and self.fc is None and self.classes and len(probe.gate) else None

    def linear(self) -> Linear:
        """W (C, F) and b (C,), the text probe included, but not the gate that may follow it. ZooError without classes,
        or if the logits are no linear function of the features: of a head that keeps its training images, or if text
        features depend on images, see `DCP.encode_text`."""
        if not self.classes:
            raise ZooError(NO_CLASSES)
        if self.fc is not None:
            return self.fc.weight, self.fc.bias
        start = join(self.reads)
        return start if self.text_probe is None else self.text_probe.linear(start, self.classes)

    def own_linear(self) -> Linear:
        """The method's own logits, without a text probe, by its own features: weight (C, E) and bias (C,)."""
        return join([self.readings[0].only()])

    def fuse(self) -> FusedHead:
        """A plain module, images (B, 3, H, W) -> the same logits (B, C), for the stored statistics and these classes;
        it shares its frozen weights with this model. ZooError as of `linear`."""
        return FusedHead(self)

    @torch.inference_mode()
    def predict(self, images: Tensor, reject: float | None = None) -> list[str | None]:
        """The most probable class of each of images (B, 3, H, W), normalised as `create_transform` does; with `reject`,
        None for those that belong to none of the classes, see `rejection_threshold`. ZooError for anything else."""
        threshold = self.rejection_threshold(reject) if reject else None
        if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
            kind = f"a tensor {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            problem = f"Expected images (n, 3, H, W), stacked from what create_transform returns, not {kind}"
            raise ZooError(f"{problem}. For image files and PIL images: dcp_zoo.predict(model, images).")
        images = images.to(self.device)
        with in_eval_mode(self):  # no answer depends on the other images
            logits = self(images).float().cpu().numpy()
            distances = self.distances(self.encode_image(images)).cpu().numpy() if reject else None
        rejected = [False] * len(logits) if threshold is None else is_rejected(logits, distances, threshold)
        names = self.classnames
        return [None if no else names[i] for i, no in zip(logits.argmax(-1), rejected, strict=True)]

    # --- images of none of the classes ---

    def rejection_threshold(self, reject: float = REFUSED) -> float:
        """Images with a lower `in_distribution_score` belong to none of the present classes; see
        `text_probe.threshold`. `reject` is the share of images of these classes that may be refused; True for 0.05.
        ZooError without a threshold for it, and for exactly these classes."""
        probe, problem = self.text_probe, self.cannot_reject
        if probe is None or problem:
            raise ZooError(problem)
        if reject is True or reject == REFUSED:
            return probe.threshold.item()
        thresholds = self.info.get("text_probe", {}).get("thresholds", {REFUSED: 0.0})
        rate = f"{reject:g}" if isinstance(reject, (int, float)) else str(reject)
        if rate not in thresholds:
            problem = f"This head has no threshold that refuses {rate} of the images of its classes"
            known = ", ".join(map(str, thresholds))
            raise ZooError(f"{problem}: choose from {known}, or train a head on more images.")
        return float(thresholds[rate])

    def distances(self, features: Tensor) -> Tensor:
        """f (B, F) -> how far each image is from what the head has seen (B,), see `TextProbe.measure`; of a head that
        can reject."""
        assert self.text_probe is not None
        return self.text_probe.measure(self.classes)(features).detach()

    @property
    def cannot_reject(self) -> str:
        """Why images cannot be rejected among the present classes, and what to do; "" if they can."""
        if self.text_probe is None or self.fc is not None:
            reason = "it has no text probe" if self.fc is None else "its classifier is a fine-tuned layer"
            return f"This head cannot reject images: {reason}. Train one that can: dcp-zoo train."
        return self.text_probe.cannot_reject(self.classes)

    # --- in timm's terms ---

    @property
    def classnames(self) -> list[str]:
        """The name of each class, in the order of the logits. Names may repeat."""
        return list(self.classes)

    @property
    def num_classes(self) -> int:
        """C; 0 after `reset_classifier(0)`."""
        return len(self.classes)

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    @property
    def num_features(self) -> int:
        """F, the width of the features that the classifier reads."""
        return sum(sum(reading.widths) for reading in self.reads)

    head_hidden_size = num_features

    @property
    def embed_dim(self) -> int:
        """Dv, the width of the image tower's tokens."""
        return self.encoder.vision_tower.width

    @property
    def num_prefix_tokens(self) -> int:
        """The image tower's tokens before its patches: a class token, and registers."""
        return self.encoder.vision_tower.num_prefix

    @property
    def pretrained_cfg(self) -> Values:
        """What timm reads of a model: its preprocessing, its classes, the modules at its ends, and its origin."""
        modules = self.encoder.visual.named_modules(prefix="encoder.clip.visual")
        return {
            **self.origin,
            **self.encoder.pretrained_cfg,
            "architecture": self.encoder.architecture,
            "num_classes": self.num_classes,
            "label_names": self.classnames,
            "first_conv": next((name for name, module in modules if isinstance(module, nn.Conv2d)), None),
            "classifier": "fc" if self.fc is not None else "text_probe" if self.text_probe is not None else (),
        }

    @pretrained_cfg.setter
    def pretrained_cfg(self, cfg: Values) -> None:
        self.encoder.pretrained_cfg = dict(cfg)

    default_cfg = pretrained_cfg

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each vision block and each chunk of class names in the backward pass: less memory, more time."""
        self._grad_checkpointing = enable

    def _checkpointed(self, function: Callable[..., Tensor], *args: object) -> Tensor:
        return checkpointed(function, *args) if self._grad_checkpointing else function(*args)

    forward_features = encode_image

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: None = None,
    ) -> tuple[Tensor, list[Intermediate]] | list[Intermediate] | Values:
        """Patch tokens after the vision blocks, without the prompts: image features (B, E) as in `forward_features`,
        and a list with one entry per block, in order. ZooError for a block that does not exist, or an unknown format.

        Args:
            indices: None for all blocks, n for the last n, or a list of block numbers, -1 being the last.
            return_prefix_tokens: return pairs of the patches and the tokens before them, such as a class token.
            norm: apply CLIP's final layer norm to the outputs.
            stop_early: compute no block after the last of `indices`, and take the image features (B, E) there.
            output_fmt: see `FORMATS`.
            intermediates_only: omit the image features.
            output_dict: return them by timm's names: image_features, image_intermediates, image_intermediates_prefix.
            attn_mask: timm's; images have none.
        """
        check_choice("output_fmt", output_fmt, FORMATS)
        check_choice("attn_mask", attn_mask, (None,))
        tower = self.encoder.vision_tower
        blocks = take_blocks(indices, len(tower.blocks))
        stop = blocks[-1] if stop_early or intermediates_only else len(tower.blocks) - 1
        after: dict[int, Tensor] = {}  # class token, if any, and patches (B, N, Dv)
        for i, (entering, x, _) in enumerate(self._walk(images)):
            if i in blocks:
                after[i] = x[:, : tower.num_tokens]
            if i == stop:
                pooled = x if intermediates_only else tower.block(stop, entering, None, True)  # as in a forward pass
                break
        intermediates = [tower.norm(after[i]) if norm else after[i] for i in blocks]
        patches = [x[:, tower.num_prefix :] for x in intermediates]
        if output_fmt == "NCHW":
            patches = [x.transpose(1, 2).unflatten(2, tower.grid).contiguous() for x in patches]
        prefixes = [x[:, : tower.num_prefix] for x in intermediates] if return_prefix_tokens else []
        outputs: list[Intermediate] = [*zip(patches, prefixes, strict=True)] if prefixes else [*patches]
        named: Values = {"image_intermediates": patches, "image_intermediates_prefix": prefixes}
        named = {name: value for name, value in named.items() if value}
        if intermediates_only:
            return named if output_dict else outputs
        features = tower.features(pooled)
        if not stop_early and features.shape[1] < self.num_features:  # the head reads more
            features = self.forward_features(images)
        return {"image_features": features, **named} if output_dict else (features, outputs)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = None, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """The numbers of these blocks, for timm's `FeatureGetterNet`. Nothing is taken out: later blocks are not
        computed there anyway, and a DCP rewrites its prompts from both towers, block by block."""
        return take_blocks(indices, len(self.encoder.vision_tower.blocks))

    @property
    def feature_info(self) -> list[Values]:
        """timm's description of each vision block's feature map: channels, reduction and module."""
        tower = self.encoder.vision_tower
        names = [f"encoder.clip.visual.{tower.block_path}.{i}" for i in range(len(tower.blocks))]
        return [{"num_chs": tower.width, "reduction": tower.patch_size[0], "module": name} for name in names]

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Features (B, F) -> logits (B, C), or themselves with `pre_logits`. ZooError as of `encode_text`."""
        if pre_logits or self.num_classes == 0:
            return features
        return self.classify(features)

    def _walk(self, images: Images) -> Iterator[tuple[Tensor, Tensor, Any]]:
        """The tokens (B, N + M, Dv) that enter and leave each vision block, the prompts last; for a DCP, the text tower
        beside it."""
        tower, prompted = self.encoder.vision_tower, self._own_reading().prompts
        x, prompts = self.encoder.enter(images).x, prompted() if prompted else []
        n = x.shape[1]
        for i in range(len(tower.blocks)):
            x = append_prompts(x[:, :n], prompts[i]) if i < len(prompts) else x
            entering = x
            x = tower.block(i, x)
            yield entering, x, None
