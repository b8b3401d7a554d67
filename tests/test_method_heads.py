"""Every method as a head: the same logits after saving and loading, fused, and through timm's functions; and
methods of other packages, as the example of docs/baselines.md."""

import copy
import importlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from equations import NAMES, pixels
from helpers import FEW_STEPS, StoppedState, close, copied
from markdown_it import MarkdownIt
from safetensors.torch import load_file
from test_baselines import loader, logits_of, task

import dcp_zoo
from dcp_zoo.data import Split
from dcp_zoo.errors import ZooError
from dcp_zoo.heads.config import COUPLINGS, WEIGHTS_NAME
from dcp_zoo.prediction.onnx import OnnxClassifier
from dcp_zoo.release.onnx import export
from dcp_zoo.training.folder import STATE_NAME
from dcp_zoo.training.methods import METHODS, fit_head, table
from dcp_zoo.training.methods.text_probe import fit_probe
from dcp_zoo.training.run import plan
from dcp_zoo.training.state import TrainingState
from dcp_zoo.zoo.build import trained_head

pytestmark = FEW_STEPS

UNFUSED = ["tip-adapter", "tip-adapter-f", "proker", "cocoop"]
FAST = {"epochs": 2, "steps": 2}


def small(method, clip, photos, **changes):
    """A task with a schedule of a few steps."""
    known = METHODS[method].recipe("dcp_vitb16", "caltech101", 4, "few-shot").as_dict()
    return task(method, clip, photos, **{name: value for name, value in FAST.items() if name in known}, **changes)


def load(clip, folder):
    """The head of a checkpoint on another copy of the same CLIP."""
    own = clip.with_clip(copy.deepcopy(clip.clip))
    return trained_head(own, folder).eval()


COUPLED = [("dcp", {"coupling": coupling}) for coupling in COUPLINGS]


@pytest.mark.parametrize(("method", "changes"), [*((method, {}) for method in METHODS if method != "dcp"), *COUPLED])
def test_every_method_is_a_head(method, changes, clip, photos, tmp_path):
    """Two trainings agree and leave CLIP as it was; only what chooses reads validation images; an image's
    answer is its own; logits are the same from a checkpoint, fused, and through timm's functions; new names
    are read, or refused."""
    before = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    given = small(method, clip, photos, **changes)
    chooses = METHODS[method].chooses
    head, again = fit_head(method, given), fit_head(method, given if chooses else replace(given, val=None))
    test, x = loader(clip, photos), pixels(given.val)
    logits = logits_of(head, test)
    assert logits.shape == (12, 3)
    assert torch.equal(logits, logits_of(again, test))
    assert all(torch.equal(tensor, before[name]) for name, tensor in clip.state_dict().items())
    assert not any(p.requires_grad for p in clip.parameters())
    assert not any(p.requires_grad for p in head.parameters()) or method == "dcp"
    assert (head.method, head.pretrained_cfg["label_names"]) == (method, NAMES)
    alone = logits_of(head, loader(clip, photos[2:3]))
    torch.testing.assert_close(logits[2:3], alone, rtol=1e-4, atol=1e-4)
    loaded = load(clip, head.save_pretrained(tmp_path, dataset="own"))
    with torch.no_grad():
        expected = head(x)
        assert close(loaded(x), expected)
        assert close(logits_of(loaded, given.val), expected)
        if method not in UNFUSED:
            assert close(loaded.fuse()(x), expected)
            assert close(loaded.get_classifier()(loaded.forward_features(x)), expected)
    (check_new_classes if METHODS[method].abilities.transfers else check_closed)(method, head, test)


def check_new_classes(method, head, test) -> None:
    before = logits_of(head, test)
    probed = method in ("text-probe", "dcp")  # a text probe counts among the classes it was fitted on
    head.set_classnames([*reversed(NAMES), *(() if probed else ("cat",))])
    after = logits_of(head, test)
    torch.testing.assert_close(after[:, :3].flip(-1), before, rtol=1e-4, atol=1e-4)
    head.set_classnames(NAMES, "art of a {}")
    changed = not torch.allclose(logits_of(head, test), before, atol=1e-3)
    assert changed == (
        method not in ("coop", "cocoop", "kgcoop", "prograd", "ivlp", "maple", "promptsrc", "dcp")
    )  # their prompts are the template


def check_closed(method, head, test) -> None:
    before = logits_of(head, test)
    with pytest.raises(ZooError, match=f"{method} is limited to its classes.*zero-shot"):
        head.set_classnames(["cat"])
    head.set_classnames(NAMES[:0:-1])
    torch.testing.assert_close(logits_of(head, test), before[:, [2, 1]])


