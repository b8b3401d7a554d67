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

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcp_zoo.answers import is_rejected
from dcp_zoo.backbone._torch import WeightCache, in_eval_mode, out_of_inference_mode
from dcp_zoo.backbone.classes import (
    NO_CLASSES,
    TEMPLATE,
    Class,
    Texts,
    check_classnames,
    class_texts,
    matched,
    names_of,
    position,
    read_of,
    same_texts,
)
from dcp_zoo.backbone.clip import FrozenCLIP, Linear, Reading, join, joined, parts_of
from dcp_zoo.backbone.inputs import VIEW_BATCH, Images
from dcp_zoo.errors import ZooError, check_choice, shorten
from dcp_zoo.fields import Values
from dcp_zoo.heads import checkpoint
from dcp_zoo.heads.config import ACCEPTED, Abilities
from dcp_zoo.heads.fused import FusedHead
from dcp_zoo.heads.head_state import HeadState
from dcp_zoo.heads.timm_contract import TimmContract
from dcp_zoo.probe.model import NEVER, TextProbe
from dcp_zoo.tables import REFUSED


class Head(HeadState, TimmContract, ABC):
    """See the module. The kinds of heads: `LinearHead`, `CacheHead`, `PromptHead` and `DCP`. A kind defines the methods
    that are abstract here and in `HeadState`; all else follows from these.

    Args:
        clip: whose features and texts it reads.
        original: the CLIP before a method changed its weights, if one did.

    Attributes:
        encoder: the CLIP that the method's own features and the texts of classes come from.
        image_encoders: `ImageEncoder`s that a text probe reads besides.
        classes: in the order of the logits.
        named: the classes of the method's own classifier: these, unless `reset_classifier` replaced it.
        fc: the layer of `reset_classifier`, or None.
        texts: what CLIP reads of each class: a template for its name, or sentences; "" if the method reads none.
        text_probe: or None.
        method, abilities: the name of the method that made it, and what such a head can do.
        info: how it was made: dataset, shots, seed, recipe, metrics, ...; a change of its classes takes metrics out.
    """

    def __init__(self, clip: FrozenCLIP, original: FrozenCLIP | None = None) -> None:
        super().__init__()
        self.encoder = clip
        self.image_encoders: Any = nn.ModuleList()
        self._original: FrozenCLIP | None
        self.register_module("_original", original)
        self.text_probe: TextProbe | None
        self.register_module("text_probe", None)
        self.fc: nn.Linear | None
        self.register_module("fc", None)
        self.classes: list[Class] = []
        self.named: list[Class] = []
        self.texts: Texts = TEMPLATE
        self.method, self.abilities = "", Abilities()
        self.pretrained_cfg = self.default_cfg = dict(self.encoder.pretrained_cfg)
        _ = self.frozen.vision_tower_or_none  # cached before torch.compile traces a forward, which cannot take its lock
        self.info: Values = {}
        self._zero_shot = WeightCache()

    # --- what a kind of head defines ---

    @abstractmethod
    def _own_reading(self) -> Reading:
        """The method's image features, and its logits; `start` raises ZooError if these are no linear function."""

    @property
    def num_image_prompts(self) -> int:
        """Prompts beside the tokens of each image."""
        return 0

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
        return [*of_clip, *(Reading(encoder, encoder.widths, encoder.read) for encoder in self.image_encoders)]

    @property
    def has_own_features(self) -> bool:
        """Whether the method changed the image features."""
        return self._original is not None or self._own_reading().prompts is not None

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

    def _probe_of(self, classes: Sequence[Class], columns: int, examples: int = 0) -> TextProbe:
        """An empty text probe that reads so many columns: all parts of all readings, or each one's first alone."""
        readings = self.readings
        if columns != sum(sum(reading.widths) for reading in readings):
            readings = [reading.first_part() for reading in readings]
        own = readings[0].widths[0] if self.has_own_features else 0
        return TextProbe(classes, [reading.widths for reading in readings], own, examples)

    @torch.compiler.disable  # reads texts, and is kept
    def zero_shot_linear(self) -> Linear:
        """Zero-shot CLIP's logits of these classes by its image features."""
        clip, names, texts = self.frozen, read_of(self.named), self.texts or TEMPLATE
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
        """W (C, F) and b (C,), the text probe included. ZooError without classes, or if the logits are no linear
        function of the features: of a head that keeps its training images, or if text features depend on images, see
        `DCP.encode_text`."""
        if not self.classes:
            raise ZooError(NO_CLASSES)
        if self.fc is not None:
            return self.fc.weight, self.fc.bias
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
        distances = None
        with in_eval_mode(self):  # no answer depends on the other images
            stored = self.encode_image(images) if self.stats == "stored" else None  # one pass for both
            logits = self(images) if stored is None else self.classify(stored)
            if reject:
                distances = self.distances(self.encode_image(images) if stored is None else stored).cpu().numpy()
        found, names = logits.float().cpu().numpy(), self.classnames
        none = [False] * len(found) if threshold is None else is_rejected(found, distances, threshold)
        return [None if no else names[i] for i, no in zip(found.argmax(-1), none, strict=True)]

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
            advice = "or train a head on more images"
            raise ZooError(f"{problem}: choose from {', '.join(map(str, thresholds))}, {advice}.")
        return float(thresholds[rate])

    def distances(self, features: Tensor) -> Tensor:
        """f (B, F) -> how far each image is from what the head has seen (B,), see `TextProbe.distance`; of a head that
        can reject."""
        assert self.text_probe is not None
        return self.text_probe.distance(features, self.classes).detach()

    @property
    def cannot_reject(self) -> str:
        """Why images cannot be rejected among the present classes, and what to do; "" if they can."""
        if self.text_probe is None or self.fc is not None:
            reason = "it has no text probe" if self.fc is None else "its classifier is a fine-tuned layer"
            return f"This head cannot reject images: {reason}. Train one that can: dcp-zoo train."
        return self.text_probe.cannot_reject(self.classes)

    # --- classes ---

    @property
    def classnames(self) -> list[str]:
        """The name of each class, in the order of the logits. Names may repeat."""
        return names_of(self.classes)

    def set_classnames(self, classnames: Sequence[str], texts: Texts | None = None) -> None:
        """Classify into these classes from now on: those that the head knows by these names, of repeated ones the first
        first, and new ones, which CLIP reads. ZooError for no names or empty ones, texts that the text tower cannot
        read, and for names that the head does not know, if it reads none, as after `reset_classifier(n)`.

        Args:
            classnames: one per class. Classes of the same name stay classes of their own, with a warning: each has a
                share of the probability, the same one where only the name is known, and a prediction names any of them.
            texts: what CLIP reads of each class: a template for the names, or sentences. Default: as until now.
        """
        names = check_classnames(classnames)
        known = [] if self.text_probe is None else self.text_probe.classes
        classes = matched(names, self.classes) if self.fc is not None else matched(names, self.named, known)
        if texts and isinstance(texts, Mapping):  # they are for these names
            class_texts(names, texts)
            for each in classes:
                each.read = each.name
        self.classify_into(classes, texts)

    def classify_into(self, classes: list[Class], texts: Texts | None = None) -> None:
        """`set_classnames` for classes of which some may be among the present ones."""
        if self.fc is None:
            self._classify_into(classes, texts)
            return
        if (new := names_of(each for each in classes if each not in self.classes)) or texts:
            limit = f"has no row for {shorten(new, 5)}" if new else "reads no texts"
            problem = f"This head has a linear layer for its classes, which {limit}"
            advice = "Rename its classes (model.rename_class), or let CLIP read names: model.reset_classifier([...])"
            raise ZooError(f"{problem}. {advice}.")
        if classes != self.classes:  # else the layer stays, as an optimizer may have it
            rows = [self.classes.index(each) for each in classes]
            layer = nn.Linear(self.num_features, len(rows), device="meta")
            layer.weight, layer.bias = (nn.Parameter(t.detach()[rows]) for t in self.linear())
            self._replace_fc(classes, layer)

    @out_of_inference_mode()
    def add_class(self, name: str | int, images: Tensor | Iterable[Tensor], known: int = 0) -> None:
        """Add a class from a few images, without training; the existing classes keep their scores, and the threshold to
        reject images stays as it is. ZooError without a text probe, or for `known` images of a class that has none.

        Args:
            name: of the class; that of one that the model already has, or its position, gives it new images.
            images: (n, 3, H, W), normalised as `create_transform` does, or batches of such images.
            known: how many images the model has seen of the class, which count as much as new ones; 0 replaces them.
        """
        if (probe := self.text_probe) is None or self.fc is not None:
            reason = "it has no text probe" if self.fc is None else "its classifier is a fine-tuned layer"
            problem = f"This head cannot add a class by its images: {reason}."
            advice = "Train a head with one, or call model.reset_classifier([...]) to classify by names"
            raise ZooError(f"{problem} {advice}.")
        with torch.no_grad():
            features = self._encode_batches(images)
        if exists := isinstance(name, int) or name in self.classnames:
            one = self.classes[position(name, self.classes)]
        else:
            one = matched(check_classnames([*self.classnames, name]), self.classes, probe.classes)[-1]
        mean, count, seen = features.float().mean(0), len(features), probe.seen(one)
        if known and seen is None:
            raise ZooError(f"known={known}, but the model has seen no image of {one.name}: omit it, or pass known=0.")
        if known and seen is not None:
            count += known
            mean += (seen.float() - mean) * (known / count)
        classes, texts, info = self.classes, self.texts, {**self.info}
        rows = probe.classes, probe.weight, probe.bias, probe.means
        try:
            if not exists:
                if isinstance(self.texts, Mapping):  # sentences of the others: of this one CLIP reads the name
                    self.texts = {one.read: class_texts([one.read], self._template())[0], **self.texts}
                self._classify_into([*self.classes, one], None)
            with torch.no_grad():
                probe.add(one, mean, count, self.classes, join(self.reads))
        except BaseException:
            self._classify_into(classes, None)
            self.texts, self.info = texts, info
            probe.classes, probe.weight, probe.bias, probe.means = rows
            raise
        self.info["class_images"] = self.class_images | {one.name: count}
        self._outdate(f"the class {one.name} got other images" if exists else f"the class {one.name} was added")

    def remove_class(self, name: str | int) -> None:
        """Remove the class of this name, or at this position, whose images belong to none from now on; ZooError for the
        last one, an unknown one, or a name that several have."""
        at = position(name, self.classes)
        one, left = self.classes[at], [*self.classes[:at], *self.classes[at + 1 :]]
        check_classnames(names_of(left))
        checkpoint.note_class(self.info, self.classnames, at)
        self.classify_into(left)
        if self.text_probe is not None:
            self.text_probe.remove(one)
        self._outdate(f"the class {one.name} was removed")

    def rename_class(self, name: str | int, new: str) -> None:
        """Change the name of a class and nothing else: CLIP goes on reading the old one, so that predictions, accuracy
        and threshold stay. ZooError for an unknown class, or a new name that is another's."""
        at = position(name, self.classes)
        if new in self.classnames:
            raise ZooError(f"The class {new} exists already: choose another name, or remove that class first.")
        checkpoint.note_class(self.info, self.classnames, at, check_classnames([new])[0])
        self.classes[at].name = new

    @property
    def class_images(self) -> dict[str, int | None]:
        """How many images of each class it has seen, by name; None where that is not known."""
        return self.info.get("class_images") or dict.fromkeys(self.classnames, self.info.get("shots"))

    def _template(self) -> str:
        """What CLIP reads of a class without sentences, where the others have some."""
        return TEMPLATE

    def _keep(self, classes: list[Class], texts: Texts) -> None:
        """These classes and texts from now on. What was measured, and the threshold, go with those they were for."""
        probe = self.text_probe
        if probe is not None and not same_texts(read_of(probe.classes), texts, self.texts):
            probe.threshold = torch.full_like(probe.threshold, NEVER)
        if set(classes) != set(self.named) or not same_texts(read_of(classes), texts, self.texts):
            self._outdate("the classes were changed")
        if probe is not None:
            probe.arrange(classes)
        self.classes, self.named, self.texts = classes, classes, texts

    def _encode_batches(self, images: Tensor | Iterable[Tensor]) -> Tensor:
        """`encode_image` of images (n, 3, H, W), a part of them at a time, or of batches of them."""
        batches = images.split(VIEW_BATCH) if isinstance(images, Tensor) and images.ndim else images
        features = [self.encode_image(self._batch(batch)) for batch in batches]
        return torch.cat(features) if features else self._batch(images)

    def _batch(self, images: object) -> Tensor:
        """Images (n, 3, H, W) on the model's device; ZooError for anything else."""
        if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
            found = f"a tensor {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            problem = f"Expected images (n, 3, H, W), stacked from what create_transform returns, not {found}"
            raise ZooError(f"{problem}. For image files and PIL images: dcp_zoo.predict(model, images).")
        return images.to(self.device)

    def _outdate(self, change: str) -> None:
        """Take out of `info` what was measured before this change: the accuracy, and what the threshold accepts."""
        if (fitted := self.info.get("text_probe", {})).keys() & set(ACCEPTED):
            self.info = self.info | {"text_probe": {k: v for k, v in fitted.items() if k not in ACCEPTED}}
        if self.info.keys() & {"metrics", "not_measured"}:
            reason = f"{change} after the accuracy was measured: dcp-zoo eval measures it again"
            valid = {name: value for name, value in self.info.items() if name not in checkpoint.MEASURED}
            self.info = valid | {"not_measured": reason}

    def save_pretrained(self, directory: str | Path, dtype: torch.dtype | None = None, **info: object) -> Path:
        """Write the head, never CLIP itself, into a checkpoint folder, and return it; see `dcp_zoo.heads.checkpoint`.
        ZooError without classes, if a trained tensor is not finite, or if the directory is not writable or another
        process's.

        Args:
            directory: created if needed; a head that is there is replaced as a whole.
            dtype: of the tensors; by default float16 for those that it holds exactly, as a DCP's after training, and
                float32 for others. Those of the text probe that logits depend on stay in float32.
            **info: values for the `dcp` block of config.json, such as dataset, shots, metrics. Default: `info`.
        """
        return checkpoint.save(self, Path(directory), dtype, info or self.info)
