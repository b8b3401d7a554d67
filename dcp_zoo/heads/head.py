"""A head: a classifier whose classes can change, and which can be saved."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dcp_zoo.backbone._torch import out_of_inference_mode
from dcp_zoo.backbone.classes import (
    Class,
    Texts,
    check_classnames,
    class_texts,
    matched,
    names_of,
    position,
    same_texts,
    text_names,
)
from dcp_zoo.backbone.clip import join
from dcp_zoo.backbone.inputs import VIEW_BATCH
from dcp_zoo.errors import ZooError, check_choice, check_range, shorten
from dcp_zoo.fields import Values
from dcp_zoo.heads import checkpoint
from dcp_zoo.heads.classifier import Classifier
from dcp_zoo.heads.config import ACCEPTED, NO_CLASSIFIER, HeadConfig, made, own_names
from dcp_zoo.probe.model import NEVER, PREFIX, TextProbe


class Head(Classifier):
    """See the module. The kinds of heads: `LinearHead`, `CacheHead`, `PromptHead` and `DCP`. A kind defines the methods
    that are abstract here and in `Classifier`; all else follows from these. For the attributes see `Classifier`."""

    # --- what a kind of head defines ---

    @abstractmethod
    def _classify_into(self, classes: list[Class], texts: Texts | None) -> None:
        """`set_classnames` for classes of which some may be among the present ones."""

    kind: ClassVar[str]  # as `config.json` calls it
    trained: ClassVar[tuple[str, ...]]  # how the names of the tensors begin that a method trains

    def _trained_state(self) -> dict[str, Tensor]:
        """The tensors that the method trained, by name: those of a checkpoint, besides the text probe's."""
        tensors = [*self.named_parameters(), *self.named_buffers()]
        return {name: tensor.detach() for name, tensor in tensors if name.startswith(self.trained)}

    def method_config(self) -> tuple[Values, Values]:
        """What `config.json` says about the method: options of the model, and values of its `dcp` block."""
        return {}, {"head": self.kind}

    def _expected_state(self, shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`_trained_state` as a file with these tensors has it."""
        return self._trained_state()

    def _load_trained(self, state: dict[str, Tensor], config: HeadConfig) -> None:
        """Load the tensors of a checkpoint, which have been checked; its `config.json` may say more."""
        self.load_state_dict(state, strict=False)  # without CLIP

    # --- classes ---

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
                each.text_name = each.name
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

    def reset_classifier(
        self, num_classes: int | Sequence[str], global_pool: str | None = None, classnames: Sequence[str] | None = None
    ) -> None:
        """Classify into other classes. ZooError for a number that is not that of `classnames`, and another pooling than
        "token".

        Args:
            num_classes: n for a fresh linear layer `fc` (n, F) on the image features, which is to be trained and reads
                no text; its classes are "class 0", "class 1", .. until `rename_class`. 0 returns image features. Names
                bring the head's own classifier back, see `set_classnames`.
            global_pool: None or "token".
            classnames: the names, beside their number.
        """
        check_choice("global_pool", global_pool, (None, "token"))  # CLIP pools its class token
        names = num_classes if classnames is None and not isinstance(num_classes, int) else classnames
        if names is not None:
            if isinstance(num_classes, int) and len(names) != num_classes:
                raise ZooError(f"num_classes={num_classes}, but there are {len(names)} class names: pass one of both.")
            self._replace_fc(self.named, None)
            self.set_classnames(names)
            return
        assert isinstance(num_classes, int)
        check_range("num_classes", num_classes, 0)
        classes = [Class(f"class {i}") for i in range(num_classes)]
        dtype = self.encoder.clip.logit_scale.dtype
        layer = nn.Linear(self.num_features, num_classes, device=self.device, dtype=dtype) if classes else None
        self._replace_fc(classes, layer)

    def _replace_fc(self, classes: list[Class], layer: nn.Linear | None) -> None:
        """Classify into these classes by this layer; None stands for the head's own classifier."""
        del self.fc  # torch would drop the weights of a state for a module that it knows as None
        self.classes, self.fc = classes, layer
        if layer is not None:
            self._outdate("the classifier was replaced")

    @out_of_inference_mode()
    def add_class(self, name: str | int, images: Tensor | Iterable[Tensor]) -> None:
        """Add a class from a few images, without training; the existing classes keep their scores, and the threshold to
        reject images stays as it is. ZooError without a text probe.

        Args:
            name: of the class; that of one that the model already has, or its position, replaces its images.
            images: (n, 3, H, W), normalised as `create_transform` does, or batches of such images.
        """
        if (probe := self.text_probe) is None or self.fc is not None:
            reason = "it has no text probe" if self.fc is None else "its classifier is a fine-tuned layer"
            by_name = ", or call model.reset_classifier([...]) to classify by names" if self.texts else ""
            raise ZooError(f"This head cannot add a class by its images: {reason}. Train a head with one{by_name}.")
        with torch.no_grad():
            features = self._encode_batches(images)
        if exists := isinstance(name, int) or name in self.classnames:
            one = self.classes[position(name, self.classes)]
        else:
            one = matched(check_classnames([*self.classnames, name]), self.classes, probe.classes)[-1]
        mean, count = features.float().mean(0), len(features)
        classes, texts, info = self.classes, self.texts, {**self.info}
        rows = probe.classes, probe.weight, probe.bias, probe.means
        try:
            if not exists:
                if isinstance(self.texts, Mapping):  # sentences of the others: of this one CLIP reads the name
                    self.texts = {one.text_name: class_texts([one.text_name], self.template)[0], **self.texts}
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

    def drop_text_probe(self) -> None:
        """Classify by the method alone, if there is a text probe; the accuracy is then what was measured without it."""
        if self.text_probe is None:
            return
        alone = (self.info.get("metrics") or {}).get(f"top1_{NO_CLASSIFIER}")
        gone = {"text_probe", *checkpoint.MEASURED} - ({"test_images"} if alone is not None else set())
        info = {name: value for name, value in self.info.items() if name not in gone}
        self.text_probe, self.info = None, info if alone is None else info | {"metrics": {"top1_stored": alone}}

    def _keep(self, classes: list[Class], texts: Texts) -> None:
        """These classes and texts from now on. What was measured, and the threshold, go with those they were for."""
        probe = self.text_probe
        if probe is not None and not same_texts(text_names(probe.classes), texts, self.texts):
            probe.threshold = torch.full_like(probe.threshold, NEVER)
        if set(classes) != set(self.named) or not same_texts(text_names(classes), texts, self.texts):
            self._outdate("the classes were changed")
        if probe is not None:
            probe.arrange(classes)
        self.classes, self.named, self.texts = classes, classes, texts

    def _encode_batches(self, images: Tensor | Iterable[Tensor]) -> Tensor:
        """`encode_image` of images (n, 3, H, W), a part of them at a time, or of batches of them."""
        batches = images.split(VIEW_BATCH) if isinstance(images, Tensor) and images.ndim else images
        features = [self.encode_image(self._batch(batch)) for batch in batches]
        return torch.cat(features) if features else self._batch(images)

    def _outdate(self, change: str) -> None:
        """Take out of `info` what was measured before this change: the accuracy, and what the threshold accepts."""
        if (fitted := self.info.get("text_probe", {})).keys() & set(ACCEPTED):
            self.info = self.info | {"text_probe": {k: v for k, v in fitted.items() if k not in ACCEPTED}}
        if self.info.keys() & {"metrics", "not_measured"}:
            reason = f"{change} after the accuracy was measured: dcp-zoo eval measures it again"
            valid = {name: value for name, value in self.info.items() if name not in checkpoint.MEASURED}
            self.info = valid | {"not_measured": reason}

    # --- in a checkpoint ---

    def to_state(self) -> dict[str, Tensor]:
        """The trained tensors by name: the method's, the text probe's, with rows in the order of the method's classes,
        and those of the layer of `reset_classifier`."""
        layer = {} if self.fc is None else {f"fc.{name}": p.detach() for name, p in self.fc.named_parameters()}
        return self._trained_state() | ({} if self.text_probe is None else self.text_probe.tensors(self.named)) | layer

    def expected_state(self, shapes: Mapping[str, Tensor], config: HeadConfig | None = None) -> dict[str, Tensor]:
        """What `to_state` gives once a checkpoint with these shapes, and this `config.json`, is loaded: it may
        bring statistics, a text probe and a layer."""
        probe = self._probe_like(shapes, [Class(name) for name in own_names(config)] if config else self.named)
        layer: dict[str, Tensor] = {}
        if config and "named" in config["dcp"]:
            columns = self.readings[0].widths[0] if probe is None else probe.weight.shape[1]
            weight = torch.empty(len(config["label_names"]), columns, device="meta")
            layer = {"fc.weight": weight, "fc.bias": weight[:, 0]}
        return self._expected_state(shapes) | ({} if probe is None else probe.tensors()) | layer

    def from_state(self, state: dict[str, Tensor], config: HeadConfig) -> None:
        """Take over a checkpoint: tensors that match `expected_state`, and what its `config.json` says of texts and of
        training. The head keeps its classes, or gets those of the checkpoint's layer. ZooError, before any change, for
        a class without sentences."""
        block, names = config["dcp"], own_names(config)
        classes, given = matched(names, self.named), self.texts if isinstance(self.texts, Mapping) else None
        wanted, read = self.named, dict(zip(classes, block.get("read", names), strict=True))
        class_texts([read.get(one, one.text_name) for one in wanted], given or block["texts"])
        for one in classes:
            one.text_name = read[one]
        self.text_probe, self.fc = None, None
        self.classes, self.named, self.texts = classes, classes, block["texts"]  # those of the tensors
        if "fc.weight" in state:
            rows, columns = state["fc.weight"].shape
            self.fc = nn.Linear(columns, rows, device=self.encoder.device)
        self._load_trained(state, config)
        self.info = made(config)
        self._classify_into(wanted, given)
        if self.fc is not None:
            self.classes = [Class(name) for name in config["label_names"]]

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

    # --- in torch's state dict ---

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """torch's. The text probe has rows for the head's present classes, as in a checkpoint."""
        state, probe = super().state_dict(*args, prefix=prefix, **kwargs), self.text_probe
        if probe is not None and probe.classes != self.named:
            own = probe.tensors(self.named)
            state.update((f"{prefix}{PREFIX}{name}", own[f"{PREFIX}{name}"]) for name in ("weight", "bias", "means"))
        return state

    def _load_from_state_dict(self, state_dict: Values, prefix: str, *args: Any) -> None:
        """A state with a text probe brings it, and one with the method's tensors alone takes it away."""
        own = {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)}
        if f"{PREFIX}weight" in own:
            probe = self._probe_like(own, self.named)
            if self.text_probe is None or probe is None or not self.text_probe.is_like(probe):
                self.text_probe = probe
        elif own.keys() & self._trained_state():
            self.text_probe = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _probe_like(self, shapes: Mapping[str, Tensor], classes: Sequence[Class]) -> TextProbe | None:
        """An empty text probe of these classes for tensors of these shapes; None if they have none."""
        if not any(name.startswith(PREFIX) for name in shapes):
            return None
        means, examples = (shapes.get(f"{PREFIX}{name}", torch.empty(0)) for name in ("means", "examples"))
        return self._probe_of(classes, means.shape[-1], len(examples)).to(self.encoder.device)
