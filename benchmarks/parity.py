"""Train DCP, MaPLe or IVLP with its authors' own trainer and with this package, on the same batches, and
compare all.

    git clone https://github.com/GingL/CMPA
    git clone https://github.com/KaiyangZhou/Dassl.pytorch
    git clone https://github.com/muzairkhattak/multimodal-prompt-learning
    git clone https://github.com/muzairkhattak/PromptSRC
    pip install yacs tabulate
    python benchmarks/parity.py dcp --authors CMPA --dassl Dassl.pytorch --data-root DATA --seed 1 --float64
    python benchmarks/parity.py maple --authors multimodal-prompt-learning --dassl Dassl.pytorch \\
        --data-root DATA --float64
    python benchmarks/parity.py ivlp --authors PromptSRC --dassl Dassl.pytorch --data-root DATA --float64

DATA holds Caltech-101 in CoOp's layout. Their code is copied to a temporary folder and changed there as
`CHANGES` says: for a machine without CUDA, for a current torch, and where a published line cannot run. The
miniature takes the place of CLIP. With `--float64` both sides compute in double precision, so that rounding
does not grow into other predictions. Every run adds its rows to `results/parity.csv`.
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from growing import GrowingTable
from timm.layers import LayerNormFp32
from torch import Tensor, nn

from dcp_zoo.backbone.inputs import Inputs, Pixels
from dcp_zoo.data import Item, load_split
from dcp_zoo.data.splits import few_shot
from dcp_zoo.features.extract import FeatureExtractor
from dcp_zoo.features.loader import ImageLoader
from dcp_zoo.features.photos import Photos
from dcp_zoo.heads.dcp import DCP
from dcp_zoo.heads.head import Head
from dcp_zoo.heads.kinds import PromptHead
from dcp_zoo.prediction.heads import outputs_of_loader
from dcp_zoo.training.loop import train
from dcp_zoo.training.methods.prompts import IndependentRecipe, MaPLeRecipe, independent_prompts, new_maple
from dcp_zoo.training.recipes import Recipe, TrainingRecipe
from dcp_zoo.training.task import Task
from dcp_zoo.zoo.build import plain_clip

sys.path.append(str(Path(__file__).parents[1] / "hub"))
from convert import load_trained, renamed

RESULTS = Path(__file__).parent / "results" / "parity.csv"
MODEL = "dcp_mini"
DATASET = "caltech101"
SHOTS = 1
CONTEXT = 24  # tokens of a text in place of 77, to save time: a causal tower does not see those after the end token
# the miniature's MLPs are twice as wide as its tokens, not 4 times
SHARED = {
    "clip/clip.py": [("context_length: int = 77", f"context_length: int = {CONTEXT}")],
    "clip/model.py": [("d_model * 4", "d_model * 2")],
}
UNROUNDED = [  # prompts in half precision
    *SHARED["clip/model.py"],
    (".permute(1, 0, 2).half()", ".permute(1, 0, 2)"),
    ("-1, -1).half()", "-1, -1)"),
]
# in each file of a checkout: what is replaced, and by what
DASSL_CHANGES = {
    "dassl/optim/lr_scheduler.py": [
        ("super().__init__(optimizer, last_epoch, verbose)", "super().__init__(optimizer, last_epoch)")
    ]
}
CHANGES = {
    "dcp": SHARED
    | {
        "train.py": [  # options that main.sh sets and the published configuration does not know
            (
                "    cfg.DATASET.SUBSAMPLE_CLASSES",
                "    cfg.TRAINER.CMPA.FUSING = 'mean'\n    cfg.DATASET.SUBSAMPLE_CLASSES",
            ),
            ("    cfg.DATASET.SUBSAMPLE_CLASSES", "    cfg.TRAINER.CMPA.PS = True\n    cfg.DATASET.SUBSAMPLE_CLASSES"),
        ],
        "trainers/cmpa.py": [("self.proj_visual.half()", "self.proj_visual"), ("n_ctx, 768", "n_ctx, 256")],
    },
    "maple": SHARED
    | {
        "trainers/maple.py": [
            ("self.proj.half()", "pass"),
            ("ctx_dim, 768", "ctx_dim, 256"),
            ("n_ctx, 512", "n_ctx, 192"),
        ],
        "clip/model.py": UNROUNDED,
    },
    "ivlp": SHARED | {"clip/model.py": UNROUNDED},
}
FLOAT64 = {"clip/model.py": [("x.type(torch.float32)", "x.type(torch.float64)")]}
CONFIGS = {
    "dcp": ("CMPA", "configs/trainers/CMPA/vit_b16_c2_ep20_batch4_16ctx.yaml", "TRAINER.CMPA.PREC"),
    "maple": ("MaPLe", "configs/trainers/MaPLe/vit_b16_c2_ep5_batch4_2ctx.yaml", "TRAINER.MAPLE.PREC"),
    "ivlp": ("IVLP", "configs/trainers/IVLP/vit_b16_c2_ep20_batch4_4+4ctx.yaml", "TRAINER.IVLP.PREC"),
}
MODULES = {"dcp": "trainers.cmpa", "maple": "trainers.maple", "ivlp": "trainers.independentVL"}
UNUSED = ("wilds", "gdown", "torch.utils.tensorboard")  # packages that Dassl imports and these runs do not need


@dataclass
class Recorded:
    """What one of the two trainers did: its state before and after training, the loss of every step, and its
    logits of the test images; of theirs also the batches, and their test images' pixels against ours."""

    before: dict[str, Tensor]
    after: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    batches: list[tuple[Inputs, Tensor]] = field(default_factory=list)
    pixels: float = 0.0


