"""What every head can do: classify, add and remove classes, reject images, be saved and fused."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcp_zoo.errors import ZooError, check_choice
from dcp_zoo.model import checkpoint
from dcp_zoo.model.classifier import PREFIX, TextProbe, in_distribution_score
from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.config import FORMAT_VERSION, REFUSED, HeadConfig
from dcp_zoo.model.fused import FusedDCP, fuse
from dcp_zoo.model.names import Texts, Tokenizer, check_classnames, same_texts
from dcp_zoo.model.timm_contract import TimmContract

MEASURED = ("metrics", "test_images", "balanced_top1")  # what `info` says of the test
ORIGIN = ("tag", "file", "hf_hub_id", "source", "license")  # of the head from which a model was loaded


class Head(TimmContract, FrozenCLIP):
    """A frozen CLIP, what a method learned for it, and class names. See `DCP` and `LinearHead`."""

    method: str  # its name
    n_ctx: int  # M, prompt tokens after those of the image
    stats: Any  # what logits depend on besides an image, see `DCP.stats`
    classnames: list[str]
    num_classes: int
    classifier: TextProbe | None  # the stage that adds what few-shot images say to the text logits
    since_measured: str  # what was changed that affects the metrics, such as "the class zebra was added"; "" if nothing

    # what each method has of its own
    encode_text: Callable[..., Tensor]  # normalised text features (C, E) of the class names
    image_prompts: Callable[[], list[Tensor]]  # that enter vision blocks from `first_block` on, each (M, Dv)
    set_classnames: Callable[..., None]  # classify into these classes from now on
    keep_texts: Callable[[str, str], None]  # (name, new): let CLIP read the same of a class when it is renamed
    trained_state: Callable[[], dict[str, Tensor]]  # the tensors that the method trained, by name
    # what `config.json` says about the method: options of the model, and values of its `dcp` block
    method_config: Callable[[], tuple[dict[str, Any], dict[str, Any]]]

    def __init__(self, clip: nn.Module, tokenizer: Tokenizer | None = None) -> None:
        super().__init__(clip, tokenizer)
        self.register_module("classifier", None)
        self.info = {}

    @property
    def info(self) -> dict[str, Any]:
        """How it was made: dataset, shots, seed, recipe, metrics, ..."""
        return self._info

    @info.setter
    def info(self, info: dict[str, Any]) -> None:
        self._info, self.since_measured = info, ""
        self.measured_classes = sorted(getattr(self, "classnames", ()))  # those that `metrics` are about

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Normalised features (B, E), (C, E) -> logits (B, C), after the classifier stage if there is one."""
        logits = super().logits(image_features, text_features)
        stage = self.classifier
        return logits if stage is None else stage(logits, image_features, self.classnames)

    def linear(self) -> tuple[Tensor, Tensor]:
        """The logits as a linear function of the image features: weight (C, E) and bias (C,). ZooError if the text
        features depend on the images, see `DCP.encode_text`."""
        text, stage = self.text_linear(), self.classifier
        return text if stage is None else stage.linear(text, self.classnames)

    def text_linear(self) -> tuple[Tensor, Tensor]:
        """`linear` without the classifier stage."""
        return self.scaled(self.encode_text())

    def fuse(self) -> FusedDCP:
        """A plain module, images (B, 3, H, W) -> the same logits (B, C), for the stored statistics and these classes;
        it shares its frozen weights with this model. Raises ZooError without stored statistics."""
        return fuse(self)

    @torch.inference_mode()
    def predict(self, images: Tensor, reject: float = False) -> list[str | None]:
        """The most probable class of each of images (B, 3, H, W), normalised as `create_transform` does; with `reject`,
        None for those that belong to none of the classes, see `rejection_threshold`. ZooError for something else than
        images."""
        threshold = self.rejection_threshold(reject) if reject else None
        logits = self(self._batch(images))
        names = [self.classnames[i] for i in logits.argmax(-1).tolist()]
        if threshold is None:
            return list(names)
        known = (in_distribution_score(logits) >= threshold).tolist()
        return [name if is_known else None for name, is_known in zip(names, known, strict=True)]

    def rejection_threshold(self, reject: float = True) -> float:
        """Images with a lower `in_distribution_score` belong to none of the present classes; see
        `dcp_zoo.training.stage`. `reject` is the share of images of these classes that may be refused; True for 0.05.
        ZooError without a threshold for it, and for exactly these classes."""
        stage, problem = self.classifier, self.cannot_reject
        if stage is None or problem:
            raise ZooError(problem)
        if reject in (True, REFUSED):
            return stage.threshold.item()
        thresholds = self.info.get("classifier", {}).get("thresholds", {REFUSED: 0.0})
        if f"{reject:g}" not in thresholds:
            raise ZooError(
                f"This head has no threshold that refuses {reject:g} of the images of its classes: choose from "
                f"{', '.join(map(str, thresholds))}, or fit others on more images with dcp-zoo fit-classifier."
            )
        return float(thresholds[f"{reject:g}"])

    @property
    def cannot_reject(self) -> str:
        """Why images cannot be rejected among the present classes, and what to do; "" if they can."""
        if self.classifier is None:
            return "This head cannot reject images: it has no classifier stage. Add one with dcp-zoo fit-classifier."
        return self.classifier.cannot_reject(self.classnames)

    def rely_on_texts(self, texts: Texts, before: Texts) -> None:
        """Unset the rejection threshold if the classes that it was fitted for have other texts now."""
        if self.classifier is not None and not same_texts(self.classifier.names, texts, before):
            self.classifier.unset_threshold()

    def add_class(self, name: str, images: Tensor, known: int = 0) -> None:
        """Add a class from a few images, without training; the existing classes keep their scores. The threshold to
        reject images, which held for the classes before, is lost. ZooError without a classifier stage.

        Args:
            name: of the class; a name that the model already has gets new images.
            images: (n, 3, H, W), normalised as `create_transform` does.
            known: how many images the model has seen of the class, which count as much as the new ones. By default the
                new ones replace them.
        """
        if (classifier := self.classifier) is None:
            raise ZooError(
                "This head cannot add a class by its images: it has no classifier stage. Add one with dcp-zoo "
                "fit-classifier, or call model.set_classnames to classify by names."
            )
        with torch.no_grad():
            features = self.encode_image(self._batch(images))
        if not (exists := name in self.classnames):
            self.set_classnames([*self.classnames, name])
        mean, count = features.float().mean(0), known + len(features)
        if known:
            mean += (classifier.means[classifier.names.index(name)] - mean) * (known / count)
        with torch.no_grad():
            classifier.add(name, mean, count, self.classnames, self.text_linear())
        self.since_measured = f"the class {name} got other images" if exists else f"the class {name} was added"

    def remove_class(self, name: str) -> None:
        """Remove a class, its scores and the rejection threshold; ZooError for the last or an unknown one."""
        check_choice("class", name, self.classnames)
        self.set_classnames([known for known in self.classnames if known != name])
        if self.classifier is not None:
            self.classifier.remove(name)
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
        if self.classifier is not None:
            self.classifier.names = renamed(self.classifier.names)

    def _batch(self, images: Any) -> Tensor:
        """Images (n, 3, H, W) on the model's device; ZooError for anything else."""
        if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
            found = f"a tensor {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise ZooError(
                f"Expected images (n, 3, H, W) with n at least 1, stacked from what create_transform returns, not "
                f"{found}. For image files and PIL images: dcp_zoo.predict(model, images)."
            )
        return images.to(self.device)

    def head_state(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint: `trained_state`, and those of the stage for the present classes."""
        return self.trained_state() | ({} if self.classifier is None else self.classifier.tensors(self.classnames))

    def valid(self, info: dict[str, Any]) -> dict[str, Any]:
        """`info` without what no longer holds: accuracies of other classes, of which it says why, and thresholds."""
        if self.cannot_reject and "thresholds" in (fitted := info.get("classifier", {})):
            kept = {name: value for name, value in fitted.items() if name not in ("thresholds", "others_accepted")}
            info = info | {"classifier": kept}
        same = sorted(self.classnames) == self.measured_classes
        reason = self.since_measured or ("" if same else "the classes were changed")
        if not reason or not info.get("metrics") or info["metrics"] != self.info.get("metrics"):
            return info
        kept = {name: value for name, value in info.items() if name not in MEASURED}
        return kept | {"not_measured": f"{reason} after the accuracy was measured: dcp-zoo eval measures it again"}

    def head_config(self, info: dict[str, Any]) -> dict[str, Any]:
        """The `config.json`: outside the `dcp` block what timm reads, inside `info`. Nothing is stored twice."""
        omitted = (*ORIGIN, "architecture", "num_classes", "label_names")
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

    def save_pretrained(self, directory: str | Path, dtype: torch.dtype = torch.float16, **info: Any) -> Path:
        """Write the head, never CLIP itself, into a checkpoint folder, and return it; see `dcp_zoo.model.checkpoint`.
        ZooError if a trained tensor is not finite, or the directory is not writable.

        Args:
            directory: created if needed; files with the same names are replaced, each atomically.
            dtype: of the tensors. Those of the classifier stage that logits depend on stay in float32.
            **info: values for the `dcp` block of config.json, such as dataset, shots, seed, recipe, metrics. Default:
                what the model was loaded with.
        """
        exact = {f"{PREFIX}{name}" for name in ("weight", "evidence", "text_scale", "threshold")}
        state = {name: t.to("cpu", torch.float32 if name in exact else dtype) for name, t in self.head_state().items()}
        return checkpoint.write(Path(directory), state, self.head_config(self.valid(info or self.info)))

    def check_fits(self, shapes: dict[str, Tensor], expected: dict[str, Tensor], path: str | Path) -> None:
        """Raise ZooError, naming the tensors, unless those of a file are as `expected` for this model."""
        options = ", ".join(f"{name}={value!r}" for name, value in self.method_config()[0].items())
        checkpoint.check_shapes(shapes, expected, path, self.architecture + f" with {options}" * bool(options))

    def empty_stage(self, shapes: dict[str, Tensor], config: HeadConfig) -> TextProbe | None:
        """A classifier stage to load the tensors of a checkpoint into, if it has one."""
        if not any(name.startswith(PREFIX) for name in shapes):
            return None
        return TextProbe(config["label_names"], self.num_features).to(self.device)
