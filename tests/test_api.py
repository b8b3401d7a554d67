"""`FewShotClassifier` and the functions under it, on coloured pictures that a small DCP learns in
seconds."""

import copy
import inspect
import pickle
import random

import numpy as np
import pytest
import sklearn
import torch
from given_features import GivenSettings, run_given
from helpers import FEW_STEPS, copied, in_distribution, process_unchanged
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_validate
from sklearn.pipeline import make_pipeline

import dcp_zoo
from dcp_zoo import FewShotClassifier, ZooError
from dcp_zoo.api.estimator import seed_of
from dcp_zoo.benchmark.plan import Trial
from dcp_zoo.benchmark.sweep import sweep
from dcp_zoo.release.publish import prepare
from dcp_zoo.zoo.registry import get_head

pytestmark = FEW_STEPS
QUICK = {"epochs": 4, "batch_size": 4, "n_ctx": 2, "depth": 2}
NAMES = ["blue", "red"]


@pytest.fixture(scope="module")
def pictures(folder):
    return dcp_zoo.list_labelled_images(folder)


@pytest.fixture(scope="module")
def fitted(folder):
    return FewShotClassifier(method="dcp", recipe=QUICK).fit(folder)


def test_every_form_of_an_image_gives_the_same_answer(pictures, fitted):
    """And says how many images there are; `load_image` itself is in test_unreadable.py."""
    path = pictures[0][0]
    array = np.asarray(Image.open(path))
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    expected = fitted.predict_proba(path)
    for one in (array / 255, array[None], tensor[None], [tensor / 255], [path]):
        assert fitted.predict_proba(one) == pytest.approx(expected, abs=1e-3)
    assert len(fitted.predict(array[..., 0])) == len(fitted.predict(array[None, ..., 0])) == 1
    with pytest.raises(ZooError, match=r"pass images\[None\] for one, list\(images\) for three"):
        fitted.predict(tensor)  # one image, or three grey ones


def test_labels_are_checked(folder, pictures, fitted):
    paths, labels = pictures
    for args, message in (
        ((paths,), "Pass labels"),
        ((paths, labels[:-1]), "8 images need as many labels"),
        ((paths, ["red"] * 8), "at least two classes"),
        ((folder, labels), "omit labels"),
        ((paths, [float("nan"), *labels[1:]]), "no label"),
        ((paths, [0.5, *[1.0] * 7]), "Labels name classes, .* these are measurements"),
        ((np.ones((8, 20)), labels), r"an array \(H, W\) is one grey image, and features need another classifier"),
        (
            (np.full((8, 9, 9, 3), 300, np.uint16), labels),
            "An array of uint16 is not an image, or .*: an image is a path",
        ),
        (
            (np.linspace(0, 255, 8 * 243).reshape(8, 9, 9, 3), labels),
            "An array of float64 is not an image, or not of these",
        ),
        (([*paths, paths[0]], [*labels, "red"]), r"0.png has two labels, 'blue' and 'red': keep one of them"),
    ):
        with pytest.raises(ZooError, match=message):
            FewShotClassifier(method="zero-shot").fit(*args)
    with pytest.raises(ZooError, match="gda has no epochs, after which to call callbacks"):
        FewShotClassifier(method="gda", callbacks=[print]).fit(paths, labels)
    for names, message in ((["a", "b", "c"], "3 class names for 2 classes"), ({"red": "red"}, "no name for blue")):
        with pytest.raises(ZooError, match=message):
            FewShotClassifier(classnames=names).fit(paths, labels)
    twice = FewShotClassifier(method="gda", classnames={1: "red", 0: "blue"})  # as a bootstrap draws
    twice.fit([*paths, paths[0]], [int(label == "red") for label in [*labels, labels[0]]])
    assert (twice.model_.classnames, twice.classes_.tolist()) == (NAMES, [0, 1])


def test_warnings_point_at_the_line_of_the_user(pictures, fitted):
    """Not into this package, or the context managers that decorate its functions."""
    paths, labels = pictures
    numbers = [int(name == "red") for name in labels]
    head = copied(fitted.model_)
    for call, about in (
        (lambda: FewShotClassifier().fit(paths, numbers), "CLIP reads the class names"),
        (lambda: dcp_zoo.create_model("dcp_mini", "clip", classnames=["a", "a"]), "Repeated class names"),
        (lambda: head.set_classnames(["a", "a"]), "Repeated class names"),
    ):
        with pytest.warns(UserWarning, match=about) as caught:
            call()
        assert {warning.filename for warning in caught if about in str(warning.message)} == {__file__}