def compute_in_float64() -> None:
    """Let everything in this process that asks for float32 get float64: their code and ours alike."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    nn.Module.float = nn.Module.double  # type: ignore[method-assign]
    LayerNormFp32.forward = nn.LayerNorm.forward  # type: ignore[method-assign]


def copied(checkout: Path, folder: Path, changes: dict[str, list[tuple[str, str]]]) -> None:
    """Copy a checkout and change the copy; an error if a line that is to be changed is not there."""
    shutil.copytree(checkout, folder, ignore=shutil.ignore_patterns(".git", "*.pyc"))
    for name, replaced in changes.items():
        source = (folder / name).read_text()
        for old, new in replaced:
            if old not in source:
                raise SystemExit(f"{checkout / name} has no {old!r}: it is not the code that this script was made for.")
            source = source.replace(old, new)
        (folder / name).write_text(source)


def miniature_for(build_model: Callable[..., nn.Module], clip: nn.Module, design: dict[str, Any]) -> nn.Module:
    """Their CLIP with the miniature's weights, and its patch embedding in the place of theirs."""
    weights = {name: t for name, t in clip.state_dict().items() if not name.startswith("visual.conv1")}
    weights["visual.conv1.weight"] = torch.zeros(len(weights["visual.class_embedding"]), 3, 32, 32)
    weights["positional_embedding"] = weights["positional_embedding"][:CONTEXT]
    built: Any = build_model(weights, design)
    stem: Any = deepcopy(clip.visual.conv1)
    stem.weight = torch.zeros(())  # its type is read as the type of all computation
    if hasattr(built, "conv1_visual"):
        built.conv1_visual = stem
    else:
        built.visual.conv1 = stem
    return built


def design_of(method: str) -> dict[str, Any]:
    """What their `load_clip_to_cpu` hands to `build_model`, for the published configuration."""
    common = {"vision_depth": 0, "language_depth": 0, "vision_ctx": 0, "language_ctx": 0}
    if method == "dcp":
        return common | {"trainer": "CMPA", "cmpa_length": 16, "fusing": "mean", "parameter_sharing": True}
    if method == "ivlp":
        return {"trainer": "IVLP", "vision_depth": 9, "language_depth": 9, "vision_ctx": 4, "language_ctx": 4}
    return common | {"trainer": "MaPLe", "maple_length": 2}


def build_theirs(method: str, seed: int, folder: Path, data: Path, clip: nn.Module) -> Any:
    """Their trainer, built by their code from their configuration: with the miniature, its image size, and
    float32."""
    sys.path[:0] = [str(folder / "authors"), str(folder / "dassl")]
    for name in UNUSED:
        sys.modules[name] = MagicMock(spec=ModuleType(name))
    sys.modules["wilds"].get_dataset = sys.modules["torch.utils.tensorboard"].SummaryWriter = MagicMock()
    import train as their_script
    from clip.model import build_model
    from dassl.engine import build_trainer
    from dassl.utils import set_random_seed

    trainer, config, precision = CONFIGS[method]
    module: Any = sys.modules[MODULES[method]]
    module.load_clip_to_cpu = lambda cfg: miniature_for(build_model, clip, design_of(method))
    cfg = clip_config()
    options = ["INPUT.SIZE", (cfg["size"], cfg["size"]), "INPUT.PIXEL_MEAN", cfg["mean"], "INPUT.PIXEL_STD", cfg["std"]]
    options += [precision, "fp32", "DATASET.NUM_SHOTS", SHOTS, "DATALOADER.NUM_WORKERS", 0, "USE_CUDA", False]
    args = argparse.Namespace(
        root=str(data), output_dir=str(folder / "output"), resume="", seed=seed, trainer=trainer, backbone="", head="",
        source_domains=None, target_domains=None, transforms=None, opts=options,
        dataset_config_file=str(folder / "authors/configs/datasets/caltech101.yaml"),
        config_file=str(folder / "authors" / config),
    )  # fmt: skip
    their_cfg = their_script.setup_cfg(args)
    set_random_seed(seed)
    return build_trainer(their_cfg)


