"""What every head is: a frozen CLIP, what a method learned for it, and class names.

With images x (B, 3, H, W), normalised features f (B, E) and logits z (B, C):

    f = encode_image(x)
    z = classify(f)        the method's own logits, followed by the text probe if the head has one

If the method changed the image features, a head with a text probe reads the frozen tower's, too:

    f = [encode_own(x), encode_frozen(x)] / sqrt(2)    (B, 2E)
    z = the mean of the method's own logits and zero-shot CLIP's, followed by the text probe
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcp_zoo.answers import Answering
from dcp_zoo.errors import ZooError, check_choice
from dcp_zoo.model import checkpoint
from dcp_zoo.model._torch import WeightCache, in_eval_mode
from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.config import FORMAT_VERSION, REFUSED, WEIGHTS_NAME, HeadConfig, read_config
from dcp_zoo.model.fused import FusedHead, both
from dcp_zoo.model.names import TEMPLATE, Texts, Tokenizer, check_classnames, same_texts
from dcp_zoo.model.text_probe import NEVER, PREFIX, Linear, TextProbe, join
from dcp_zoo.model.timm_contract import TimmContract
from dcp_zoo.model.towers.vision import Step, append_prompts

MEASURED = ("metrics", "test_images", "balanced_top1")  # what `info` says of the test
ORIGIN = ("tag", "file", "hf_hub_id", "source", "license")  # of the head from which a model was loaded


class Head(TimmContract):
    """See the module. The kinds of heads: `DCP`, `PromptHead`, `LinearHead` and `CacheHead`. A kind defines the
    abstract methods below; all else follows from these."""

    method: str  # the name of the method that made it
    n_ctx = 0  # M, prompt tokens after those of the image
    first_blocks: Sequence[int] = (0, 0)  # that prompts enter, of the image and of the text tower
    name_tokens: Any  # chunks of class names, where the text tower reads them with prompts; else None
    classnames: list[str]
    num_classes: int
    text_probe: TextProbe | None
    since_measured: str  # what was changed that affects the metrics, such as "the class zebra was added"; "" if nothing
    is_linear = True  # whether its logits are a linear function of its image features
    is_coupled = False  # whether the prompts of both towers rewrite each other, as explanations show
    has_changed_tower = False  # whether the method changed CLIP's own weights

    def __init__(self, clip: nn.Module, tokenizer: Tokenizer | None = None) -> None:
        super().__init__(clip, tokenizer)
        self.register_module("text_probe", None)
        self.register_module("name_tokens", None)
        self.info = {}
        self._frozen_text = WeightCache()

    def encode_own(self, images: Tensor, patches: bool = False) -> Tensor:
        """images (B, 3, H, W), or with `patches` their patch maps -> the method's normalised features (B, E)."""
        return self.encode_prompted(images, (), patches)

    @abstractmethod
    def own_linear(self) -> Linear:
        """The method's own logits by image features: weight (C, E) and bias (C,). ZooError if they are not linear."""

    @abstractmethod
    def set_classnames(self, classnames: Sequence[str], texts: Texts | None = None) -> None:
        """Classify into these classes from now on. ZooError for names that the head does not know, if it reads none.

        Args:
            classnames: one per class.
            texts: what CLIP reads of each class: a template for the names, or sentences. Default: as until now.
        """

    @abstractmethod
    def trained_state(self) -> dict[str, Tensor]:
        """The tensors that the method trained, by name: those of a checkpoint, besides the text probe's."""

    @abstractmethod
    def method_config(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `config.json` says about the method: options of the model, and values of its `dcp` block."""

    @property
    def frozen(self) -> FrozenCLIP:
        """The CLIP before the method changed anything."""
        return self

    def encode_frozen(self, images: Tensor, patches: bool = False) -> Tensor:
        """images as in `encode_own` -> normalised features (B, E) of the frozen tower."""
        return self.frozen.encode_prompted(images, (), patches)

    def frozen_linear(self) -> Linear:
        """Zero-shot CLIP's logits of these classes as a linear function of the frozen tower's features."""
        clip, names, texts = self.frozen, self.classnames, self.texts
        text = self._frozen_text(lambda: clip.zero_shot_classifier(names, texts), [clip.clip.logit_scale], names, texts)
        return clip.scaled(text)

    @property
    def has_own_features(self) -> bool:
        """Whether its image features differ from the frozen tower's."""
        return self.is_prompted or self.has_changed_tower

    @property
    def is_fitted(self) -> bool:
        """Whether its classifier was fitted to the features of training images: no text probe can follow."""
        return False

    @property
    def reads_frozen(self) -> bool:
        """Whether it reads the frozen tower's features beside its own."""
        return self.text_probe is not None and self.text_probe.readings == 2

    @property
    def num_features(self) -> int:
        """The width of the features that the classifier reads: E, or 2E if they are of two towers."""
        return super().num_features * (1 + self.reads_frozen)

    def encode_image(self, images: Tensor, patches: bool = False) -> Tensor:
        """images (B, 3, H, W), or with `patches` their patch maps -> the normalised features that `classify` reads."""
        own = self.encode_own(images, patches)
        return both(own, self.encode_frozen(images, patches)) if self.reads_frozen else own

    @property
    def is_prompted(self) -> bool:
        """Whether prompts enter the image tower; without any, its features are those of its frozen weights alone."""
        return False

    def image_prompts(self) -> list[Tensor]:
        """The prompts (M, Dv) that enter the vision blocks from `first_block` on."""
        return []

    @property
    def texts(self) -> Texts:
        """What zero-shot CLIP reads of this head's classes."""
        return TEMPLATE

    def store_stats(self, images: Tensor | Iterable[Any], patches: bool = False) -> None:
        """Store what logits depend on besides an image; only a DCP has that, see `DCP.store_stats`."""

    def pool_with(self, mean: Callable[[Tensor], Tensor] | None) -> None:
        """Pool over the training batches of all processes by this mean; only a DCP pools at all."""

    def keep_texts(self, name: str, new: str) -> None:
        """Let CLIP read the same of a class when it is renamed."""

    @property
    def stats_modes(self) -> tuple[str, ...]:
        """The statistics that it can be evaluated with, the default first."""
        return ("stored",)

    @property
    def stats(self) -> str:
        """What logits depend on besides an image: on nothing if "stored". See `DCP.stats`."""
        return "stored"

    @stats.setter
    def stats(self, stats: str | None) -> None:
        if stats is not None:
            check_choice("stats", stats, self.stats_modes)

    @property
    def info(self) -> dict[str, Any]:
        """How it was made: dataset, shots, seed, recipe, metrics, ..."""
        return self._info

    @info.setter
    def info(self, info: dict[str, Any]) -> None:
        self._info, self.since_measured = info, ""
        self.measured_classes = sorted(getattr(self, "classnames", ()))  # those that `metrics` are about

    def forward(self, images: Tensor, patches: bool = False) -> Tensor:
        """images (B, 3, H, W), or with `patches` their patch maps -> logits (B, C), without classes features."""
        return self.forward_head(self.encode_image(images, patches))

    def classify(self, features: Tensor) -> Tensor:
        """Normalised image features (B, E) -> logits (B, C). ZooError as of `linear`."""
        weight, bias = self.linear()
        return F.linear(features.to(weight.dtype), weight, bias)

    def linear(self) -> Linear:
        """The logits as a linear function of the image features: weight (C, E) and bias (C,). ZooError if they are
        none: of a head that keeps its training images, or if text features depend on images, see `DCP.encode_text`."""
        before, probe = self.linear_before_probe(), self.text_probe
        return before if probe is None else probe.linear(before, self.classnames)

    def linear_before_probe(self) -> Linear:
        """`linear` without the text probe: the method's own logits, or the mean of both readings'."""
        own = self.own_linear()
        return join([own, self.frozen_linear()]) if self.reads_frozen else own

    def fuse(self) -> FusedHead:
        """A plain module, images (B, 3, H, W) -> the same logits (B, C), for the stored statistics and these classes;
        it shares its frozen weights with this model. ZooError as of `linear`."""
        return FusedHead(self)

    def walk(self, images: Tensor) -> Iterator[tuple[Step, Tensor, Tensor]]:
        """Each vision block, and the tokens (B, N + M, Dv) that enter and leave it, the prompts last."""
        x, prompts = self.vision_tower.embed(images), self.image_prompts()
        n = x.shape[1]
        for i in range(len(self.vision_tower.blocks)):
            x = append_prompts(x[:, :n], prompts[i]) if i < len(prompts) else x
            entering = x
            x = self.vision_tower.block(i, x)
            yield Step(i), entering, x

    @torch.inference_mode()
    def predict(self, images: Tensor, reject: float = False) -> list[str | None]:
        """The most probable class of each of images (B, 3, H, W), normalised as `create_transform` does; with `reject`,
        None for those that belong to none of the classes, see `rejection_threshold`. ZooError for anything else."""
        threshold, images = self.rejection_threshold(reject) if reject else None, self._batch(images)
        with in_eval_mode(self):  # no answer depends on the other images
            is_stored = self.stats == "stored"
            if is_stored or reject:
                features = self.encode_image(images)
            logits = self.classify(features) if is_stored else self(images)
            distances = self.distances(features) if reject else None
        rows = Answering(1, threshold)(logits.float().cpu().numpy(), self.classnames, distances)
        return [None if row.get("rejected") else row["predictions"][0]["class"] for row in rows]

    def rejection_threshold(self, reject: float = True) -> float:
        """Images with a lower `in_distribution_score` belong to none of the present classes; see
        `dcp_zoo.training.fit_probe`. `reject` is the share of images of these classes that may be refused; True for
        0.05. ZooError without a threshold for it, and for exactly these classes."""
        probe, problem = self.text_probe, self.cannot_reject
        if probe is None or problem:
            raise ZooError(problem)
        if reject in (True, REFUSED):
            return probe.threshold.item()
        thresholds = self.info.get("text_probe", {}).get("thresholds", {REFUSED: 0.0})
        if f"{reject:g}" not in thresholds:
            problem = f"This head has no threshold that refuses {reject:g} of the images of its classes"
            advice = "or fit others on more images with dcp-zoo fit-text-probe"
            raise ZooError(f"{problem}: choose from {', '.join(map(str, thresholds))}, {advice}.")
        return float(thresholds[f"{reject:g}"])

    def distances(self, features: Tensor) -> np.ndarray:
        """Features of `encode_image` (B, F) -> how far each image is from what the head has seen (B,), see
        `TextProbe.distance`; of a head that can reject."""
        assert self.text_probe is not None
        return self.text_probe.distance(features, self.classnames).detach().float().cpu().numpy()

    @property
    def cannot_reject(self) -> str:
        """Why images cannot be rejected among the present classes, and what to do; "" if they can."""
        if self.text_probe is None:
            return "This head cannot reject images: it has no text probe. Add one with dcp-zoo fit-text-probe."
        return self.text_probe.cannot_reject(self.classnames)

    def rely_on_texts(self, texts: Texts, before: Texts) -> None:
        """Unset the rejection threshold if the classes that it was fitted for have other texts now."""
        if self.text_probe is not None and not same_texts(self.text_probe.names, texts, before):
            self.text_probe.threshold = torch.full_like(self.text_probe.threshold, NEVER)

    def add_class(self, name: str, images: Tensor, known: int = 0) -> None:
        """Add a class from a few images, without training; the existing classes keep their scores, and the threshold to
        reject images stays as it is. ZooError without a text probe.

        Args:
            name: of the class; a name that the model already has gets new images.
            images: (n, 3, H, W), normalised as `create_transform` does.
            known: how many images the model has seen of the class, which count as much as new ones; 0 replaces them.
        """
        if (probe := self.text_probe) is None:
            problem = "This head cannot add a class by its images: it has no text probe."
            advice = "Add one with dcp-zoo fit-text-probe, or call model.set_classnames to classify by names"
            raise ZooError(f"{problem} {advice}.")
        with torch.no_grad():
            features = self.encode_image(self._batch(images))
        if not (exists := name in self.classnames):
            self.set_classnames([*self.classnames, name])
        mean, count = features.float().mean(0), known + len(features)
        if known:
            mean += (probe.means[probe.names.index(name)] - mean) * (known / count)
        with torch.no_grad():
            probe.add(name, mean, count, self.classnames, self.linear_before_probe())
        self.since_measured = f"the class {name} got other images" if exists else f"the class {name} was added"

    def remove_class(self, name: str) -> None:
        """Remove a class, whose images belong to none from now on; ZooError for the last one, or an unknown one."""
        check_choice("class", name, self.classnames)
        self.set_classnames([known for known in self.classnames if known != name])
        if self.text_probe is not None:
            self.text_probe.remove(name)
        self.since_measured = f"the class {name} was removed"

    def rename_class(self, name: str, new: str) -> None:
        """Change the name of a class and nothing else: CLIP goes on reading the old one, so that accuracy and threshold
        stay. ZooError for an unknown class, or a new name that is another's."""
        check_choice("class", name, self.classnames)
        if new in self.classnames:
            raise ZooError(f"The class {new} exists already: choose another name, or remove that class first.")

        def renamed(names: Sequence[str]) -> list[str]:
            return [new if known == name else known for known in names]

        self.keep_texts(name, check_classnames([new])[0])
        self.classnames, self.measured_classes = renamed(self.classnames), sorted(renamed(self.measured_classes))
        if self.text_probe is not None:
            self.text_probe.names = renamed(self.text_probe.names)

    def _batch(self, images: object) -> Tensor:
        """Images (n, 3, H, W) on the model's device; ZooError for anything else."""
        if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
            found = f"a tensor {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            problem = f"Expected images (n, 3, H, W), stacked from what create_transform returns, not {found}"
            raise ZooError(f"{problem}. For image files and PIL images: dcp_zoo.predict(model, images).")
        return images.to(self.device)

    def head_state(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint: `trained_state`, and those of the text probe for the present classes."""
        return self.trained_state() | ({} if self.text_probe is None else self.text_probe.tensors(self.classnames))

    def valid(self, info: dict[str, Any]) -> dict[str, Any]:
        """`info` without what no longer holds: accuracies of other classes, of which it says why, and thresholds."""
        if self.cannot_reject and "thresholds" in (fitted := info.get("text_probe", {})):
            measured = ("thresholds", "like_accepted", "others_accepted")
            kept = {name: value for name, value in fitted.items() if name not in measured}
            info = info | {"text_probe": kept}
        same = sorted(self.classnames) == self.measured_classes
        reason = self.since_measured or ("" if same else "the classes were changed")
        if not reason or not info.get("metrics") or info["metrics"] != self.info.get("metrics"):
            return info
        kept = {name: value for name, value in info.items() if name not in MEASURED}
        return kept | {"not_measured": f"{reason} after the accuracy was measured: dcp-zoo eval measures it again"}

    def head_config(self, info: dict[str, Any]) -> dict[str, Any]:
        """The `config.json`: outside the `dcp` block what timm reads, inside `info`. Nothing is stored twice."""
        omitted = (*ORIGIN, "architecture", "num_classes", "label_names", "first_conv", "classifier")
        options, block = self.method_config()
        return {
            "architecture": self.architecture,
            "num_classes": self.num_classes,
            "pretrained_cfg": {k: v for k, v in self.pretrained_cfg.items() if k not in omitted},
            "model_args": options,
            "label_names": self.classnames,
            "dcp": {
                "format_version": FORMAT_VERSION,
                "clip": self.clip_source,
                **info,
                **block,
                "versions": checkpoint.library_versions(),
            },
        }

    saved_dtype = torch.float32

    def save_pretrained(self, directory: str | Path, dtype: torch.dtype | None = None, **info: Any) -> Path:
        """Write the head, never CLIP itself, into a checkpoint folder, and return it; see `dcp_zoo.model.checkpoint`.
        ZooError if a trained tensor is not finite, or the directory is not writable or another process's.

        Args:
            directory: created if needed; a head that is there is replaced as a whole.
            dtype: of the tensors. Default: float16 for prompts, float32 for classifiers. Those of the text probe that
                logits depend on stay in float32.
            **info: values for the `dcp` block of config.json, such as dataset, shots, metrics. Default: `info`.
        """
        dtype = dtype or self.saved_dtype
        exact = {f"{PREFIX}{name}" for name in ("weight", "bias", "evidence", "text_scale", "threshold", "spread")}
        state = {name: t.to("cpu", torch.float32 if name in exact else dtype) for name, t in self.head_state().items()}
        return checkpoint.write(Path(directory), state, self.head_config(self.valid(info or self.info)))

    def check_fits(self, shapes: Mapping[str, Tensor], path: str | Path, probe: TextProbe | None = None) -> None:
        """Raise ZooError, naming the tensors, unless those of a file are exactly this head's and the text probe's."""
        options = ", ".join(f"{name}={value!r}" for name, value in self.method_config()[0].items())
        expected = self.expected_state(shapes) | ({} if probe is None else probe.tensors())
        model = f"{self.architecture} with {options}" if options else self.architecture
        checkpoint.check_shapes(shapes, expected, path, model)

    def expected_state(self, shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`trained_state` as a file with these tensors has it."""
        return self.trained_state()

    def load_trained(self, state: dict[str, Tensor], config: HeadConfig) -> None:
        """Load the tensors of a checkpoint, which have been checked; its `config.json` may say more."""
        self.load_state_dict(state, strict=False)  # without CLIP


def load_head(head: Head, directory: str | Path, config: HeadConfig | None = None) -> Head:
    """Load the trained tensors of a checkpoint directory into a head of the same architecture, strictly. `config` is
    its `config.json`, if it has been read. ZooError for a missing or damaged file, or tensors that do not fit."""
    config = config or read_config(directory)
    shapes = checkpoint.tensor_shapes(directory)  # nothing large is read before it is known to fit
    probe, head.text_probe = None, None
    if any(name.startswith(PREFIX) for name in shapes):
        two = head.has_own_features and shapes.get(f"{PREFIX}means", torch.empty(0)).shape[-1] == 2 * head.num_features
        probe = TextProbe(config["label_names"], head.num_features, 1 + two).to(head.device)
    head.check_fits(shapes, Path(directory) / WEIGHTS_NAME, probe)
    head.text_probe = probe
    head.load_trained(checkpoint.read_tensors(directory, config.get("weights_sha256")), config)
    return head