@pytest.mark.scripts
def test_a_head_with_an_adapter_is_exported(clip, photos, tmp_path):
    given = small("clip-adapter", clip, photos)
    head, x = fit_head("clip-adapter", given), pixels(given.val)
    exported = OnnxClassifier(export(head, tmp_path / "head.onnx"))
    assert close(torch.from_numpy(exported(x.numpy())), head(x), 1e-4)


def test_a_head_with_an_adapter_is_not_linear(clip, photos):
    """It cannot be explained or followed by a text probe; a fine-tuned layer takes the place of both."""
    given = small("clip-adapter", clip, photos)
    head, x = fit_head("clip-adapter", given), pixels(given.val)
    with pytest.raises(ZooError, match="The logits of a head of clip-adapter are no linear function.*to explain"):
        head.linear()
    head.reset_classifier(2)
    with torch.no_grad():
        assert close(head.fuse()(x), head(x))


@pytest.mark.parametrize("method", ["tip-adapter", "cocoop"])
def test_a_head_that_is_more_than_a_classifier_is_not_linear(method, clip, photos, tmp_path):
    """It predicts, but cannot be fused, exported or followed by a text probe."""
    given = small(method, clip, photos)
    head, x = fit_head(method, given), pixels(given.val)
    for refused in (head.fuse, head.linear, lambda: export(head, tmp_path / "x.onnx")):
        with pytest.raises(ZooError, match=f"The logits of a head of {method} are no linear function.*fuse or export"):
            refused()
    with pytest.raises(ZooError, match=f"From what {method} is fitted to .*omit the classifier"):
        plan(Split("folder", NAMES, given.images.items), "dcp_mini", method, classifier="text-probe")
    assert head.predict(x) == [NAMES[i] for i in head(x).argmax(-1)]


@pytest.mark.parametrize(("method", "steps"), [("maple", 3), ("promptsrc", 2), ("promptsrc", 3)])
def test_a_stopped_training_of_prompts_resumes_bit_for_bit(method, steps, clip, photos, tmp_path):
    """Three epochs of two steps; the state of PromptSRC has its average over the epochs, too."""

    def fit(**options):
        given = task(method, clip, photos, augment="crop-flip", epochs=3)
        crops = loader(clip, photos[:9], "crop-flip")
        return fit_head(method, replace(given, images=crops, **options)).to_state()

    whole = fit()
    with pytest.raises(KeyboardInterrupt):
        fit(state=StoppedState(steps, tmp_path / STATE_NAME))
    state = TrainingState(tmp_path / STATE_NAME)
    assert len(state.losses) == steps
    resumed = fit(state=state)
    assert len(state.losses) == 6
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("method", ["zero-shot", "clip-lora"])
def test_a_probe_on_the_features_of_any_method(method, clip, photos, tmp_path):
    given = small(method, clip, photos, classifier="text-probe")
    head, bare = fit_head(method, given), fit_head(method, small(method, clip, photos))
    assert fit_probe(bare, given.images) == head.info["text_probe"]
    assert len(head.readings) == (1 if method == "zero-shot" else 2)
    loaded, x = load(clip, head.save_pretrained(tmp_path)), pixels(given.val)
    with torch.no_grad():
        assert close(loaded(x), head(x), 1e-4)
        assert close(loaded.frozen.encode_image(x), clip.encode_image(x), 1e-5)


@pytest.mark.filterwarnings("ignore:Repeated class names")
@pytest.mark.parametrize("method", ["tip-adapter", "dcp"])  # which reads no texts, and which has all parts
def test_a_state_dict_loads_as_a_whole_or_not_at_all(method, clip, photos):
    """Also into a head without a text probe, and for classes that the text probe was not fitted on."""
    probe = {"classifier": "text-probe"} if method == "dcp" else {}
    whole = fit_head(method, small(method, clip, photos, **probe))
    x = pixels(loader(clip, photos[:3]))
    new = ["rose", "daisy", "iris"] if whole.texts else NAMES[1:]
    for names in (NAMES[::-1], new):
        whole.set_classnames(names)
        state = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
        other = copied(whole)
        with torch.no_grad():
            for tensor in other.to_state().values():
                tensor.mul_(0.5)
            other.text_probe = None
            assert not close(other(x), whole(x), 1e-3)
            assert not any(other.load_state_dict(state))
            assert close(other(x), whole(x), 1e-5)
        other.text_probe = None
        with pytest.raises(RuntimeError, match=r"text_probe\.other"):
            other.load_state_dict(state | {"text_probe.other": torch.ones(1)})
    with pytest.raises(RuntimeError, match="name_tokens.other"):
        whole.load_state_dict(state | {"name_tokens.other": torch.ones(1)})