def clip_config() -> dict[str, Any]:
    """The miniature's image size, and the mean and standard deviation of its pixels."""
    cfg = plain_clip(MODEL).pretrained_cfg
    return {"size": cfg["input_size"][-1], "mean": list(cfg["mean"]), "std": list(cfg["std"])}


def run_theirs(trainer: Any, ours: Iterator[tuple[Inputs, Tensor]]) -> Recorded:
    """Train and test with their trainer, and record what it does; `ours` are our test images in batches of
    theirs."""
    found = Recorded(copy_of(trainer.model))
    step = trainer.forward_backward
    read = trainer.parse_batch_test
    process = trainer.evaluator.process

    def forward_backward(batch: Any) -> Any:
        summary = step(batch)
        found.batches.append((Pixels(batch["img"]), batch["label"]))
        found.losses.append(summary["loss"])
        return summary

    def parse_batch_test(batch: Any) -> Any:
        images, labels = next(ours)
        assert torch.equal(labels, batch["label"])
        found.pixels = max(found.pixels, float((images.x - batch["img"]).abs().max()))
        return read(batch)

    def keep(logits: Tensor, labels: Tensor) -> None:
        found.logits.append(logits)
        process(logits, labels)

    trainer.forward_backward = forward_backward
    trainer.parse_batch_test = parse_batch_test
    trainer.evaluator.process = keep
    trainer.train()
    found.after = copy_of(trainer.model)
    return found


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


@dataclass
class TheirBatches(ImageLoader):
    """Their batches in their order, as training images for our loop."""

    epochs: Iterator[list[tuple[Inputs, Tensor]]] = field(default_factory=lambda: iter(()))

    def shuffled(self, *args: Any, **options: Any) -> Any:
        return next(self.epochs)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def maple_names(state: dict[str, Tensor], head: nn.Module) -> dict[str, Tensor]:
    """Their MaPLe's parameters under our names: the first block's are theirs of another name, and of the
    others only those of blocks that the miniature has."""
    blocks = len(head.text_prompts)
    ours = {"text_prompts.0": state["prompt_learner.ctx"]}
    ours |= {f"text_prompts.{i}": state[f"prompt_learner.compound_prompts_text.{i - 1}"] for i in range(1, blocks)}
    for part in ("weight", "bias"):
        ours[f"couplings.0.{part}"] = state[f"prompt_learner.proj.{part}"]
        for i in range(1, blocks):
            ours[f"couplings.{i}.{part}"] = state[f"prompt_learner.compound_prompt_projections.{i - 1}.{part}"]
    return ours


def ivlp_names(state: dict[str, Tensor], head: nn.Module) -> dict[str, Tensor]:
    """Their IVLP's parameters under our names: those of the first block have names of their own."""
    ours = {"text_prompts.0": state["prompt_learner.ctx"], "vision_prompts.0": state["image_encoder.VPT"]}
    for i in range(1, len(head.text_prompts)):
        ours[f"text_prompts.{i}"] = state[f"text_encoder.transformer.resblocks.{i}.VPT_shallow"]
        ours[f"vision_prompts.{i}"] = state[f"image_encoder.transformer.resblocks.{i}.VPT_shallow"]
    return ours


NAMES_OF_PROMPTS = {"maple": maple_names, "ivlp": ivlp_names}


def build_ours(method: str, names: list[str], state: dict[str, Tensor]) -> tuple[Head, TrainingRecipe]:
    """Our head with their parameters from before the first step, and our recipe."""
    clip = plain_clip(MODEL)
    if method in NAMES_OF_PROMPTS:
        recipe: Any = MaPLeRecipe(epochs=5) if method == "maple" else IndependentRecipe()
        new_head = new_maple if method == "maple" else independent_prompts
        head: Any = new_head(Task(clip, MODEL, names, "a photo of a {}.", None, None, recipe))
        head.load_state_dict(NAMES_OF_PROMPTS[method](state, head), strict=False)
    else:
        recipe = Recipe(coupling="text_to_vision")
        head = DCP(clip, names, recipe.config)
        load_trained(head, renamed(state, "theirs"), "theirs")
        head.stats = "batch"
    return head, recipe


def same_tokens(theirs: Tensor, head: Head, names: list[str]) -> bool:
    """Whether what follows the prompts are the same tokens for every class."""
    prompts = head.text_prompts[0] if isinstance(head, PromptHead) else head.prompts["text"]
    before = head.rest + " " if isinstance(head, PromptHead) else ""
    n_ctx = len(prompts)
    ours = head.encoder.tokenize([f"{before}{name.replace('_', ' ')}." for name in names])
    return torch.equal(ours[:, 1 : CONTEXT - n_ctx].cpu(), theirs[:, 1 + n_ctx :])