def test_train_evaluate_predict(folder, pictures, fitted, tmp_path):
    """Callbacks see every epoch, and can end a training; nothing is learnt from validation images."""
    seen, recipe = [], QUICK | {"classifier": "none"}  # whose weights depend on the validation images
    options = {"method": "dcp", "recipe": recipe, "output": tmp_path / "head"}
    validation = (pictures[0][::3], pictures[1][::3])
    with_callback = {"validation": validation, "callbacks": [lambda model, epoch: seen.append(epoch)]}
    model = dcp_zoo.train("dcp_mini", *pictures, **options, **with_callback)
    assert [epoch.epoch for epoch in seen] == [1, 2, 3, 4]
    assert seen[-1].step == 8
    assert torch.equal(model.prompts["text"], fitted.model_.prompts["text"])
    assert dcp_zoo.evaluate(model, folder).accuracy.correct == 8
    ((expected, _),) = dcp_zoo.predict(model, pictures[0][5], top_k=5)
    assert expected.name == "red"
    ((best, other),) = dcp_zoo.predict(str(tmp_path / "head"), pictures[0][5], top_k=5)
    assert best == (expected.name, pytest.approx(expected.probability, abs=1e-3), None)
    assert best.probability + other.probability == pytest.approx(1, abs=1e-5)
    stopped = FewShotClassifier(method="dcp", recipe=recipe, callbacks=[lambda model, epoch: epoch.epoch == 2])
    assert len(stopped.fit(*pictures).history_) == 2
    with pytest.raises(ZooError, match="batch_size must be at least 1, not 0"):
        dcp_zoo.predict(model, pictures[0], batch_size=0)


def test_a_batch_is_what_one_forward_pass_reads(pictures):
    classifier = FewShotClassifier(batch_size=3, memory=False).fit(*pictures)
    head, sizes = classifier.model_, []
    doors = (
        lambda size: classifier.set_params(batch_size=size).predict_proba(pictures[0]),
        lambda size: dcp_zoo.evaluate(head, *pictures, batch_size=size).logits.softmax(-1),
        lambda size: np.array([row[0].probability for row in dcp_zoo.predict(head, pictures[0], batch_size=size)]),
    )
    convolutions = [module for module in head.encoder.clip.visual.modules() if isinstance(module, torch.nn.Conv2d)]
    hooks = [module.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0]))) for module in convolutions]
    for door in doors:
        found = []
        for size in (3, 8):
            sizes.clear()
            found.append(door(size))
            assert max(sizes) == size
        assert found[0] == pytest.approx(found[1], abs=1e-4)
    for hook in hooks:
        hook.remove()


CHECKS = [
    "check_estimator_cloneable",
    "check_estimator_repr",
    "check_estimator_tags_renamed",
    "check_get_params_invariance",
    "check_no_attributes_set_in_init",
    "check_parameters_default_constructible",
    "check_set_params",
    "check_valid_tag_types",
    "check_valid_tag_values",
]


def test_scikit_learns_checks_that_need_no_table():
    from sklearn.utils import estimator_checks  # which imports most of scikit-learn

    for name in CHECKS:
        if check := getattr(estimator_checks, name, None):  # not in every version of scikit-learn
            check("FewShotClassifier", FewShotClassifier())
    with pytest.raises(NotFittedError):
        FewShotClassifier().predict("photo.jpg")


def test_a_fitted_classifier_behaves_as_scikit_learns(folder, pictures, fitted):
    paths, labels = pictures
    before = set(vars(fitted))
    probabilities = fitted.predict_proba(paths)
    assert fitted.classes_.tolist() == NAMES
    assert probabilities.shape == (8, 2)
    assert probabilities.sum(1) == pytest.approx(np.ones(8), abs=1e-5)
    assert fitted.predict(paths).tolist() == labels
    assert fitted.score(folder) == fitted.score(paths, labels) == 1
    assert fitted.predict_proba(paths[::-1])[::-1] == pytest.approx(probabilities, abs=1e-5)
    assert fitted.predict_proba(paths[2:3]) == pytest.approx(probabilities[2:3], abs=1e-5)
    refined = fitted.predict_proba(paths[:4], together=True)  # of one of the classes
    answers = dcp_zoo.predict(fitted.model_, paths[:4], together=True)
    assert [row[0].probability for row in answers] == pytest.approx(refined.max(1), abs=1e-3)
    assert refined.sum(1) == pytest.approx(np.ones(4), abs=1e-5)
    assert np.abs(refined - probabilities[:4]).max() > 1e-3
    decisions = fitted.decision_function(paths)  # of two classes the logits of the second alone
    assert 1 / (1 + np.exp(-decisions)) == pytest.approx(probabilities[:, 1], abs=1e-5)
    assert set(vars(fitted)) == before
    again = clone(fitted).fit(paths, labels)
    assert np.array_equal(again.predict_proba(paths), probabilities)


