"""A head: features of images, logits of its classes from these, its classes, and how it is saved.

A head reads one or more encoders. Each gives one or more normalised features f_p (B, E_p) of the images x,
and has a classifier f_1 W^T + b of its first feature, if it also encodes text. With P features in all, and T
encoders that encode text, the head's features and its logits before a text probe are

    f = [f_1, .., f_P] / sqrt(P)                                                            (B, F)
    z = f W^T + b    with W = [W_1, .., W_P] sqrt(P) / T, 0 without text, b the mean of b_p  (B, C)

A text probe, if the head has one, adds to these, see `dcp_zoo.probe`; without one a head reads the method's
own first feature alone. The method's own encoder comes first. If the method changed the image features, by
prompts or by CLIP's weights, a text probe also reads plain CLIP, from inside its image tower, too, see
`VisionTower.read`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from operator import index
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcp_zoo.answers import in_distribution_score
from dcp_zoo.backbone._torch import WeightCache, in_eval_mode, layer_of
from dcp_zoo.backbone.classes import (
    NO_CLASSES,
    TEMPLATE,
    Texts,
    check_classnames,
    class_texts,
    same_texts,
    sentences_of,
)
from dcp_zoo.backbone.clip import FrozenCLIP, Reading, WeightAndBias, joined, linear_of, parts_of
from dcp_zoo.backbone.inputs import Images
from dcp_zoo.backbone.preprocessing import PREPROCESSING, Preprocessing, PretrainedCfg, preprocessing_in
from dcp_zoo.backbone.towers.open_clip import EMBEDDING
from dcp_zoo.errors import ZooError, as_zoo_error, check_choice, check_range, shorten
from dcp_zoo.fields import Values, check, problems
from dcp_zoo.heads import file
from dcp_zoo.heads.config import (
    ACCEPTED,
    FORMAT_VERSION,
    MEASURED,
    NO_CLASSIFIER,
    OWN,
    PROMISES,
    WEIGHTS_NAME,
    Abilities,
    HeadConfig,
    library_versions,
    own_names,
    without,
)
from dcp_zoo.heads.fused import FusedClassifier, FusedHead
from dcp_zoo.heads.intermediates import Intermediates
from dcp_zoo.probe.model import NEVER, PREFIX, TextProbe
from dcp_zoo.rejection import REFUSED

ENCODERS = ("encoder.", "image_encoders.", "_original.")  # how names of tensors begin that are not a head's own


class Head(Intermediates, ABC):
    """A classifier on a frozen CLIP, see the module: the base of `LinearHead`, `CacheHead`, `PromptHead` and
    `DCP`. These define the abstract methods below; all else follows from them. It also is a model of timm's,
    see `Intermediates` and the end.

    In this order: what it answers; what a kind of head defines; what it reads, and the logits of that;
    images of none of the classes; its classes; its checkpoint; the rest of timm's interface.

    Args:
        clip: the CLIP whose features and texts it reads.
        original: the CLIP before a method changed its weights, if one did.

    Attributes:
        encoder: the CLIP that the method's own features and the texts of classes come from.
        image_encoders: `ImageEncoder`s that a text probe reads besides.
        classes: their names, in the order of the logits; you may set those of `fc`.
        fc: the layer of `reset_classifier`, or None.
        texts: what CLIP reads of each class: a template for its name, or sentences; "" if the method reads
            none.
        template: what CLIP reads of a class without sentences, where the others have some.
        text_probe: or None.
        method, abilities: the name of the method that made it, and what such a head can do.
        info: how it was made: dataset, shots, seed, recipe, metrics, ...; a change of its classes takes
            metrics out.
        origin: for timm's `pretrained_cfg`, of a head of the zoo: tag, file or repo, licence.
        saved_as: hashes of the weights that it was loaded with, and saved with.
    """

    kind: ClassVar[str]  # as `config.json` calls it
    is_linear: ClassVar[bool] = True  # whether its logits are a linear function of its features
    model_args: Values = {}  # options, as `config.json` has them
    rest = ""  # of a phrase, see `PromptHead`

    def __init__(self, clip: FrozenCLIP, original: FrozenCLIP | None = None) -> None:
        super().__init__()
        self.encoder = clip
        self.image_encoders: Any = nn.ModuleList()
        self._original = original
        self.text_probe: TextProbe | None = None
        self.fc: nn.Linear | None = None
        self._classes = list[str]()
        self.method_classes = list[str]()  # of the method's own classifier, while `reset_classifier` has replaced it
        self.texts: Texts = TEMPLATE
        self.template = TEMPLATE
        self.method = ""
        self.abilities = Abilities()
        self.info = Values()
        self.origin = Values()
        self.saved_as: frozenset[str] = frozenset()
        self._clear_caches()

    # --- what it answers ---

    def forward(self, images: Images) -> Tensor:
        """Images (B, 3, H, W), normalised as `create_transform` does -> logits (B, C), without classes
        features."""
        features = self.encode_image(images)
        return self.classify(features) if self.classes else features

    def encode_image(self, images: Images) -> Tensor:
        """Images (B, 3, H, W), or other `Inputs` -> f, the normalised features (B, F) that the classifier
        reads."""
        readings = self.readings
        tokens = images
        if sum(reading.encoder is self.encoder for reading in readings) > 1:  # what both need is computed once
            tokens = self.encoder.enter(images)
        features = []
        for reading in readings:
            inputs = tokens if reading.encoder is self.encoder else images
            features.append(reading.encode(inputs))
        return joined(features, parts_of(readings))

    def classify(self, features: Tensor) -> Tensor:
        """f (B, F) -> logits z (B, C), in the precision of the classifier's weights. Raises ZooError like
        `linear`."""
        if self.fc is None:
            return self._classify(features)
        with torch.autocast(features.device.type, enabled=False):
            return self.fc(features.to(self.fc.weight.dtype))

    @torch.inference_mode()
    def predict(self, images: Tensor, reject: float | None = None) -> list[str | None]:
        """The most probable class of each of images (B, 3, H, W), normalised as `create_transform` does;
        with `reject`, None for those that belong to none of the classes, see `rejection_threshold`. ZooError
        for anything else."""
        threshold = self.rejection_threshold(reject) if reject else None
        if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
            problem = "Expected images (n, 3, H, W), stacked from what create_transform returns"
            raise ZooError(f"{problem}. For image files and PIL images: dcp_zoo.predict(model, images).")
        images = images.to(self.device)
        with in_eval_mode(self):
            features = self.encode_image(images)
            outputs = self.classify(features) if self.stats == "stored" else self(images)
            logits = outputs.float().cpu().numpy()
            names: list[str | None] = [self.classes[label] for label in logits.argmax(-1)]
            if threshold is None:
                return names
            distances = self.distances(features).cpu().numpy()
        rejected = in_distribution_score(logits, distances) < threshold
        return [None if is_out else name for name, is_out in zip(names, rejected, strict=True)]

    # --- what a kind of head defines ---

    @abstractmethod
    def _method_linear(self) -> WeightAndBias:
        """`method_linear` of a head that is linear."""

    @abstractmethod
    def _set_method_classes(self, names: list[str], texts: Texts) -> None:
        """`set_classnames` by the method's own classifier; the names have been checked."""

    @property
    def has_image_prompts(self) -> bool:
        """Whether the method has prompts in the image tower."""
        return False

    def _encode_prompted(self, images: Images) -> Tensor:
        """Images -> normalised features (B, E), with the prompts in the image tower."""
        return self.encoder.encode_image(images, self.image_prompts())

    @property
    def stats_modes(self) -> tuple[str, ...]:
        """The statistics that it can be evaluated with, the default first."""
        return ("stored",)

    @property
    def stats(self) -> str:
        """What logits depend on besides an image: on nothing if "stored". Only a DCP has others, see
        `DCP.stats`."""
        return "stored"

    @stats.setter
    def stats(self, stats: str | None) -> None:
        check_choice("stats", stats, (None, *self.stats_modes))

    # --- what it reads ---

    @property
    def frozen(self) -> FrozenCLIP:
        """Zero-shot CLIP, before the method changed anything."""
        return self._original or self.encoder

    @property
    def has_own_features(self) -> bool:
        """Whether the method changed the image features: those of plain CLIP can then be read beside
        them."""
        return self._original is not None or self.has_image_prompts

    @property
    def available_readings(self) -> list[Reading]:
        """What a text probe can read: the method's own features, plain CLIP's, and those of image
        encoders."""
        clip = self.encoder
        if self.has_image_prompts:
            embedding = {EMBEDDING: clip.num_features}
            own = Reading(clip, embedding, self._encode_prompted, self.method_linear, self.image_prompts)
        else:
            own = Reading(clip, clip.parts, clip.read, self.method_linear)
        readings = [own]
        if self.has_own_features:
            plain = self.frozen
            readings = [own.only(), Reading(plain, plain.parts, plain.read, self.zero_shot_linear)]
        for encoder in self.image_encoders:
            readings.append(Reading(encoder, encoder.parts, encoder.read))
        return readings

    @property
    def readings(self) -> list[Reading]:
        """What its classifier reads: the method's own first feature, or with a text probe what that was
        fitted to."""
        if self.text_probe is None:
            return [self.available_readings[0].only()]
        pairs = zip(self.available_readings, self.text_probe.widths, strict=False)  # encoders after those are not read
        return [reading.only(len(widths)) for reading, widths in pairs]

    @property
    def num_features(self) -> int:
        """F, the width of the features that the classifier reads."""
        return sum(sum(reading.widths) for reading in self.readings)

    # --- logits ---

    def _classify(self, features: Tensor) -> Tensor:
        """`classify` by the head's own classifier."""
        probe = self.gated_probe
        weight, bias = self.linear() if probe is None else linear_of(self.readings)
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(weight.dtype)
            logits = F.linear(features, weight, bias)
            return logits if probe is None else probe(logits, features, self.classes)

    @property
    def gated_probe(self) -> TextProbe | None:
        """Its text probe, if that is in use and has a gate, see `dcp_zoo.probe.model.gated`."""
        probe = self.text_probe
        if probe is None or self.fc is not None or not self.classes:
            return None
        return probe if len(probe.gate) else None

    def linear(self) -> WeightAndBias:
        """W (C, F) and b (C,), the text probe included, but not the gate that may follow it. ZooError
        without classes, or if the logits are no linear function of the features: of a head that keeps its
        training images, or if text features depend on images, see `DCP.encode_text`."""
        if not self.classes:
            raise ZooError(NO_CLASSES)
        if self.fc is not None:
            return self.fc.weight, self.fc.bias
        start = linear_of(self.readings)
        return start if self.text_probe is None else self.text_probe.linear(start, self.classes)

    def method_linear(self) -> WeightAndBias:
        """The method's own logits, without a text probe, as a function of its own features: weight (C, E)
        and bias (C,). ZooError if they are no linear function of these."""
        if self.is_linear:
            return self._method_linear()
        problem = f"The logits of a head of {self.method} are no linear function of features"
        raise ZooError(f"{problem}: use another method, such as text-probe, to explain, fuse or export a head.")

    @torch.compiler.disable  # reads texts, and is kept
    def zero_shot_linear(self) -> WeightAndBias:
        """Zero-shot CLIP's logits of these classes as a function of its image features."""
        clip = self.frozen
        names = self.method_classes
        texts = self.texts or TEMPLATE
        scale = clip.clip.logit_scale
        text = self._zero_shot_cache(lambda: clip.zero_shot_classifier(names, texts), [scale], names, texts)
        return clip.scaled(text)

    @torch.no_grad()
    def fuse(self) -> FusedHead:
        """A plain module, images (B, 3, H, W) -> the same logits (B, C), for the stored statistics and these
        classes; it shares its frozen weights with this model. Raises ZooError like `linear`."""
        info: Values = {
            "model": self.encoder.architecture,
            "tag": self.origin.get("tag"),
            "classnames": self.classnames,
            "preprocessing": preprocessing_in(self.encoder.pretrained_cfg),
        }
        if not self.cannot_reject:
            info |= {"threshold": self.rejection_threshold(), "promises": self.promises}
        with in_eval_mode(self):  # do not pool over a batch
            return FusedHead(self.readings, self._fused_classifier(), info)

    def _fused_classifier(self) -> FusedClassifier:
        """The classifier of the present classes; it shares no memory with the model. Raises ZooError like
        `linear`."""
        weight, bias = self.linear()
        probe = self.text_probe
        is_gated = self.gated_probe is not None
        tensors = {}
        if probe is not None and (is_gated or not self.cannot_reject):
            tensors = probe.measure(self.classes)._asdict()
            if is_gated:
                text_weight, text_bias = linear_of(self.readings)
                weight = torch.cat([weight, probe.text_scale * text_weight])
                bias = torch.cat([bias, probe.text_scale * text_bias])
                tensors["gate"] = probe.gate
        return FusedClassifier(weight=weight, bias=bias, **tensors)

    # --- images of none of the classes ---

    def rejection_threshold(self, reject: float = REFUSED) -> float:
        """Images with a lower `in_distribution_score` belong to none of the present classes; see
        `text_probe.threshold`. `reject` is the share of images of these classes that may be refused; True
        for 0.05. ZooError without a threshold for it, and for exactly these classes."""
        if self.text_probe is None or self.cannot_reject:
            raise ZooError(self.cannot_reject)
        if reject is True or reject == REFUSED:
            return self.text_probe.threshold.item()
        thresholds = self.info.get("text_probe", {}).get("thresholds", {})
        rate = str(reject)
        if rate not in thresholds:
            known = ", ".join(thresholds or [str(REFUSED)])
            raise ZooError(
                f"This head has no threshold for reject={rate}: choose from {known}, or train on more images."
            )
        return float(thresholds[rate])

    @property
    def promises(self) -> Values:
        """What holds of images like those of training for exactly these classes, see
        `dcp_zoo.probe.threshold.promises_of`; {} if nothing is known."""
        return {} if self.cannot_reject else self.info.get("text_probe", {}).get(PROMISES, {})

    def distances(self, features: Tensor) -> Tensor:
        """f (B, F) -> how far each image is from what the head was trained on (B,), see `TextProbe.measure`;
        only of a head that can reject."""
        assert self.text_probe is not None
        return self.text_probe.measure(self.classes)(features).detach()

    @property
    def cannot_reject(self) -> str:
        """Why images cannot be rejected among the present classes, and what to do; "" if they can."""
        if self.fc is None and self.text_probe is not None:
            return self.text_probe.cannot_reject(self.classes)
        reason = "it has no text probe" if self.fc is None else "its classifier is a fine-tuned layer"
        return f"This head cannot reject images: {reason}. Train one that can: dcp-zoo train."

    # --- classes ---

    @property
    def classnames(self) -> list[str]:
        """A copy of `classes`. Names may repeat."""
        return list(self.classes)

    @property
    def num_classes(self) -> int:
        """C; 0 after `reset_classifier(0)`."""
        return len(self.classes)

    def set_classnames(self, classnames: Sequence[str], texts: Texts | None = None) -> None:
        """Classify into these classes from now on. A name that the head knows keeps its class, of repeated
        names the first class first; new names are encoded by CLIP. ZooError for no names or empty ones,
        texts that the text tower cannot read, new names if the head reads none, and other classes after
        `reset_classifier(n)`.

        Args:
            classnames: one per class. Classes of the same name stay classes of their own, with a warning:
                each has a share of the probability, the same one where only the name is known, and a
                prediction names any of them.
            texts: what CLIP reads of each class: a template for the names, or sentences; {} for the usual
                template. Default: as until now.
        """
        names = check_classnames(classnames)
        if self.fc is None:
            if texts is None:
                texts = self.texts
            self._set_method_classes(names, texts or TEMPLATE)
        elif texts or names != self.classes:
            problem = f"This head has a linear layer for {shorten(self.classes, 5)}, which reads no names"
            raise ZooError(f"{problem}. Let CLIP read them: model.reset_classifier([...]).")

    @property
    def classes(self) -> list[str]:
        return list(self._classes)

    @classes.setter
    def classes(self, names: Sequence[str]) -> None:
        if self.fc is None or len(names) != self.fc.out_features:
            raise ZooError("Only the classes of a layer `fc` can be set, as many as it has: call set_classnames.")
        self._classes = list(names)

    def reset_classifier(self, num_classes: int | Sequence[str], global_pool: str | None = None) -> None:
        """Classify into other classes. ZooError for another pooling than "token".

        Args:
            num_classes: n for a fresh linear layer `fc` (n, F) on the image features, which is to be trained
                and reads no text; its classes are "class 0", "class 1", .. until you set `classes`. 0
                returns image features. Names bring the head's own classifier back, see `set_classnames`.
            global_pool: None or "token".
        """
        check_choice("global_pool", global_pool, (None, "token"))  # CLIP pools its class token
        if isinstance(num_classes, Sequence):
            self._set_method_classes(check_classnames(num_classes), self.texts or TEMPLATE)
            self._restore()
            return
        n = index(num_classes)
        check_range("num_classes", n, 0)
        self._restore()
        self._classes = [f"class {i}" for i in range(n)]
        if n:
            dtype = self.encoder.clip.logit_scale.dtype
            self.fc = nn.Linear(self.num_features, n, device=self.device, dtype=dtype)
            self._drop_measured()

    def _restore(self) -> None:
        """Classify by the head's own classifier."""
        del self.fc  # torch would drop the weights of a state for a module that it knows as None
        self.fc = None
        self._classes = self.method_classes

    def drop_text_probe(self) -> None:
        """Classify by the method alone, if there is a text probe; the accuracy is then what was measured
        without it."""
        if self.text_probe is None:
            return
        metrics = self.info.get("metrics") or {}
        alone = metrics.get(f"top1_{NO_CLASSIFIER}")
        self.info = without(self.info, {"text_probe", *MEASURED} - {"test_images"})
        if alone is not None:
            self.info["metrics"] = {"top1_stored": alone}
        self.text_probe = None

    def _set_classes(self, classes: list[str], texts: Texts) -> None:
        """These classes and texts from now on. If they differ from those before, what was measured for
        these, and the threshold, are dropped."""
        probe = self.text_probe
        if probe is not None and not same_texts(probe.classes, texts, self.texts):
            probe.threshold = torch.full_like(probe.threshold, NEVER)
        is_same = sorted(classes) == sorted(self.method_classes) and same_texts(classes, texts, self.texts)
        self._classes = classes
        self.method_classes = classes
        self.texts = texts
        if not is_same:
            self._drop_measured()

    def _drop_measured(self) -> None:
        """Take out of `info` what was measured for other classes: the accuracy, what the threshold accepts,
        what is promised, and thresholds that no longer hold."""
        self.info = without(self.info, MEASURED)
        if self.info.get("text_probe"):
            outdated = [PROMISES, *ACCEPTED]
            if self.cannot_reject:
                outdated.append("thresholds")
            self.info["text_probe"] = without(self.info["text_probe"], outdated)

    # --- in a checkpoint ---

    def to_state(self) -> dict[str, Tensor]:
        """The trained tensors by name: the method's, the text probe's, with rows in the order of the
        method's classes, and those of the layer of `reset_classifier`."""
        state = self.state_dict()
        return {name: tensor for name, tensor in state.items() if tensor.numel() and not name.startswith(ENCODERS)}

    def to_config(self, info: Values) -> Values:
        """The `config.json`: outside the `dcp` block what timm reads, inside `info`. Nothing is stored
        twice."""
        texts = self.texts
        block: Values = {
            "format_version": FORMAT_VERSION,
            "clip": self.encoder.source,
            "method": self.method,
            "abilities": self.abilities.as_dict(),
            **info,
            "head": self.kind,
            "rest": self.rest,
            "texts": sentences_of(self.method_classes, texts) if isinstance(texts, Mapping) else texts,
            "versions": library_versions(),
            "clip_fingerprint": self.frozen.fingerprint(),
        }
        if self.text_probe is not None:
            block["encoders"] = [{"name": e.source, "fingerprint": e.fingerprint()} for e in self.image_encoders]
        if self.fc is not None:
            block["named"] = self.method_classes
        return {
            "architecture": self.encoder.architecture,
            "num_classes": self.num_classes,
            "pretrained_cfg": self.encoder.pretrained_cfg,
            "model_args": self.model_args,
            "label_names": self.classes,
            "dcp": block,
        }

    def load_trained(self, state: Mapping[str, Tensor], path: str | Path) -> None:
        """Load what `to_state` gave of a head, and `path` holds. ZooError for tensors that are missing, too
        many, or of other shapes; some others may have been loaded then."""
        problem = f"{path} does not fit {self.encoder.architecture} {self.model_args or ''}"
        with as_zoo_error(f"{problem}: {{}} Create the model that it was trained with.", RuntimeError):
            missing, unexpected = self.load_state_dict(state, strict=False)
            wrong = sorted(unexpected) + sorted(self.to_state().keys() & missing)
            if wrong:
                raise RuntimeError(f"missing or unexpected {shorten(wrong, 4)}.")

    def from_state(self, config: HeadConfig, state: dict[str, Tensor], directory: str | Path) -> None:
        """Take over what `file.read` gave of a folder. The head keeps its classes, or gets those of the
        checkpoint's layer. ZooError, before any change, for another CLIP than it was trained on, or a class
        without sentences; ZooError for tensors that do not fit, after which the head has no classes."""
        block = config["dcp"]
        self.frozen.check_weights(block.get("clip_fingerprint"), directory)
        classes = self.method_classes
        sentences = self.texts if isinstance(self.texts, Mapping) else None
        class_texts(classes, sentences or block["texts"])
        self._restore()
        self._classes = []
        self.method_classes = own_names(config)  # those of the tensors
        self.texts = block["texts"]
        if "fc.weight" in state:
            rows, columns = state["fc.weight"].shape
            self.fc = nn.Linear(columns, rows, device=self.encoder.device)
        self.load_trained(state, Path(directory) / WEIGHTS_NAME)
        self.info = without(block, OWN)
        self._set_method_classes(classes, sentences or self.texts)
        if self.fc is not None:
            self._classes = config["label_names"]
        self.pretrained_cfg = preprocessing_in(config["pretrained_cfg"])
        self.saved_as |= {config["weights_sha256"]}

    def save_pretrained(self, directory: str | Path, *, overwrite: bool = False, **info: object) -> Path:
        """Write the head, never CLIP itself, into a checkpoint folder, and return it; see
        `dcp_zoo.heads.file`. Tensors are in float16 where it holds them exactly, as a DCP's after training,
        and in float32 otherwise. ZooError without classes, if a trained tensor is not finite, or if the
        directory is not writable or another process's, or has another head.

        Args:
            directory: created if needed; an earlier state of this head is replaced as a whole.
            overwrite: whether to replace another head, or this one with other classes.
            **info: values for the `dcp` block of config.json, such as dataset, shots, metrics, in addition
                to `info`.
        """
        if not self.classes:
            raise ZooError(NO_CLASSES)
        values = self.info | info
        taken = sorted(OWN & values.keys())
        if taken:
            raise ZooError(f"Not saved: config.json says {', '.join(taken)} of the head itself. Choose other names.")
        folder = Path(directory)
        config = self.to_config(values)
        sha256 = file.write(folder, config, self.to_state(), overwrite=overwrite, known=self.saved_as)
        self.saved_as |= {sha256}
        return folder

    # --- in torch's state dict ---

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """torch's. The text probe has rows for the head's present classes, as in a checkpoint."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        if self.text_probe is not None:
            tensors = self.text_probe.tensors(self.method_classes)
            state |= {f"{prefix}{PREFIX}{name}": tensor for name, tensor in tensors.items()}
        return state

    def _load_from_state_dict(self, state_dict: Values, prefix: str, *args: Any) -> None:
        """A state with a text probe brings it, and one with other tensors of a head takes it away."""
        own = {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)}
        if any(name.startswith(PREFIX) for name in own):
            widths = [reading.widths for reading in self.available_readings]
            changed = widths[0][0] if self.has_own_features else 0
            lengths = [len(own.get(f"{PREFIX}{name}", ())) for name in ("examples", "gate")]
            self.text_probe = TextProbe(self.method_classes, widths, changed, *lengths).to(self.device)
        elif not all(name.startswith(ENCODERS) for name in own):
            self.text_probe = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:  # .to(), .half(): tensors change without a new version
        self._clear_caches()
        return super()._apply(*args, **kwargs)

    def _clear_caches(self) -> None:
        self._text_cache = WeightCache()  # of the method's own text features
        self._zero_shot_cache = WeightCache()

    # --- timm's interface ---

    @torch.no_grad()
    def get_classifier(self) -> nn.Module:
        """What gives the logits of features: the layer of `reset_classifier`, which can be trained; else a
        copy of the current classifier, as a linear layer or, if a gate follows it, as a `FusedClassifier`;
        an identity without classes. Raises ZooError like `encode_text`."""
        if self.num_classes == 0:
            return nn.Identity()
        if self.fc is not None:
            return self.fc
        if self.gated_probe is not None or not self.is_linear:
            return self._fused_classifier()
        weight, bias = self.linear()
        return layer_of(weight.clone(), bias.clone() if bias.any() else None)

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    head_hidden_size = num_features

    @property
    def pretrained_cfg(self) -> PretrainedCfg:
        """What timm reads of a model: its preprocessing, its classes, the modules at its ends, and its
        origin. Set the values of its preprocessing that shall change: `model.pretrained_cfg = {"crop_pct":
        0.9}`."""
        modules = self.encoder.visual.named_modules(prefix="encoder.clip.visual")
        classifier: object = () if self.text_probe is None else "text_probe"
        if self.fc is not None:
            classifier = "fc"
        return PretrainedCfg(
            {
                **self.origin,
                **self.encoder.pretrained_cfg,
                "architecture": self.encoder.architecture,
                "num_classes": self.num_classes,
                "label_names": self.classnames,
                "first_conv": next((name for name, module in modules if isinstance(module, nn.Conv2d)), None),
                "classifier": classifier,
            }
        )

    @pretrained_cfg.setter
    def pretrained_cfg(self, cfg: Values) -> None:
        now = self.pretrained_cfg
        changes = preprocessing_in(cfg)
        others = [name for name in cfg if name not in changes and cfg[name] != now.get(name)]
        if others:
            raise ZooError(f"pretrained_cfg: of {PREPROCESSING}, {', '.join(others)} is none.")
        check("pretrained_cfg", problems(changes, Preprocessing))
        self.encoder = self.encoder.prepared_as(changes)
        if self._original is not None:
            self._original = self._original.prepared_as(changes)
        for encoder in self.image_encoders:
            encoder.read_as(self.encoder.pretrained_cfg)

    default_cfg = pretrained_cfg

    forward_features = encode_image

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Features (B, F) -> logits (B, C), or themselves with `pre_logits`. Raises ZooError like
        `encode_text`."""
        if pre_logits or self.num_classes == 0:
            return features
        return self.classify(features)


H = TypeVar("H", bound=Head)


def load_head(head: H, directory: str | Path) -> H:
    """Load the trained tensors of a checkpoint directory into a head of the same architecture, strictly, and
    what it says of how it was made. ZooError for a missing or damaged file, tensors that do not fit, or
    another CLIP than it was trained on, see `Head.from_state`."""
    config, state = file.read(directory)
    head.from_state(config, state, directory)
    return head
