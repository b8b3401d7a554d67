"""From a name to a model, CLIP alone included, and its image transform."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import open_clip
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import build_model_with_cfg, load_checkpoint
from torch import nn

from dcp_zoo.backbone import MINI_WEIGHTS
from dcp_zoo.backbone._torch import skip_init
from dcp_zoo.backbone.classes import TEMPLATE, Descriptions
from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.backbone.mini import build_mini_clip
from dcp_zoo.data import classnames as dataset_classnames
from dcp_zoo.data.images import crop, normalise
from dcp_zoo.errors import UNREADABLE, ZooError, as_zoo_error, check_choice, import_extra, shorten, warn
from dcp_zoo.fields import Values
from dcp_zoo.heads.checkpoint import load_head, tensor_shapes, without_probe
from dcp_zoo.heads.config import Abilities, DCPConfig, is_checkpoint
from dcp_zoo.heads.dcp import DCP
from dcp_zoo.heads.fused import FusedHead
from dcp_zoo.heads.head import Head
from dcp_zoo.heads.linear import CacheHead, LinearHead
from dcp_zoo.heads.prompts import PromptHead
from dcp_zoo.heads.timm_contract import DROP_RATES, POOL, check_only, sizes, take_blocks
from dcp_zoo.hub import fetch_clip
from dcp_zoo.zoo.encoders import load_encoders
from dcp_zoo.zoo.registry import OPEN_CLIP, ModelSpec, described
from dcp_zoo.zoo.resolve import Source, get_pretrained_cfg, resolve

# by the field `head` of a checkpoint's `dcp` block
KINDS: Values = {"linear": LinearHead, "prompts": PromptHead, "cache": CacheHead, "dcp": DCP}


def create_model(
    name: str,
    pretrained: bool | str = False,
    *,
    classnames: Sequence[str] | None = None,
    descriptions: Descriptions | None = None,
    clip_pretrained: str | None = None,
    stats: str | None = None,
    classifier: str | None = None,
    tokenizer: Callable[..., torch.Tensor] | None = None,
    cache_dir: str | Path | None = None,
    num_classes: int | None = None,
    checkpoint_path: str | Path = "",
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Create a model of the zoo.

    Args:
        name: a model ("dcp_vitb16", or "small", "medium", "large": the best for their cost), a head
            ("dcp_vitb16.imagenet-16shot"), a checkpoint folder, or "local-dir:path" if it has the name of a model,
            "hf-hub:org/repo[@revision]". Any other CLIP: "open_clip:ARCH/TAG" as in
            `open_clip.list_pretrained()`, or "open_clip:hf-hub:org/repo".
        pretrained: False for random weights (nothing is downloaded, as in timm), "clip" for CLIP's weights and fresh
            prompts, a tag such as "imagenet-16shot" of a model of the zoo for CLIP's weights and that head, True for
            the head in `name` or the model's default one. Random weights and fresh prompts are drawn from torch's
            random state, as those of any torch module.
        classnames: the classes to classify into. Default: the classes of the head, or of the model's default head.
        descriptions: sentences of each class, in place of its name. Default: the head's, if it has some.
        clip_pretrained: another open_clip tag for CLIP's weights. The model is then called "open_clip:ARCH/TAG".
        stats: see `DCP.stats`.
        classifier: "none" leaves out the text probe of a head, as in the papers. Default: with it, if it has one.
        tokenizer: of CLIP's text tower. Default: the one open_clip names for it, which may be downloaded.
        cache_dir: where downloads are kept. Default: the Hub client's cache.
        num_classes, checkpoint_path, features_only, out_indices, device, dtype, pretrained_cfg_overlay: as of
            `timm.create_model`. For another number of classes than the head has, see `Head.reset_classifier`; with 0
            logits are features. A checkpoint may also be a folder of the zoo.
        **options: of `DCPConfig`: n_ctx, depth, pooling, share_cmpa, coupling, ctx_init. A head has its own values.
            timm's in_chans, img_size, global_pool and drop rates, with the only values that a CLIP can have.

    Returns:
        A `DCP` in training mode, as torch modules are: call `.eval()` to classify. Of another method, another `Head`;
        with `features_only` timm's extractor, images (B, 3, H, W) -> a list of maps (B, Dv, h, w), by block.

    Raises:
        ZooError: unknown names, a head that has not been trained yet, a checkpoint or options that do not fit.
    """
    if classifier is not None:
        check_choice("classifier", classifier, ("none",))
    if out_indices is not None and not features_only:
        raise ZooError(f"out_indices={out_indices!r} selects feature maps: pass features_only=True as well.")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ZooError(f"dtype={dtype!r}: weights need a floating-point torch.dtype, such as torch.float16.")
    if checkpoint_path and is_checkpoint(checkpoint_path):
        name, pretrained, checkpoint_path = f"local-dir:{checkpoint_path}", True, ""
    if clip_pretrained:
        name = _with_weights(resolve(name, pretrained, cache_dir), clip_pretrained)
    source = resolve(name, pretrained, cache_dir)
    config = _dcp_config(source, _without_fixed(source.spec, options))
    clip = load_clip(source.spec, bool(pretrained), tokenizer, cache_dir)
    if source.config and pretrained not in (False, "clip"):
        model = trained_head(clip, source)
        if classnames is not None or descriptions:
            model.set_classnames(model.classnames if classnames is None else classnames, descriptions)
    else:
        model = _fresh(clip, source, config, classnames, descriptions)
        if source.folder and not pretrained:
            text = f"Only the architecture is taken from {source.folder}: pass pretrained=True to load its weights."
            warn(text)
    origin = source.head.pretrained_cfg if source.head and pretrained not in (False, "clip") else {}
    for reading in model.readings:  # whose preprocessing images get
        reading.encoder.pretrained_cfg |= pretrained_cfg_overlay or {}
    told_timm(model, origin)
    model.stats = stats
    if num_classes and num_classes != model.num_classes:
        model.reset_classifier(num_classes, classnames=classnames)
    if checkpoint_path:
        _load_state(model, Path(checkpoint_path))
    if classifier == "none" and model.text_probe is not None:  # also that of the checkpoint
        model.text_probe, model.info = None, without_probe(model.info)
    if num_classes == 0:
        model.reset_classifier(0)
    model.to(device=device, dtype=dtype)
    return _feature_net(model, 3 if out_indices is None else out_indices) if features_only else model


