"""Classifiers and their features, the extractors, and Frechet distance and precision and recall on features."""

import math
import os
import pickle
import sys
import types
from typing import ClassVar

import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torch.nn.functional import avg_pool2d, pad
from torchmetrics.image.fid import FrechetInceptionDistance, _compute_fid

import minidistill.metrics.fidelity
from minidistill import data
from minidistill.cli import main
from minidistill.metrics import classifier, features, frechet_distance, precision_recall
from minidistill.metrics.classifier import ConvClassifier, augment, train_cifar10_classifier
from minidistill.training import checkpoints
from tests.helpers import normal, rng, states_equal


def pictures(n, seed=0, shape=(3, 32, 32)):
    return torch.randint(256, (n, *shape), generator=rng(seed), dtype=torch.uint8)


@pytest.fixture(scope="module")
def stored():
    return classifier.load_cifar10()


def test_the_stored_classifier_is_small_and_says_how_it_was_made(stored):
    assert classifier.CIFAR10_WEIGHTS.stat().st_size < 1_000_000
    assert 150_000 < sum(weight.numel() for weight in stored.parameters()) < 400_000
    assert stored.info["test_accuracy"] >= 0.82
    assert stored.info["images_seen"] == stored.info["steps"] * stored.info["batch_size"]
    assert stored.info["command"].startswith("minidistill classifier")
    assert not stored.training
    assert not any(weight.requires_grad for weight in stored.parameters())


def test_an_images_features_depend_on_no_other_image_and_not_on_the_mode(stored):
    x = data.to_float(pictures(6))
    together = stored.features(x)
    assert together.shape == (6, 128)
    assert together.std(0).max() > 1e-3
    alone = torch.cat([stored.features(image[None]) for image in x])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(stored.features(x), together)
    assert torch.equal(classifier.load_cifar10().train().features(x), together)
    torch.testing.assert_close(stored(x), stored.head(together))


@pytest.mark.skipif(not os.environ.get("MINIDISTILL_CIFAR10"), reason="MINIDISTILL_CIFAR10 is not set")
def test_the_stored_classifier_recognises_real_test_images(stored):
    """1,000 test images: the share lies within 4 standard deviations of what the file says of all 10,000."""
    images, labels = data.cifar10(split="test", n=1000)
    wanted = stored.info["test_accuracy"]
    share = features.extractor("cifar10_classifier").recognised(images, labels)
    assert abs(share - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / 1000)


@pytest.mark.skipif(not os.environ.get("MINIDISTILL_CIFAR10"), reason="MINIDISTILL_CIFAR10 is not set")
def test_the_stored_features_see_noise_blur_and_a_missing_class():
    """Distances to 500 real images, in units of what 500 others are away."""
    images, labels = data.cifar10(split="test", n=1000)
    extract = features.extractor("cifar10_classifier")
    x, real = data.to_float(images[::2]), extract(images[1::2])
    noise = torch.randn(x.shape, generator=rng())
    soft = avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    sets = (x, x + 0.1 * noise, x + 0.2 * noise, soft, x[labels[::2] > 0])
    same, faint, strong, blurred, nine = (frechet_distance(extract(each), real) for each in sets)
    assert 3 * same < min(faint, blurred)
    assert strong > 3 * faint
    assert nine > 1.3 * same


def test_folding_keeps_the_function():
    torch.manual_seed(0)
    model = ConvClassifier((2, 8, 8), 3, stages=((4,), (6, 5)), norm=True)
    with torch.no_grad():
        for layer in model.body.modules():
            if isinstance(layer, nn.BatchNorm2d):
                for values in (layer.running_mean, layer.weight, layer.bias):
                    values.normal_(0.3)
                layer.running_var.uniform_(0.5, 2)
    x = torch.randn(7, 2, 8, 8, generator=rng())
    folded = model.folded()
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    assert folded.features(x).shape == (7, 5)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())


def coloured(n, seed=0):
    """uint8 images (n, 3, 16, 16) whose class is the brightest channel, under much noise."""
    labels = torch.arange(n) % 3
    images = pictures(n, seed, (3, 16, 16)).float() * 0.6
    images[torch.arange(n), labels] += 60
    return images.to(torch.uint8), labels


def test_training_learns_and_repeats_itself():
    images, labels = coloured(240)
    model = train_cifar10_classifier(images, labels, steps=30, batch_size=32, progress=False)
    again = train_cifar10_classifier(data.to_float(images), labels, steps=30, batch_size=32, progress=False)
    assert states_equal(model.state_dict(), again.state_dict())
    test_images, test_labels = coloured(90, seed=1)
    assert model.recognised(data.to_float(test_images), test_labels) > 0.9


