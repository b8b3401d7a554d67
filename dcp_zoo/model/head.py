"""What every head is: encoders, what it reads of them, a classifier, and classes.

Of images x, reading r gives one or more normalised features f_p (B, E_p), its parts, and a classifier on the first of
them starts at f_p W_p^T + b_p, if the encoder reads text. With P parts, of which T have text, features and logits are

    f = [f_1, .., f_P] / sqrt(P)                                                            (B, F)
    z = f W^T + b    with W = [W_1, .., W_P] sqrt(P) / T, 0 without text, b the mean of b_p  (B, C)

followed by the text probe, if the head has one; without one only the method's own first part is read. The first reading
is the method's own. If the method changed the image features, by prompts or by CLIP's weights, a text probe reads those
of plain CLIP, too, and starts there at its text. Besides CLIP's embedding it reads what CLIP's image tower has before
it, see `VisionTower.read`.
"""

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcp_zoo.answers import Answering
from dcp_zoo.errors import ZooError, check_choice
from dcp_zoo.fields import Values
from dcp_zoo.model import checkpoint
from dcp_zoo.model._torch import WeightCache, in_eval_mode
from dcp_zoo.model.classes import (
    TEMPLATE,
    Class,
    Texts,
    check_classnames,
    matched,
    names_of,
    read_of,
    rows_of,
    same_texts,
)
from dcp_zoo.model.clip import FrozenCLIP, Linear, Reading, join, joined, parts_of
from dcp_zoo.model.config import REFUSED, Abilities, HeadConfig
from dcp_zoo.model.fused import FusedHead
from dcp_zoo.model.inputs import Images
from dcp_zoo.model.text_probe.probe import NEVER, TextProbe
from dcp_zoo.model.timm_contract import TimmContract
from dcp_zoo.model.tokens import Tokenizer