def test_pickle_and_checkpoint_keep_the_answers(pictures, fitted, tmp_path):
    paths, labels = pictures
    probabilities = fitted.predict_proba(paths)
    content = pickle.dumps(fitted)
    assert len(content) < 5e6  # without CLIP
    assert pickle.loads(content).predict_proba(paths) == pytest.approx(probabilities, abs=1e-3)
    numbers = FewShotClassifier(method="gda", classnames=NAMES).fit(paths, [10 * (name == "red") for name in labels])
    loaded = FewShotClassifier.load(numbers.save(tmp_path / "head"), device="cpu")
    assert loaded.predict_proba(paths) == pytest.approx(numbers.predict_proba(paths), abs=1e-3)
    assert loaded.classes_.tolist() == [0, 10]
    assert dcp_zoo.create_model(f"local-dir:{tmp_path / 'head'}", True).classnames == NAMES


def test_rejected_images_and_labels_of_other_classes(pictures, tmp_path):
    """None in place of an answer, by the functions and the class as by the model."""
    paths, _ = pictures
    classifier = FewShotClassifier(method="zero-shot", classifier="text-probe", classnames=NAMES)
    classifier.fit(paths, [10 * ("red" in path) for path in paths])
    model = classifier.model_
    for reject in (lambda: classifier.predict(paths, reject=True), lambda: dcp_zoo.predict(model, paths, reject=True)):
        with pytest.raises(ZooError, match="no threshold to reject images: it was fitted on too few"):
            reject()
    batch = torch.stack([dcp_zoo.create_transform(model)(Image.open(path)) for path in paths])
    model.text_probe.threshold.copy_(in_distribution(model, batch).sort().values[2:4].mean())
    expected = model.predict(batch, reject=True)
    assert expected.count(None) == 3
    answers = dcp_zoo.predict(model, paths, reject=True)
    assert [answer and answer[0].name for answer in answers] == expected
    labels = classifier.predict(paths, reject=True).tolist()
    assert labels == [name and {"blue": 0, "red": 10}[name] for name in expected]
    assert None not in classifier.predict(paths)
    model = dcp_zoo.create_model(str(classifier.save(tmp_path)), True)
    model.set_classnames(["red", "teal"])
    model.save_pretrained(tmp_path, overwrite=True)
    with pytest.raises(ZooError, match="The labels of these classes are not known"):
        FewShotClassifier.load(tmp_path)


def test_features_feed_other_classifiers(pictures):
    paths, labels = pictures
    piped = make_pipeline(FewShotClassifier(method="zero-shot"), LogisticRegression(C=1e3)).fit(paths, labels)
    assert piped.score(paths, labels) == 1
    classifier = FewShotClassifier().set_output(transform="pandas").fit(paths, labels)
    frame = classifier.transform(paths)
    assert frame.columns.tolist() == classifier.get_feature_names_out().tolist()
    assert np.linalg.norm(frame, axis=1) == pytest.approx(np.ones(len(paths)), abs=1e-5)
    with pytest.raises(ZooError):
        classifier.predict(frame)


def test_weights_of_images_in_the_text_probe(pictures):
    paths, labels = pictures
    wrong = ["red", *labels[1:]]

    def red(labels, weights=None):
        return FewShotClassifier().fit(paths[-len(labels) :], labels, weights).predict_proba(paths)[:, 1]

    expected, equal = red(labels[1:]), red(wrong)
    assert red(wrong, [0, *[1] * 7]) == pytest.approx(expected, abs=1e-5)  # as if it was not there
    assert red(wrong, [2] * 8) == pytest.approx(equal, abs=1e-5)
    assert red(wrong, [3, *[1] * 7]) != pytest.approx(equal, abs=1e-5)
    with pytest.raises(ZooError, match="gda does not support sample_weight: choose method='text-probe'"):
        FewShotClassifier(method="gda").fit(paths, labels, [1] * 8)
    for weights, message in (([1] * 7, "sample_weight"), ([0] * 4 + [1] * 4, "fewer than two classes")):
        with pytest.raises(ZooError, match=message):
            FewShotClassifier().fit(paths, labels, weights)