def test_augmentation_gives_mirrored_and_shifted_windows():
    """Every result is one of the 2 * 3 * 3 windows of the image that reflection continues, and all of them occur."""
    image = torch.arange(2 * 5 * 6).reshape(1, 2, 5, 6).float()
    wanted = [
        pad(each, (1,) * 4, mode="reflect")[0, :, down : down + 5, right : right + 6]
        for each in (image, image.flip(3)) for down in range(3) for right in range(3)
    ]
    got = augment(image.expand(400, -1, -1, -1), rng(), reach=1)
    which = [[torch.equal(out, window) for window in wanted] for out in got]
    hits = torch.tensor(which)
    assert (hits.sum(1) == 1).all()
    assert (hits.sum(0) > 5).all()


def test_a_file_gives_the_model_back_in_half_precision(tmp_path):
    torch.manual_seed(0)
    model = ConvClassifier((1, 8, 8), 4, stages=((4,), (6,)))
    classifier.save(tmp_path / "c.safetensors", model, seed=3)
    back = classifier.load(tmp_path / "c.safetensors")
    assert back.info == {"seed": 3}
    assert back.config == model.config
    assert states_equal(back.state_dict(), {key: value.half().float() for key, value in model.state_dict().items()})
    with pytest.raises(FileNotFoundError):
        classifier.load(tmp_path / "none.safetensors")
    checkpoints.write(tmp_path / "o.safetensors", model.state_dict(), {"kind": "other"})
    with pytest.raises(ValueError, match="holds a other; wanted a classifier"):
        classifier.load(tmp_path / "o.safetensors")


def test_the_command_trains_measures_and_stores(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "cifar10", lambda root, split: coloured(60 if split == "train" else 30))
    out = tmp_path / "c.safetensors"
    assert main(["classifier", "--out", str(out), "--steps", "2", "--seed", "1"]) == 0
    model = classifier.load(out)
    test_images, test_labels = coloured(30)
    assert model.info["test_accuracy"] == pytest.approx(model.recognised(data.to_float(test_images), test_labels))
    assert model.info["images_seen"] == 512
    assert model.info["command"] == "minidistill classifier --steps 2 --seed 1"


def brute_force(x, y, k):
    """Kynkaanniemi's definition, one pair at a time; scikit-learn finds the radii."""
    def share(points, manifold):
        radii = NearestNeighbors(n_neighbors=k).fit(manifold.numpy()).kneighbors()[0][:, -1]
        return sum(
            any((point - centre).norm() <= radius for centre, radius in zip(manifold, radii, strict=True))
            for point in points
        ) / len(points)

    return share(x, y), share(y, x)


@pytest.mark.parametrize(("n", "m", "k", "chunk"), [
    (60, 60, 3, 500), (40, 70, 1, 7), (50, 35, 5, 16), (30, 30, 29, 30),
])
def test_precision_recall_is_the_definition(n, m, k, chunk, monkeypatch):
    monkeypatch.setattr(minidistill.metrics.fidelity, "_CHUNK", chunk)
    x, y = normal(n, 3), 0.7 * normal(m, 3, seed=1) + 0.5
    got = precision_recall(x, y, k)
    assert got == pytest.approx(brute_force(x, y, k), abs=1e-12)
    assert precision_recall(y, x, k) == pytest.approx((got.recall, got.precision), abs=1e-12)
    assert precision_recall(x + 1e6, y + 1e6, k) == pytest.approx(got, abs=1e-12)
    assert precision_recall(1e-6 * x, 1e-6 * y, k) == pytest.approx(got, abs=1e-12)