def _with_weights(source: Source, tag: str) -> str:
    """The name of a model with other weights; ZooError if it has none of this tag, or is a head, which has its own."""
    spec = source.spec
    tags = [] if source.config else [known for arch, known in open_clip.list_pretrained() if arch == spec.clip]
    tags = tags or [spec.clip_pretrained]
    if tag not in tags:
        raise ZooError(f"{spec.name} has no CLIP weights {tag!r}: choose from {', '.join(tags)}.")
    return spec.name if tag == spec.clip_pretrained else f"{OPEN_CLIP}{spec.clip}/{tag}"


def _without_fixed(spec: ModelSpec, options: Values) -> Values:
    """Options without those of timm that a CLIP fixes; ZooError for other values of these."""
    square = f"{spec.name} reads square images of one size", sizes(spec.image_size)
    fixed = {"in_chans": ("CLIP reads RGB images", (3,)), "img_size": square, "global_pool": POOL}
    fixed |= dict.fromkeys(DROP_RATES, ("a DCP has no dropout", (0,)))
    for argument in options.keys() & fixed.keys():
        check_only(argument, options[argument], *fixed[argument])
    return {argument: value for argument, value in options.items() if argument not in fixed}


def _load_state(model: Head, path: Path) -> None:
    """Load a state of the whole model from a file of timm's or torch's; ZooError for no such file, or another one."""
    if not path.is_file():
        raise ZooError(f"There is no file or checkpoint folder {path}: pass the path of one.")
    name = model.encoder.architecture
    wrong = f"{path} does not have the tensors of this {name}: {{}} Pass a file that was saved with its options."
    with as_zoo_error(wrong, RuntimeError, UnpicklingError, *UNREADABLE):
        try:
            load_checkpoint(model, str(path), weights_only=True)
        except RuntimeError as error:  # torch names all keys
            lines = [shorten(line.strip().split('", "'), 4) for line in str(error).splitlines()]
            raise RuntimeError(shorten(lines, 4)) from error