def as_ours(method: str, state: dict[str, Tensor], head: Head) -> dict[str, Tensor]:
    """Their trained parameters under our names."""
    if method in NAMES_OF_PROMPTS:
        return NAMES_OF_PROMPTS[method](state, head)
    copy: Any = deepcopy(head)
    load_trained(copy, renamed(state, "theirs"), "theirs")
    return trained(copy)


def run_ours(head: Head, recipe: TrainingRecipe, theirs: Recorded, items: list[Item], tests: ImageLoader) -> Recorded:
    """Our loop on their batches, then our test on our own reading of the test images."""
    size = len(theirs.batches) // recipe.num_epochs
    epochs = [theirs.batches[i : i + size] for i in range(0, len(theirs.batches), size)]
    source = TheirBatches(Photos(items), tests.extract, "crop-flip", epochs=iter(epochs))  # which has no features
    found = Recorded(trained(head))
    task = Task(head.encoder, MODEL, head.classnames, head.texts, source, None, recipe)
    found.losses = train(task, head)
    found.after = trained(head)
    found.logits = [torch.from_numpy(outputs_of_loader(head, tests, 16).logits)]
    return found


def compare(theirs: Recorded, ours: Recorded, after: dict[str, Tensor], labels: Tensor) -> dict[str, Any]:
    """`after`: their trained parameters under our names. Parameters are apart by the largest difference, in
    parts of the largest change from the start."""
    losses = (torch.tensor(theirs.losses) - torch.tensor(ours.losses)).abs()
    own = torch.cat(ours.logits)
    other = torch.cat(theirs.logits).cpu()
    predicted = own.argmax(-1), other.argmax(-1)
    assert ours.after.keys() == after.keys() == ours.before.keys()
    apart, moved = (
        max(float((state[name] - t).abs().max()) for name, t in after.items()) for state in (ours.after, ours.before)
    )
    return {
        "test pixels apart by": theirs.pixels,
        "steps": len(losses),
        "all losses apart by": float(losses.max()),
        "parameters at the end apart by": apart / moved,
        "test logits apart by": float((own - other).abs().max()),
        "their top-1": round(100 * float((predicted[1] == labels).float().mean()), 2),
        "our top-1": round(100 * float((predicted[0] == labels).float().mean()), 2),
        "test images": len(own),
        "equal predictions": int((predicted[0] == predicted[1]).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=tuple(CONFIGS))
    parser.add_argument("--authors", type=Path, required=True, help="checkout of the authors' code")
    parser.add_argument("--dassl", type=Path, required=True, help="checkout of Dassl.pytorch")
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--float64", action="store_true", help="compute in float64 in place of float32")
    args = parser.parse_args()
    changes = CHANGES[args.method]
    if args.float64:
        compute_in_float64()
        changes = {name: changes.get(name, []) + FLOAT64.get(name, []) for name in changes.keys() | FLOAT64.keys()}
    split = few_shot(load_split(DATASET, args.data_root), SHOTS, args.seed)
    clip = plain_clip(MODEL)
    tests = ImageLoader(Photos(split.test), FeatureExtractor(clip))
    with TemporaryDirectory() as name:
        folder = Path(name)
        copied(args.authors, folder / "authors", changes)
        copied(args.dassl, folder / "dassl", DASSL_CHANGES)
        data = folder / "data/caltech-101"  # their code writes into it
        data.mkdir(parents=True)
        for file in (args.data_root / "caltech-101").iterdir():
            (data / file.name).symlink_to(file.resolve())
        trainer = build_theirs(args.method, args.seed, folder, data.parent, clip.clip)
        theirs = run_theirs(trainer, iter(tests.in_order(trainer.test_loader.batch_size)))
    head, recipe = build_ours(args.method, split.classnames, theirs.before)
    images = data / "101_ObjectCategories"
    row = dict[str, Any]()
    for which, items, part in (("training", split.train, "train_x"), ("test", split.test, "test")):
        keys = [str(Path(item.impath).relative_to(images)) for item in getattr(trainer.dm.dataset, part)]
        row[f"same {which} images in order"] = keys == [item.key for item in items]
    row["same tokens of class names"] = same_tokens(trainer.model.tokenized_prompts, head, split.classnames)
    ours = run_ours(head, recipe, theirs, split.train, tests)
    row |= compare(theirs, ours, as_ours(args.method, theirs.after, head), tests.labels)
    precision = "float64" if args.float64 else "float32"
    table = GrowingTable(RESULTS, ("method", "seed", "precision", "what", "value"), ())
    table.add((args.method, args.seed, precision, what, shown(value)) for what, value in row.items())


def shown(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) and value < 1 else str(value)


if __name__ == "__main__":
    main()