def test_precision_recall_of_known_cases():
    x, line = normal(40, 2), torch.arange(10.0).unsqueeze(1)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x.flip(0)) == (1, 1)
    assert precision_recall(x, x + 100) == (0, 0)
    assert precision_recall(torch.ones(8, 2), torch.ones(8, 2)) == (1, 1)  # balls of radius 0
    # Neighbours 1 apart: at k = 1 the line 5..14 reaches down to 4; at k = 3 its end's ball has radius 3, down to 2.
    assert precision_recall(line, line + 5, k=1) == pytest.approx((0.6, 0.6))
    assert precision_recall(line, line + 5, k=3) == pytest.approx((0.8, 0.8))
    # A collapsed student is precise and recalls little; one that is too wide is the reverse.
    narrow, wide = 0.1 * normal(200, 3, seed=2), normal(200, 3, seed=3)
    assert precision_recall(narrow, wide).precision > 0.9
    assert precision_recall(narrow, wide).recall < 0.1
    half = torch.cat([x, x + 100])
    assert precision_recall(x, half) == (1, 0.5)
    assert precision_recall(x.reshape(40, 1, 2), half.reshape(80, 1, 2)) == (1, 0.5)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: precision_recall(normal(3, 2), normal(9, 2)), "x has 3 samples; wanted at least 4"),
    (lambda: precision_recall(normal(9, 2), normal(3, 2)), "y has 3 samples; wanted at least 4"),
    (lambda: precision_recall(normal(9, 2), normal(9, 3)), "y has shape"),
    (lambda: precision_recall(normal(9, 2), normal(9, 2), k=0), "k=0"),
    (lambda: precision_recall(normal(9, 2) / 0, normal(9, 2)), "x holds a NaN"),
    (lambda: features.extractor("inceptoin"), "did you mean 'inception'"),
    (lambda: features.extractor("cifar10_classifier", batch_size=0), "batch_size=0"),
    (lambda: train_cifar10_classifier(torch.zeros(4, 3, 8), torch.zeros(4).long(), steps=1), r"wanted \(n, c, h, w\)"),
    (lambda: train_cifar10_classifier(pictures(4), torch.zeros(3).long(), steps=1), "labels is torch.int64"),
])
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class Flat(nn.Module):
    num_features = 27

    def forward(self, x):
        return x.flatten(1)


def torchmetrics_frechet(network, x, y):
    fid = FrechetInceptionDistance(feature=network, normalize=True).set_dtype(torch.float64)
    for images, real in ((x, False), (y, True)):
        fid.update(images, real=real)
    return float(fid.compute())


def test_frechet_distance_is_torchmetrics_on_the_same_features(stored):
    x, y = torch.rand(80, 3, 3, 3, generator=rng()).double(), torch.rand(90, 3, 3, 3, generator=rng(1)).double() ** 2
    wanted = torchmetrics_frechet(Flat(), x, y)
    assert wanted > 0.1
    assert frechet_distance(x, y) == pytest.approx(wanted, rel=1e-4)
    # Images of two kinds: noise of two contrasts, through the stored classifier.
    images = [data.to_float(pictures(200, seed)) * (0.2 + 0.8 * seed) for seed in (0, 1)]
    a, b = (features.extractor("cifar10_classifier")(each) for each in images)
    stored.num_features = 128
    wanted = torchmetrics_frechet(stored_features(stored), *images)
    assert wanted > 0.01
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-4)
    moments = [moment for z in (a.double(), b.double()) for moment in (z.mean(0), z.T.cov())]
    assert frechet_distance(a, b) == pytest.approx(float(_compute_fid(*moments)), rel=1e-4)


def stored_features(model):
    class Features(nn.Module):
        num_features = 128

        def forward(self, x):
            return model.features(x).double()

    return Features()


def test_bytes_and_floats_convert_into_each_other():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(features.to_uint8(data.to_float(levels)), levels)
    beyond = torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5])
    assert features.to_uint8(beyond).tolist() == [0, 0, 128, 255, 255]
    nudged = data.to_float(levels) + 0.49 / 127.5  # less than half a level up
    assert torch.equal(features.to_uint8(nudged), levels)