def _feature_net(model: Any, out_indices: int | Sequence[int]) -> nn.Module:
    """timm's feature extractor around a model."""
    return build_model_with_cfg(
        lambda **_: model,  # already built and loaded
        model.encoder.architecture,
        pretrained=False,
        pretrained_cfg=model.pretrained_cfg,
        feature_cfg={
            "out_indices": take_blocks(out_indices, len(model.encoder.vision_tower.blocks)),
            "feature_cls": "getter",
        },
        features_only=True,
    )


def told_timm(head: Head, origin: Mapping[str, Any] = {}) -> None:
    """Let a head say what timm reads of a model: its encoder's preprocessing, its classes and its origin."""
    own = {"num_classes": head.num_classes, "label_names": head.classnames}
    own |= {"classifier": "text_probe" if head.fc is None else "fc"}
    head.pretrained_cfg = head.default_cfg = {**origin, **head.encoder.pretrained_cfg, **own}


def _dcp_config(source: Source, options: Values) -> DCPConfig | None:
    """The options of a DCP, None for the head of another method; ZooError if some contradict the checkpoint."""
    options = {name: value for name, value in options.items() if value is not None}
    if source.folder is None or source.config is None:
        return DCPConfig.from_options(source.spec.dcp_options | options)
    block = source.config["dcp"]
    if block["head"] != "dcp":
        if options:
            raise ZooError(f"A head of {block['method']} has no options: omit {', '.join(options)}.")
        return None
    trained = DCPConfig.from_options(source.config["model_args"])
    values = trained.as_dict()
    DCPConfig.from_options(values | options)  # raises for unknown ones
    if differ := [f"{k}={values[k]!r}, not {v!r}" for k, v in options.items() if values[k] != v]:
        raise ZooError(f"The head {source.folder.name} was trained with {'; '.join(differ)}. Omit these options.")
    return trained


def _fresh(
    clip: FrozenCLIP,
    source: Source,
    config: DCPConfig | None,
    classnames: Sequence[str] | None,
    descriptions: Descriptions | None,
) -> DCP:
    """A DCP with fresh prompts, for these classes, those of its checkpoint, or of the dataset in its name."""
    if config is None:
        assert source.config is not None
        made = f"{source.folder} is a head of {source.config['dcp']['method']}, which has no fresh prompts"
        raise ZooError(f"{made}: pass pretrained=True for its weights.")
    own = source.config["label_names"] if source.config else None
    names = classnames or own or dataset_classnames(source.head.dataset if source.head else "imagenet")
    with warnings.catch_warnings():
        if classnames is None:  # ImageNet's list has two pairs of classes with the same name
            warnings.filterwarnings("ignore", message="Repeated class names")
        return DCP(clip, names, config, texts=descriptions or TEMPLATE)