def test_a_stopped_training_goes_on_with_the_same_images_only(pictures, small_model, tmp_path):
    """Which in memory have no names to tell them apart."""
    images, labels = [Image.open(path) for path in pictures[0]], pictures[1]
    options = {"method": "dcp", "recipe": QUICK | {"classifier": "none"}, "output": tmp_path}

    def stop(model, epoch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dcp_zoo.train(small_model, images, labels, callbacks=[stop], **options)
    others = [*images[:-1], Image.new("RGB", images[-1].size)]
    with pytest.raises(ZooError, match="another run, which differs in .*image_hashes. To resume"):
        dcp_zoo.train(small_model, others, labels, **options)
    head = dcp_zoo.train(small_model, [image.copy() for image in images], labels, **options)
    assert head.info["subset_sha256"] != dcp_zoo.train(small_model, others, labels, method="gda").info["subset_sha256"]


@pytest.fixture
def head(fitted):
    """In training, but for a part."""
    head = copy.deepcopy(fitted.model_).train()
    head.cmpa.eval()
    return head


@pytest.fixture
def calls(folder, pictures, fitted, head, uploads, tmp_path, tiny_head, exported_once):
    """A call of every public function, and of the methods that work."""
    images = torch.rand(2, 3, 192, 192)
    own, trial = FewShotClassifier(random_state=7), Trial("few-shot", "dcp_mini", "zero-shot", "digits", 0, 0)
    vectors = {f"{part}_vector": np.eye(4, 8, dtype=np.float32) for part in ("train2", "test", "text")}
    names = {"train2_label": [0, 0, 1, 1], "test_label": [0, 0, 1, 1], "classnames": ["a", "b"]}
    vectors["text_vector"] = vectors["text_vector"][::2]
    np.savez(tmp_path / "digits.npz", **vectors, **names)
    return {
        "train": lambda: dcp_zoo.train("dcp_mini", folder, method="maple", recipe={"epochs": 1}),
        "evaluate": lambda: dcp_zoo.evaluate(head, folder),
        "predict": lambda: dcp_zoo.predict(head, folder),
        "inspect": lambda: dcp_zoo.inspect(folder),
        "search": lambda: dcp_zoo.search(folder, "something red"),
        "suggest": lambda: dcp_zoo.suggest(folder, "dcp_mini.caltech101-1shot"),
        "spot_check": lambda: dcp_zoo.spot_check(folder, "dcp_mini.caltech101-1shot", label=3),
        "list_labelled_images": lambda: dcp_zoo.list_labelled_images(folder),
        "create_model": lambda: dcp_zoo.create_model("dcp_mini", True).eval().get_classifier(),
        "create_transform": lambda: dcp_zoo.create_transform(head)(Image.new("RGB", (9, 9))),
        "load_head": lambda: dcp_zoo.load_head(fitted.model_, head.save_pretrained(tmp_path / "head")),
        "export": lambda: dcp_zoo.export(tiny_head, tmp_path / "file.onnx"),  # torch's exporter: see `onnx_file`
        "push_to_hub": lambda: dcp_zoo.push_to_hub(head, "me/colours"),
        "get_pretrained_cfg": lambda: dcp_zoo.get_pretrained_cfg("dcp_mini"),
        "get_pretrained_cfg_value": lambda: dcp_zoo.get_pretrained_cfg_value("dcp_mini", "mean"),
        "is_model": lambda: dcp_zoo.is_model("dcp_mini"),
        "model_entrypoint": lambda: dcp_zoo.model_entrypoint("dcp_mini"),
        **{name: getattr(dcp_zoo, name) for name in ("list_datasets", "list_heads", "list_models", "list_pretrained")},
        "fit": lambda: own.fit(*pictures).transform(pictures[0]),
        "head.predict": lambda: head.predict(images),
        "explain": lambda: dcp_zoo.explain(head, pictures[0][0]),
        "prompt_words": lambda: dcp_zoo.prompt_words(tiny_head),
        "prompt_attention": lambda: dcp_zoo.prompt_attention(tiny_head),
        "prepare": lambda: prepare(get_head("dcp_mini.caltech101-16shot").bundled_dir, "me/caltech"),
        "benchmark": lambda: sweep([trial], GivenSettings(tmp_path / "sweep", features=tmp_path), run=run_given),
    }


@pytest.mark.filterwarnings("ignore")
def test_no_public_function_changes_the_process_or_a_head(calls, head, tiny_head):
    """Only fresh weights of a model are drawn from torch's random state, as those of every torch module
    are."""

    def state() -> list[object]:
        found: list[object] = []
        for each in (head, tiny_head):
            tensors = (*each.named_parameters(), *each.named_buffers())
            found += [(name, module.training) for name, module in each.named_modules()]
            found += [(name, t.device, t.dtype, t.requires_grad, t._version) for name, t in tensors]
            found += [each.stats, [*each.classes], dict(each.info), each.texts]
        return found

    before = state()
    functions = {name for name in dcp_zoo.__all__ if inspect.isfunction(getattr(dcp_zoo, name))}
    assert functions <= calls.keys()
    for name, call in calls.items():
        random.random(), np.random.rand(), torch.rand(1)  # so that no state is the one after a seed
        with process_unchanged(name):
            call()
        assert state() == before, name


def test_a_fit_draws_from_the_random_state_that_it_is_given(pictures):
    """As in scikit-learn; of torch, Python and the caller's NumPy it draws nothing, also in a loop with
    splits."""
    np.random.seed(0)
    states = (3, np.int64(3), np.random.RandomState(3), np.random.default_rng(3), None)
    seeds = [seed_of(state) for state in states]
    assert (seeds[:2], len(set(seeds[1:]))) == ([3, 3], 4)
    with pytest.raises(ZooError, match="Pass an integer from 0, a RandomState, a Generator or None"):
        FewShotClassifier(method="zero-shot", random_state=1.5).fit(*pictures)


def test_groups_pass_through_scikit_learn(pictures):
    """To the splits and to `fit`, by its metadata routing: each fold is fitted with the groups of its own
    images."""
    paths, labels = pictures
    groups = [i // 2 for i in range(len(paths))]
    with sklearn.config_context(enable_metadata_routing=True):
        classifier = FewShotClassifier().set_fit_request(groups=True)
        options = {"params": {"groups": groups}, "cv": GroupKFold(2), "error_score": "raise"}
        found = cross_validate(classifier, paths, labels, return_estimator=True, **options)["estimator"]
        GridSearchCV(classifier, {"batch_size": [4]}, cv=GroupKFold(2), refit=False).fit(paths, labels, groups=groups)
    for (fold, _), fitted in zip(GroupKFold(2).split(paths, labels, groups), found, strict=True):
        given = [paths[i] for i in fold], [labels[i] for i in fold]
        same = FewShotClassifier().fit(*given, groups=[groups[i] for i in fold])
        other = FewShotClassifier().fit(*given, groups=list(fold))
        answers = fitted.predict_proba(paths)
        assert np.array_equal(answers, same.predict_proba(paths))
        assert not np.array_equal(answers, other.predict_proba(paths))
    with pytest.raises(ZooError, match="need as many groups"):
        FewShotClassifier().fit(paths, labels, groups=groups[:-1])


def test_a_dataset_trains_as_its_images_do(small_model, tmp_path, monkeypatch):
    """Of `datasets`, and a Parquet file through it, with names of classes or without; another says what it
    is."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pictures = [Image.effect_noise((40, 30), 20 + 40 * (i % 2)).convert("RGB") for i in range(8)]
    names, rows = ["flat", "rough"], {"image": pictures, "label": [i % 2 for i in range(8)]}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    table = datasets.Dataset.from_dict(rows, features)
    classifier = FewShotClassifier(small_model, method="gda")
    expected = clone(classifier).fit(pictures, [names[i] for i in rows["label"]]).predict_proba(pictures)
    table.to_parquet(file := str(tmp_path / "images.parquet"))
    for source in (table.with_format("numpy"), file):
        fitted = clone(classifier).fit(source)
        assert fitted.classes_.tolist() == names
        np.testing.assert_allclose(fitted.predict_proba(pictures), expected, atol=1e-6)
    plain = table.cast_column("label", datasets.Value("int64"))
    assert dcp_zoo.train(small_model, plain, method="gda", classnames=names, validation=table).classnames == names
    for wrong, message in (
        (datasets.DatasetDict(train=table), r"Pass one part of a dataset, and no stream: dataset\['train'\]"),
        (table.to_iterable_dataset(), "no stream"),
        (
            table.rename_column("label", "kind"),
            "has the columns image, kind, not image and label: pass dataset.rename_column",
        ),
        (f"{file}x.parquet", "Cannot read .*images.parquetx.parquet: "),
    ):
        with pytest.raises(ZooError, match=message):
            dcp_zoo.train("dcp_mini", wrong)
    with pytest.raises(ZooError, match="in the column `label`: omit labels"):
        dcp_zoo.train("dcp_mini", table, rows["label"])