def test_extractors_features_are_the_classifiers_whatever_the_batch(stored):
    images = pictures(11)
    extract = features.extractor("cifar10_classifier", batch_size=4)
    wanted = stored.features(data.to_float(images))
    torch.testing.assert_close(extract(images), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(extract(data.to_float(images)), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(extract(3 * data.to_float(images)), extract((3 * data.to_float(images)).clamp(-1, 1)))
    guess = stored(data.to_float(images)).argmax(1)
    assert extract.recognised(images, guess) == 1
    assert extract.recognised(images, (guess + 1) % 10) == 0
    assert (extract.name, extract.dim) == ("cifar10_classifier", 128)
    for bad, message in ((pictures(2, shape=(1, 8, 8)), r"cifar10_classifier wants \(3, 32, 32\)"),
                         (torch.full((2, 3, 32, 32), math.nan), "images holds a NaN")):
        with pytest.raises(ValueError, match=message):
            extract(bad)
    extract.dim = 64
    with pytest.raises(ValueError, match=r"shape \(11, 128\); wanted \(11, 64\)"):
        extract(images)


def test_the_digits_extractor_is_the_quickstarts_classifier(monkeypatch):
    images, labels = data.digits()
    made, train = [], classifier.train_classifier

    def keep(x, y, *, seed, progress):
        assert torch.equal(x, images)
        assert torch.equal(y, labels)
        assert (seed, progress) == (5, False)
        made.append(train(x, y, seed=seed, progress=progress))
        return made[0]

    monkeypatch.setattr(classifier, "train_classifier", keep)
    extract = features.extractor("digits_classifier", batch_size=1000, seed=5)
    beyond = 1.5 * images  # seen as they are
    torch.testing.assert_close(extract(beyond), made[0].features(beyond))
    assert extract.dim == 32
    assert extract.recognised(images, labels) > 0.99


class FakeInception(nn.Module):
    """Takes what torch-fidelity's does: uint8 of any size to a tuple of features; the first three are mean colours."""

    made: ClassVar[dict] = {}

    def __init__(self, name, features_list, feature_extractor_weights_path=None, **_):
        super().__init__()
        self.made.update(name=name, features=features_list, weights=feature_extractor_weights_path)

    def forward(self, x):
        assert x.dtype == torch.uint8
        return (pad(x.float().mean((2, 3)), (0, 2045)),)


@pytest.fixture
def fidelity(monkeypatch, tmp_path):
    """torch-fidelity with a stub for its network, and an empty hub folder from which nothing is downloaded."""
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FakeInception
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def refuse(*_, **__):
        raise AssertionError("a download was tried")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    return tmp_path / "hub" / "checkpoints" / features.INCEPTION_FILE


def test_inception_without_torch_fidelity_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"pip install 'minidistill\[fid\]' \(it brings torchvision\)"):
        features.extractor("inception")


def test_inception_without_weights_downloads_only_when_told_to(fidelity, monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match="allow the download"):
        features.extractor("inception")
    with pytest.raises(FileNotFoundError, match=r"mine\.pth: no such file"):
        features.extractor("inception", weights=tmp_path / "mine.pth", allow_download=True)

    def download(url, path, hash_prefix):
        assert (url, hash_prefix) == (features.INCEPTION_URL, "6726825d")
        torch.save({"weight": torch.ones(2)}, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    features.extractor("inception", allow_download=True)
    assert FakeInception.made == {"name": "inception-v3-compat", "features": ["2048"], "weights": str(fidelity)}


def test_inception_gets_bytes_and_gives_2048_features(fidelity):
    fidelity.parent.mkdir(parents=True)
    torch.save({"weight": torch.ones(2)}, fidelity)
    extract = features.extractor("inception", batch_size=3)
    images = pictures(7)
    wanted = images.float().mean((2, 3))
    for form in (images, data.to_float(images)):
        got = extract(form)
        assert got.shape == (7, 2048)
        torch.testing.assert_close(got[:, :3], wanted)
    assert extract(pictures(2, shape=(3, 40, 20))).shape == (2, 2048)
    assert extract.recognised(images, torch.zeros(7).long()) is None
    with pytest.raises(ValueError, match=r"inception wants \(3, any, any\)"):
        extract(pictures(2, shape=(1, 8, 8)))


def test_a_weights_file_that_holds_code_is_refused(fidelity, tmp_path):
    code = pickle.dumps(print, protocol=2)
    for name, content in (("code.pth", code), ("text.pth", b"not a file of weights"), ("none.pth", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(OSError, match="does not hold Inception's weights"):
            features.extractor("inception", weights=tmp_path / name)


def test_smaller_images_are_enlarged_for_the_classifier():
    judge = features.extractor("cifar10_classifier", size=16)
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    larger = torch.nn.functional.interpolate(x, (32, 32), mode="bicubic", align_corners=False).clamp(-1, 1)
    torch.testing.assert_close(judge(x), features.extractor("cifar10_classifier")(larger))
    assert judge.name == "cifar10_classifier of 16x16"
    with pytest.raises(ValueError, match=r"wants \(3, 16, 16\)"):
        judge(torch.zeros(2, 3, 32, 32))
    assert features.extractor("cifar10_classifier", size=32).name == "cifar10_classifier"
    with pytest.raises(ValueError, match="size=16: random_conv takes images as they are"):
        features.extractor("random_conv", size=16)


def test_random_convolutions_are_the_same_everywhere_and_leave_the_caller_s_generator_alone():
    torch.manual_seed(5)
    first = torch.rand(1)
    torch.manual_seed(5)
    judge = features.extractor("random_conv")
    assert torch.equal(torch.rand(1), first)
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(judge(x), features.extractor("random_conv")(x))
    assert judge(x).shape == (4, 128)
    assert judge(torch.zeros(2, 3, 32, 32)).shape == (2, 128)
    assert not torch.allclose(judge(x), features.extractor("random_conv", seed=1)(x))
    assert judge.recognised(x, torch.arange(4)) is None