def trained_head(clip: FrozenCLIP, source: Source) -> Head:
    """The head of a checkpoint on this CLIP, with its weights."""
    assert source.folder is not None
    assert source.config is not None
    block = source.config["dcp"]
    with skip_init(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Repeated class names")
        head: Head = KINDS[block["head"]].from_config(clip, source.config, tensor_shapes(source.folder))
    head.method, head.abilities = block["method"], Abilities(**cast(Values, block["abilities"]))
    stored = block.get("encoders", [])
    head.image_encoders.extend(load_encoders([said["name"] for said in stored], clip, stored))
    return load_head(head, source.folder, source.config)


def plain_clip(model: str, *, with_weights: bool = True) -> FrozenCLIP:
    """The CLIP of a model of the zoo such as "dcp_vitb16", with its weights, or random ones, which need no download; on
    the CPU."""
    return load_clip(resolve(model, "clip").spec, with_weights)


def load_clip(
    spec: ModelSpec,
    with_weights: bool,
    tokenizer: Callable[..., torch.Tensor] | None = None,
    cache_dir: str | Path | None = None,
) -> FrozenCLIP:
    """The CLIP of a model's row with its weights, or random ones; see `create_model`."""
    tokenizer = tokenizer or build_tokenizer(spec, cache_dir)
    built = build_clip(spec, with_weights, cache_dir)
    clip = FrozenCLIP(built, tokenizer, _timm_cfg(built, spec), spec.name, spec.clip_pretrained)
    return clip.remember_weights() if with_weights else clip


def _timm_cfg(clip: nn.Module, spec: ModelSpec) -> Values:
    """What timm reads of a model: its preprocessing, and the names of its first convolution and of the module that
    belongs to the classes: the text probe, which may be None, until `reset_classifier` makes a linear layer."""
    visual = clip.get_submodule("visual").named_modules(prefix="encoder.clip.visual")
    first_conv = next((name for name, module in visual if isinstance(module, nn.Conv2d)), None)
    own = {"architecture": spec.name, "first_conv": first_conv, "classifier": "text_probe"}
    return spec.data_cfg | own


def build_clip(spec: ModelSpec, with_weights: bool, cache_dir: str | Path | None = None) -> nn.Module:
    """CLIP itself, in float32, with QuickGELU for weights trained with it (such as OpenAI's)."""
    if spec.clip is None:
        return build_mini_clip(MINI_WEIGHTS if with_weights else None)
    source, config = described(spec.clip, spec.clip_pretrained, cache_dir)
    file = _weights_file(spec, source, cache_dir) if with_weights else ""
    repo = source.get("hf_hub", "").rpartition("/")[0]
    failed = (
        f"open_clip cannot load the {spec.clip_pretrained} weights of {spec.clip}: {{}}. If they are damaged, "
        f"{f'hf cache rm model/{repo}' if repo else 'replace them'}, and try again. Other weights are other models: "
        "open_clip:ARCH/TAG."
    )
    other = f"{spec.clip} is not a CLIP of images and texts that dcp_zoo can build: {{}}. Choose another."
    with as_zoo_error(failed, RuntimeError, SafetensorError, FileNotFoundError):
        with as_zoo_error(other, TypeError, ValueError), skip_init(with_weights):
            clip = build_open_clip(config, quick_gelu=bool(source.get("quick_gelu", config.get("quick_gelu", False))))
        if with_weights:
            load_weights(clip, file)
    return clip.eval()


def _weights_file(spec: ModelSpec, source: Values, cache_dir: str | Path | None) -> str | Path:
    """The file with CLIP's weights, downloaded if needed, from the row's pinned revision if it has one; `source` is
    open_clip's description of it. ZooError if open_clip has moved the weights to another repo."""
    if not (place := source.get("hf_hub")):
        return open_clip.download_pretrained(source, cache_dir=cache_dir and str(cache_dir))
    repo = place.rpartition("/")[0]
    advice = f"Upgrade dcp_zoo, or take the weights as they are now: {OPEN_CLIP}{spec.clip}/{spec.clip_pretrained}."
    if spec.clip_revision and repo != spec.clip_repo:
        moved = (
            f"open_clip {version('open_clip_torch')} has the {spec.clip_pretrained} weights of {spec.clip} in {repo}"
        )
        raise ZooError(f"{moved}, and {spec.name} has them from {spec.clip_repo}. {advice}")
    return fetch_clip(place, cache_dir, spec.clip_revision, advice)


def build_open_clip(config: Values, quick_gelu: bool) -> nn.Module:
    """The CLIP of one of open_clip's model configs, with random weights: what `open_clip.create_model` chooses."""
    custom = config.get("custom_text", False) or "hf_model_name" in config["text_cfg"]
    if "hf_model_name" in config["text_cfg"]:  # its weights come with CLIP's
        config = config | {"text_cfg": config["text_cfg"] | {"hf_model_pretrained": False}}
    kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP if custom else open_clip.CLIP
    sizes = {name: value for name, value in config.items() if name not in ("custom_text", "quick_gelu")}
    return kind(**sizes, quick_gelu=quick_gelu)


def load_weights(clip: nn.Module, path: str | Path) -> None:
    """Load CLIP's weights strictly. A safetensors file with exactly its tensors stays memory-mapped until used;
    open_clip's loader converts every other format it supports."""
    if Path(path).suffix == ".safetensors":
        state = load_file(path)
        if {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in clip.state_dict().items()}:
            clip.load_state_dict({n: t.float() for n, t in state.items()}, assign=True)
            return
    open_clip.load_checkpoint(clip, str(path))


def build_tokenizer(spec: ModelSpec, cache_dir: str | Path | None = None) -> Callable[..., torch.Tensor] | None:
    """The tokenizer of a model's text tower; None means open_clip's default."""
    if spec.clip is None:
        return None
    try:
        return open_clip.get_tokenizer(spec.clip, cache_dir=cache_dir and str(cache_dir))
    except Exception as error:  # of `transformers`, which reports a missing file in many ways
        text_cfg = described(spec.clip, spec.clip_pretrained, cache_dir)[1].get("text_cfg", {})
        wanted = text_cfg.get("hf_tokenizer_name", spec.clip)
        import_extra("transformers", "tokenizers")
        problem = f"The tokenizer of {spec.clip} cannot be loaded from the Hub repo {wanted!r}: {error}."
        advice = "Check the connection, or pass your own: create_model(..., tokenizer=...)."
        raise ZooError(f"{problem} {advice}") from error


@dataclass(frozen=True)
class TestTransform:
    """PIL image, in RGB -> normalised tensor (3, H, W), by timm's config."""

    __test__ = False  # not one of pytest's
    cfg: Values

    def __call__(self, image: Any) -> torch.Tensor:
        return torch.from_numpy(normalise(crop(image, self.cfg), self.cfg))


def create_transform(
    model_or_name: FrozenCLIP | Head | FusedHead | str,
    is_training: bool = False,
    input_size: int | Sequence[int] | None = None,
) -> Callable[[Any], torch.Tensor]:
    """PIL image -> normalised tensor (3, H, W). ZooError for another `input_size` than the model's.

    Testing: the CLIP's own, timm's bit for bit: resize of the short side and centre crop or, for some, of both sides.
    Training: random resized crop (8 to 100 % of the area) and horizontal flip, as in the DCP release, with torch's
    random numbers. It also takes uint8 tensors (3, h, w): faster than PIL, and within 2 of 255 levels.
    """
    cfg = get_pretrained_cfg(model_or_name) if isinstance(model_or_name, str) else model_or_name.pretrained_cfg
    size = cfg["input_size"][-1]
    check_only("input_size", input_size, "the model reads square images of one size", sizes(size))
    if not is_training:
        return TestTransform(cfg)
    from torchvision.transforms import v2

    resample = v2.InterpolationMode(cfg["interpolation"])
    return v2.Compose(
        [
            v2.PILToTensor(),  # leaves tensors alone
            v2.RandomResizedCrop(cfg["input_size"][1:], scale=(0.08, 1.0), interpolation=resample, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(cfg["mean"], cfg["std"], inplace=True),  # on the new float tensor
        ]
    )