class Head(TimmContract):
    """See the module. The kinds of heads: `LinearHead`, `CacheHead`, `PromptHead` and `DCP`. A kind defines the methods
    that are abstract here; all else follows from these.

    Args:
        clip: an open_clip CLIP, taken as it is, or a `FrozenCLIP`.
        tokenizer: of an open_clip CLIP. Default: open_clip's BPE tokenizer.
        original: the CLIP before a method changed its weights, if one did.

    Attributes:
        encoder: the CLIP that the method's own features and the texts of classes come from.
        image_encoders: `ImageEncoder`s that a text probe reads besides.
        classes: in the order of the logits.
        texts: what CLIP reads of each class: a template for its name, or sentences; "" if the method reads none.
        text_probe: or None.
        method, abilities: the name of the method that made it, and what such a head can do.
    """

    def __init__(self, clip: nn.Module, tokenizer: Tokenizer | None = None, original: FrozenCLIP | None = None) -> None:
        super().__init__()
        self.encoder = clip if isinstance(clip, FrozenCLIP) else FrozenCLIP(clip, tokenizer)
        self.image_encoders: Any = nn.ModuleList()
        self._original: FrozenCLIP | None
        self.register_module("_original", original)
        self.text_probe: TextProbe | None
        self.register_module("text_probe", None)
        self.classes: list[Class] = []
        self.texts: Texts = TEMPLATE
        self.method, self.abilities = "", Abilities()
        self.pretrained_cfg = self.default_cfg = dict(self.encoder.pretrained_cfg)
        _ = self.frozen.vision_tower_or_none  # cached before torch.compile traces a forward, which cannot take its lock
        self._info: Values = {}
        self._metrics: dict[str, float] | None = None  # the newest in `info`
        self._measured: Sequence[Class] = ()  # the classes that these are about
        self._changed = ""  # what was changed since, such as "the class zebra was added"
        self._zero_shot = WeightCache()

    # --- what a kind of head defines ---

    @abstractmethod
    def _own_reading(self) -> Reading:
        """The method's image features, and its logits; `start` raises ZooError if these are no linear function."""

    @abstractmethod
    def _trained_state(self) -> dict[str, Tensor]:
        """The tensors that the method trained, by name: those of a checkpoint, besides the text probe's."""

    @abstractmethod
    def _method_config(self) -> tuple[Values, Values]:
        """What `config.json` says about the method: options of the model, and values of its `dcp` block."""

    def _expected_state(self, shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`_trained_state` as a file with these tensors has it."""
        return self._trained_state()

    def _load_trained(self, state: dict[str, Tensor], config: HeadConfig) -> None:
        """Load the tensors of a checkpoint, which have been checked; its `config.json` may say more."""
        self.load_state_dict(state, strict=False)  # without CLIP

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
        own = self._own_reading()
        plain = Reading(self.frozen, self.frozen.widths, self.frozen.read, self.zero_shot_linear)
        of_clip = [own.first_part(), plain] if self.has_own_features else [own]
        return [*of_clip, *(encoder.reading for encoder in self.image_encoders)]

    @property
    def has_own_features(self) -> bool:
        """Whether the method changed the image features."""
        return self._original is not None or self._own_reading().is_prompted

    @property
    def frozen(self) -> FrozenCLIP:
        """Zero-shot CLIP, before the method changed anything."""
        return self._original or self.encoder

    @property
    def reads(self) -> list[Reading]:
        """The readings of its classifier."""
        if self.text_probe is None:
            return [self.readings[0].first_part()]
        pairs = zip(self.readings, self.text_probe.widths, strict=False)
        return [reading if reading.widths == widths else reading.first_part() for reading, widths in pairs]

    def probe_of(self, classes: Sequence[Class], columns: int, examples: int = 0) -> TextProbe:
        """An empty text probe that reads so many columns: all parts of all readings, or each one's first alone."""
        readings = self.readings
        if columns != sum(sum(reading.widths) for reading in readings):
            readings = [reading.first_part() for reading in readings]
        own = readings[0].widths[0] if self.has_own_features else 0
        return TextProbe(classes, [reading.widths for reading in readings], own, examples)

    @torch.compiler.disable  # reads texts, and is kept
    def zero_shot_linear(self) -> Linear:
        """Zero-shot CLIP's logits of these classes by its image features."""
        clip, names, texts = self.frozen, read_of(self.classes), self.texts or TEMPLATE
        text = self._zero_shot(lambda: clip.zero_shot_classifier(names, texts), [clip.clip.logit_scale], names, texts)
        return clip.scaled(text)

    def forward(self, images: Images) -> Tensor:
        """Images (B, 3, H, W), normalised as `create_transform` does -> logits (B, C), without classes features."""
        features = self.encode_image(images)
        return self.classify(features) if self.classes else features

    def encode_image(self, images: Images) -> Tensor:
        """Images (B, 3, H, W), or other `Inputs` -> f, the normalised features (B, F) that the classifier reads."""
        reads, shared = self.reads, images
        if self.has_own_features and len(reads) > 1 and self._original is None:  # what both need is computed once
            shared = self.encoder.enter(images, reads[0].first)
        features = [reading.encode(shared if reading.encoder is self.encoder else images) for reading in reads]
        return joined(features, parts_of(reads))

    def classify(self, features: Tensor) -> Tensor:
        """f (B, F) -> logits z (B, C), in the precision of the classifier's weights. ZooError as of `linear`."""
        weight, bias = self.linear()
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features.to(weight.dtype), weight, bias)

    def linear(self) -> Linear:
        """W (C, F) and b (C,), the text probe included. ZooError if the logits are no linear function of the features:
        of a head that keeps its training images, or if text features depend on images, see `DCP.encode_text`."""
        start = join(self.reads)
        return start if self.text_probe is None else self.text_probe.linear(start, self.classes)

    def own_linear(self) -> Linear:
        """The method's own logits, without a text probe, by its own features: weight (C, E) and bias (C,)."""
        return join([self.readings[0].first_part()])

    def fuse(self) -> FusedHead:
        """A plain module, images (B, 3, H, W) -> the same logits (B, C), for the stored statistics and these classes;
        it shares its frozen weights with this model. ZooError as of `linear`."""
        return FusedHead(self)

    @torch.inference_mode()
    def predict(self, images: Tensor, reject: float | None = None) -> list[str | None]:
        """The most probable class of each of images (B, 3, H, W), normalised as `create_transform` does; with `reject`,
        None for those that belong to none of the classes, see `rejection_threshold`. ZooError for anything else."""
        threshold = self.rejection_threshold(reject) if reject else None
        images = self._batch(images)
        with in_eval_mode(self):  # no answer depends on the other images
            features = self.encode_image(images) if self.stats == "stored" or reject else None
            logits = self(images) if self.stats != "stored" or features is None else self.classify(features)
        distances = self.distances(features).cpu().numpy() if reject and features is not None else None
        rows = Answering(1, threshold)(logits.float().cpu().numpy(), self.classnames, distances)
        return [None if row.get("rejected") else row["predictions"][0]["class"] for row in rows]

    # --- images of none of the classes ---

    def rejection_threshold(self, reject: float = REFUSED) -> float:
        """Images with a lower `in_distribution_score` belong to none of the present classes; see
        `dcp_zoo.model.text_probe.fit`. `reject` is the share of images of these classes that may be refused; True for
        0.05. ZooError without a threshold for it, and for exactly these classes."""
        probe, problem = self.text_probe, self.cannot_reject
        if probe is None or problem:
            raise ZooError(problem)
        if reject is True or reject == REFUSED:
            return probe.threshold.item()
        thresholds = self.info.get("text_probe", {}).get("thresholds", {REFUSED: 0.0})
        if f"{reject:g}" not in thresholds:
            problem = f"This head has no threshold that refuses {reject:g} of the images of its classes"
            advice = "or train a head on more images"
            raise ZooError(f"{problem}: choose from {', '.join(map(str, thresholds))}, {advice}.")
        return float(thresholds[f"{reject:g}"])

    def distances(self, features: Tensor) -> Tensor:
        """f (B, F) -> how far each image is from what the head has seen (B,), see `TextProbe.distance`; of a head that
        can reject."""
        assert self.text_probe is not None
        return self.text_probe.distance(features, self.classes).detach()

    @property
    def cannot_reject(self) -> str:
        """Why images cannot be rejected among the present classes, and what to do; "" if they can."""
        if self.text_probe is None:
            return "This head cannot reject images: it has no text probe. Train one that has: dcp-zoo train."
        return self.text_probe.cannot_reject(self.classes)

    # --- classes ---

    def _keep(self, classes: list[Class], texts: Texts) -> None:
        """These classes and texts from now on. The rejection threshold is unset if the classes that it was fitted for
        have other texts now."""
        probe = self.text_probe
        if probe is not None and not same_texts(read_of(probe.classes), texts, self.texts):
            probe.threshold = torch.full_like(probe.threshold, NEVER)
        self.classes, self.texts = classes, texts

    def _batch(self, images: object) -> Tensor:
        """Images (n, 3, H, W) on the model's device; ZooError for anything else."""
        if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
            found = f"a tensor {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            problem = f"Expected images (n, 3, H, W), stacked from what create_transform returns, not {found}"
            raise ZooError(f"{problem}. For image files and PIL images: dcp_zoo.predict(model, images).")
        return images.to(self.device)

    # --- how it was made ---

    @property
    def info(self) -> Values:
        """How it was made: dataset, shots, seed, recipe, metrics, ... New metrics are of the present classes."""
        return self._info

    @info.setter
    def info(self, info: Values) -> None:
        metrics = copy.copy(info.get("metrics"))  # `info |= ...` has changed the present dict already
        if metrics != self._metrics:
            self._metrics, self._measured, self._changed = metrics, list(self.classes), ""
        self._info = info

    def save_pretrained(self, directory: str | Path, dtype: torch.dtype | None = None, **info: object) -> Path:
        """Write the head, never CLIP itself, into a checkpoint folder, and return it; see `dcp_zoo.model.checkpoint`.
        ZooError if a trained tensor is not finite, or the directory is not writable or another process's.

        Args:
            directory: created if needed; a head that is there is replaced as a whole.
            dtype: of the tensors; by default float16 for those that it holds exactly, as a DCP's after training, and
                float32 for others. Those of the text probe that logits depend on stay in float32.
            **info: values for the `dcp` block of config.json, such as dataset, shots, metrics. Default: `info`.
        """
        reason = self._changed or ("" if set(self.classes) == set(self._measured) else "the classes were changed")
        return checkpoint.save(self, Path(directory), dtype, info or self.info, reason)


