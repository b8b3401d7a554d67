"""A head: a classifier whose classes can change, and which can be saved."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dcp_zoo.backbone.classes import Texts, check_classnames, class_texts, rows_of, same_texts
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
    def _classify_into(self, names: list[str], texts: Texts | None) -> None:
        """`set_classnames` for names that were checked, by the method's own classifier."""

    kind: ClassVar[str]  # as `config.json` calls it
    trained: ClassVar[tuple[str, ...]]  # how the names of the tensors begin that a method trains

    def _trained_state(self) -> dict[str, Tensor]:
        """The tensors that the method trained, by name: those of a checkpoint, besides the text probe's."""
        tensors = [*self.named_parameters(), *self.named_buffers()]
        return {name: tensor.detach() for name, tensor in tensors if name.startswith(self.trained)}

    def method_config(self) -> tuple[Values, Values]:
        """What `config.json` says about the method: options of the model, and values of its `dcp` block."""
        return {}, {"head": self.kind}

    def _load_trained(self, state: dict[str, Tensor]) -> None:
        """Load the tensors of a checkpoint, which have been checked."""
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
        if self.fc is None:
            self._classify_into(names, texts)
            return
        rows = rows_of(names, self.classes)
        if (new := [name for name, row in zip(names, rows, strict=True) if row is None]) or texts:
            limit = f"has no row for {shorten(new, 5)}" if new else "reads no texts"
            problem = f"This head has a linear layer for its classes, which {limit}"
            raise ZooError(f"{problem}. Let CLIP read names: model.reset_classifier([...]).")
        if names != self.classes:  # else the layer stays, as an optimizer may have it
            layer = nn.Linear(self.num_features, len(rows), device="meta")
            layer.weight, layer.bias = (nn.Parameter(t.detach()[rows]) for t in self.linear())
            self._replace_fc(names, layer)

    def reset_classifier(self, num_classes: int | Sequence[str], global_pool: str | None = None) -> None:
        """Classify into other classes. ZooError for another pooling than "token".

        Args:
            num_classes: n for a fresh linear layer `fc` (n, F) on the image features, which is to be trained and reads
                no text; its classes are "class 0", "class 1", .. until you set `classes`. 0 returns image features.
                Names bring the head's own classifier back, see `set_classnames`.
            global_pool: None or "token".
        """
        check_choice("global_pool", global_pool, (None, "token"))  # CLIP pools its class token
        if not isinstance(num_classes, int):
            self._replace_fc(self.named, None)
            self.set_classnames(num_classes)
            return
        check_range("num_classes", num_classes, 0)
        classes = [f"class {i}" for i in range(num_classes)]
        dtype = self.encoder.clip.logit_scale.dtype
        layer = nn.Linear(self.num_features, num_classes, device=self.device, dtype=dtype) if classes else None
        self._replace_fc(classes, layer)

    def _replace_fc(self, classes: list[str], layer: nn.Linear | None) -> None:
        """Classify into these classes by this layer; None stands for the head's own classifier."""
        del self.fc  # torch would drop the weights of a state for a module that it knows as None
        self.classes, self.fc = classes, layer
        if layer is not None:
            self._outdate()

    @torch.no_grad()
    def get_classifier(self) -> nn.Module:
        """The layer of `reset_classifier`, which can be trained; else a copy of the current classifier as a linear
        layer, or an identity without classes. ZooError as of `encode_text`."""
        if self.num_classes == 0:
            return nn.Identity()
        if self.fc is not None:
            return self.fc
        weight, bias = (t.detach().clone() for t in self.linear())
        layer = nn.Linear(self.num_features, self.num_classes, bias=bool(bias.any()), device="meta")  # draws nothing
        layer.weight = nn.Parameter(weight)
        if layer.bias is not None:
            layer.bias = nn.Parameter(bias)
        return layer

    def drop_text_probe(self) -> None:
        """Classify by the method alone, if there is a text probe; the accuracy is then what was measured without it."""
        if self.text_probe is None:
            return
        alone = (self.info.get("metrics") or {}).get(f"top1_{NO_CLASSIFIER}")
        gone = {"text_probe", *checkpoint.MEASURED} - ({"test_images"} if alone is not None else set())
        info = {name: value for name, value in self.info.items() if name not in gone}
        self.text_probe, self.info = None, info if alone is None else info | {"metrics": {"top1_stored": alone}}

    def _keep(self, classes: list[str], texts: Texts) -> None:
        """These classes and texts from now on. What was measured, and the threshold, go with those they were for."""
        probe = self.text_probe
        if probe is not None and not same_texts(probe.classes, texts, self.texts):
            probe.threshold = torch.full_like(probe.threshold, NEVER)
        if sorted(classes) != sorted(self.named) or not same_texts(classes, texts, self.texts):
            self._outdate()
        self.classes, self.named, self.texts = classes, classes, texts

    def _outdate(self) -> None:
        """Take out of `info` what was measured of other classes: the accuracy, and what the threshold accepts."""
        self.info = {name: value for name, value in self.info.items() if name not in checkpoint.MEASURED}
        if fitted := self.info.get("text_probe"):
            self.info["text_probe"] = {name: value for name, value in fitted.items() if name not in ACCEPTED}

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimizers do not decay: the prompts, as timm treats learned tokens."""
        return {"prompts.text", "prompts.vision"}

    # --- in a checkpoint ---

    def to_state(self) -> dict[str, Tensor]:
        """The trained tensors by name: the method's, the text probe's, with rows in the order of the method's classes,
        and those of the layer of `reset_classifier`."""
        layer = {} if self.fc is None else {f"fc.{name}": p.detach() for name, p in self.fc.named_parameters()}
        return self._trained_state() | ({} if self.text_probe is None else self.text_probe.tensors(self.named)) | layer

    def expected_state(self, shapes: Mapping[str, Tensor], config: HeadConfig | None = None) -> dict[str, Tensor]:
        """What `to_state` gives once a checkpoint with these shapes, and this `config.json`, is loaded: it may
        bring statistics, a text probe and a layer."""
        probe = self._probe_like(shapes, own_names(config) if config else self.named)
        layer: dict[str, Tensor] = {}
        if config and probe and (given := config["dcp"].get("reads")):
            pairs = zip(self.readings, probe.widths, strict=False)
            known = [[*reading.parts][: len(widths)] for reading, widths in pairs]
            if given != known:
                problem = f"This head reads {given} of its encoders, and this version of dcp_zoo {known}"
                raise ZooError(f"{problem}: use the version that it was made with, or train it again.")
        if config and "named" in config["dcp"]:
            columns = self.readings[0].widths[0] if probe is None else probe.weight.shape[1]
            weight = torch.empty(len(config["label_names"]), columns, device="meta")
            layer = {"fc.weight": weight, "fc.bias": weight[:, 0]}
        return self._trained_state() | ({} if probe is None else probe.tensors()) | layer

    def from_state(self, state: dict[str, Tensor], config: HeadConfig) -> None:
        """Take over a checkpoint: tensors that match `expected_state`, and what its `config.json` says of texts and of
        training. The head keeps its classes, or gets those of the checkpoint's layer. ZooError, before any change, for
        a class without sentences."""
        wanted, texts = self.named, config["dcp"]["texts"]
        given = self.texts if isinstance(self.texts, Mapping) else None
        class_texts(wanted, given or texts)
        self.text_probe, self.fc = None, None
        self.classes = self.named = own_names(config)  # those of the tensors
        self.texts = texts
        if "fc.weight" in state:
            rows, columns = state["fc.weight"].shape
            self.fc = nn.Linear(columns, rows, device=self.encoder.device)
        self._load_trained(state)
        self.info = made(config)
        self._classify_into(wanted, given)
        if self.fc is not None:
            self.classes = config["label_names"]

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

    def _probe_like(self, shapes: Mapping[str, Tensor], classes: Sequence[str]) -> TextProbe | None:
        """An empty text probe of these classes for tensors of these shapes; None if they have none."""
        if not any(name.startswith(PREFIX) for name in shapes):
            return None
        names = ("means", "examples", "gate")
        means, examples, gate = (shapes.get(f"{PREFIX}{name}", torch.empty(0)) for name in names)
        probe = self._probe_of(classes, means.shape[-1], len(examples)).to(self.encoder.device)
        probe.gate = probe.bias.new_empty(gate.shape)
        return probe