def test_a_checkpoint_holds_a_text_tower_only_if_names_are_read(clip, photos, tmp_path):
    """That of 2SFS, which is limited to its classes, changes the norms of both towers."""
    fit_head("2sfs", small("2sfs", clip, photos)).save_pretrained(tmp_path)
    names = load_file(tmp_path / WEIGHTS_NAME)
    assert names.keys() > {"weight", "bias", "visual.ln_post.weight"}
    assert all(name.startswith("visual.") for name in names.keys() - {"weight", "bias"})


def test_a_probe_is_fitted_with_texts_that_stand_for_the_heads_own(clip, photos, monkeypatch):
    given = replace(small("zero-shot", clip, photos, classifier="text-probe"), val=None, texts="a drawing of a {}.")
    head = fit_head("zero-shot", given)
    weight = head.text_probe.weight.clone()
    fit_probe(head, given.images)
    assert close(head.text_probe.weight, weight, 1e-3)
    with pytest.raises(ZooError, match="From what gda is fitted to .*omit the classifier"):  # before a training
        plan(Split("folder", NAMES, given.images.items), "dcp_mini", "gda", classifier="text-probe")


def test_a_folder_that_holds_a_stopped_training_is_refused(flowers, run):
    Path("stopped").mkdir()
    Path("stopped", STATE_NAME).write_bytes(b"")
    given = ("train", flowers, "--method", "gda", "--output")
    assert "holds a stopped training, which can resume" in run.refused(*given, "stopped")
    assert "'--report'" in run.refused(*given, "x", "--report", "stopped")


TAKEN = table.METHODS["gda"]
MINE = replace(TAKEN, name="mine")
PAGE = Path(__file__).parents[1] / "docs" / "baselines.md"


def install(folder: Path, **methods: str) -> None:
    """Make the folder one of a package with these entry points, for the importing process that has it in its
    path."""
    about = folder / "other-1.0.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    lines = [f"[{table.GROUP}]", *(f"{name} = {value}" for name, value in methods.items())]
    (about / "entry_points.txt").write_text("\n".join(lines))
    importlib.invalidate_caches()


def test_the_example_of_the_page(folder, tmp_path, monkeypatch):
    """As if its package was installed: by its module and its entry point."""
    for token in MarkdownIt().parse(PAGE.read_text()):
        if token.type == "fence" and re.search(r'title="[\w/]+\.\w+"', token.info):
            file = tmp_path / token.info.split('title="')[1].rstrip('"')
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(token.content)
    name, value = re.search(r'methods"\]\n(\S+) = "(\S+)"', (tmp_path / "pyproject.toml").read_text()).groups()
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, **{name: value})
    monkeypatch.setattr(table.METHODS, "data", table.Methods().data)  # as in a new process
    photos = [folder / "red" / "0.png", folder / "blue" / "0.png"]
    classifier = dcp_zoo.FewShotClassifier(method="nearest-mean").fit(folder)
    assert list(classifier.predict(photos)) == ["red", "blue"]
    classifier.save(tmp_path / "head")
    loaded = dcp_zoo.create_model(f"local-dir:{tmp_path / 'head'}", True)
    assert [best.name for (best,) in dcp_zoo.predict(loaded, photos)] == ["red", "blue"]
    assert '"method": "nearest-mean"' in (tmp_path / "head/config.json").read_text()


def test_what_cannot_be_loaded_is_refused_when_it_is_used(tmp_path, monkeypatch):
    """A method that can be is one of the table."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.syspath_prepend(str(tmp_path))
    for value, message in (
        ("no_such_package:METHOD", "of other cannot be used: No module named 'no_such_package'. Repair"),
        ("json:dumps", "json:dumps is not a dcp_zoo.training.Method"),
        ("test_method_heads:TAKEN", "test_method_heads:TAKEN is not a dcp_zoo.training.Method of that name"),
    ):
        install(tmp_path, mine=value)
        methods = table.Methods()
        assert [*methods] == [*table.OWN, "mine"]
        with pytest.raises(ZooError, match=message):
            methods["mine"]
    install(tmp_path, mine="test_method_heads:MINE", gda="json:dumps")
    with pytest.warns(UserWarning, match="'gda' of other is left out: there is one of that name already"):
        methods = table.Methods()
    assert (methods["mine"], methods["gda"]) == (MINE, TAKEN)