class LinearHead(Head):
    """A head whose own classifier is stored: weight (C, E) and bias (C,), by the features of a CLIP of which a method
    may have changed the towers. No text is encoded, except for the names of new classes. Nothing requires gradients.
    ZooError for a classifier of another shape.

    Args:
        clip, tokenizer, original: see `Head`.
        classnames: one name per class.
        weight, bias: of the logits, (C, E) and (C,).
        texts: for the names of new classes, or sentences of each class; "" if the method reads no names.
        changed: names of tensors in `clip.state_dict()`, which a checkpoint then holds.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        clip: nn.Module,
        classnames: Sequence[str],
        weight: Tensor,
        bias: Tensor,
        *,
        texts: Texts = "",
        changed: Sequence[str] = (),
        original: FrozenCLIP | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(clip, tokenizer, original)
        self.classes, self.texts, self.changed = matched(check_classnames(classnames)), texts, list(changed)
        shapes = (self.num_classes, self.encoder.num_features), (self.num_classes,)
        if (tuple(weight.shape), tuple(bias.shape)) != shapes:
            problem = f"The classifier has the shapes {tuple(weight.shape)} and {tuple(bias.shape)}"
            raise ZooError(f"{problem}, which do not fit {shapes[0][0]} classes and {shapes[0][1]} features.")
        self.register_buffer("weight", weight.detach().contiguous())
        self.register_buffer("bias", bias.detach())
        self.eval()

    @classmethod
    def from_config(cls, clip: FrozenCLIP, config: HeadConfig, shapes: Mapping[str, Tensor]) -> "LinearHead":
        """The head of a checkpoint, by its `config.json` and its tensors' shapes, which `load_head` then loads."""
        names, known = config["label_names"], clip.clip.state_dict()
        changed = [name for name in shapes if name in known]
        own = clip.with_clip(copy.deepcopy(clip.clip)) if changed else clip
        empty = torch.zeros(len(names), clip.num_features), torch.zeros(len(names))
        original = clip if changed else None
        return cls(own, names, *empty, texts=config["dcp"]["texts"], changed=changed, original=original)

    def _own_reading(self) -> Reading:
        return Reading(self.encoder, self.encoder.widths, self.encoder.read, lambda: (self.weight, self.bias))

    def classify_into(self, classes: list[Class], texts: Texts | None) -> None:
        """New classes are read by their names; other texts are read for all classes."""
        now = texts if texts and (self.texts or not isinstance(texts, str)) else self.texts
        rows = rows_of(classes, self.classes) if now == self.texts else [None] * len(classes)
        new = [each for each, row in zip(classes, rows, strict=True) if row is None]
        weight, bias = self.weight, self.bias
        if new:
            if not self.texts:
                raise self._limited("reads no descriptions" if now else f"does not know {', '.join(names_of(new)[:5])}")
            text = F.normalize(self.encoder.encode_sentences(read_of(new), now), dim=-1)
            weight, bias = (torch.cat(parts) for parts in zip((weight, bias), self.encoder.scaled(text), strict=True))
        behind = iter(range(len(self.weight), len(weight)))
        index = [next(behind) if row is None else row for row in rows]
        self.weight, self.bias = weight[index], bias[index]
        self._keep(classes, now)

    def add_class(self, name: str | int, images: Tensor, known: int = 0) -> None:
        """See `Head.add_class`; ZooError also for a new class if the method does not read names."""
        if isinstance(name, str) and name not in self.classnames and not self.texts:
            raise self._limited(f"does not know {name}")
        super().add_class(name, images, known)

    def _limited(self, limit: str) -> ZooError:
        """The error of a head that reads no names."""
        advice = "For other classes use a head of a method that reads their names: dcp or zero-shot"
        return ZooError(f"A head of {self.method} is limited to its classes, and {limit}. {advice}.")

    def _trained_state(self) -> dict[str, Tensor]:
        state = self.encoder.clip.state_dict()
        return {"weight": self.weight, "bias": self.bias} | {name: state[name] for name in self.changed}

    def _load_trained(self, state: dict[str, Tensor], config: HeadConfig) -> None:
        self.encoder.clip.load_state_dict({name: state.pop(name) for name in self.changed}, strict=False)
        super()._load_trained(state, config)

    def _method_config(self) -> tuple[Values, Values]:
        return {}, {"head": "linear"}
