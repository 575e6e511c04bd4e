"""Guided and calibrated denoisers: against exact conditionals, quadrature, and the algebra of each."""

from typing import Any

import pytest
import torch

from minidistill.distributions import GaussianMixture
from minidistill.networks import MLP
from minidistill.score_matching import denoising_loss, posterior_denoiser
from minidistill.teachers import (
    GaussianTeacher,
    aligned_guidance_loss,
    autoguided,
    calibrated,
    classifier_free,
    classifier_guided,
    train_denoiser,
)
from tests.helpers import f64, line, mixture_1d, mixture_2d, normal, rng, small_denoiser

MIXTURE = mixture_2d()
LABEL = torch.tensor([0, 1, 2] * 20)
LABELS: Any = LABEL.tolist()  # what Python users may try


NET = small_denoiser(n_classes=3)
X, SIGMA = 1.5 * normal(60, 2), torch.linspace(0.1, 3, 60, dtype=torch.float64)


# ---------------------------------------------------------------------------------- guidance

@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_classifier_free_guidance_extrapolates(scale):
    """Scores: s_u + scale (s_c - s_u); 0 is unconditional, 1 plain, and no label is unconditional at any scale."""
    guided, conditional = classifier_free(MIXTURE, scale), MIXTURE(X, SIGMA, LABEL)
    base = MIXTURE(X, SIGMA)
    torch.testing.assert_close(guided(X, SIGMA, LABEL), (1 - scale) * base + scale * conditional)
    torch.testing.assert_close(guided(X, SIGMA), base)
    assert (guided.shape, guided.n_classes) == ((2,), 3)
    assert guided.sigma_data == MIXTURE.sigma_data
    other = GaussianTeacher(X)
    torch.testing.assert_close(classifier_free(MIXTURE, scale, other)(X, SIGMA, LABEL),
                               (1 - scale) * other(X, SIGMA) + scale * conditional)


def test_classifier_guidance_at_scale_1_is_bayes_rule():
    def log_prob(x, sigma, label):
        return MIXTURE.responsibilities(x, sigma).log().gather(1, label[:, None]).squeeze(1)

    base, conditional = MIXTURE(X, SIGMA), MIXTURE(X, SIGMA, LABEL)
    for scale in (0.0, 1.0, 3.0):
        guided = classifier_guided(MIXTURE, log_prob, scale, 3)
        torch.testing.assert_close(guided(X, SIGMA, LABEL), base + scale * (conditional - base))
        torch.testing.assert_close(guided(X, SIGMA, LABEL), classifier_free(MIXTURE, scale)(X, SIGMA, LABEL))
    assert guided.n_classes == 3
    logits = posterior_denoiser(MIXTURE, lambda x, s: MIXTURE.responsibilities(x, s).log())
    torch.testing.assert_close(logits(X, SIGMA, LABEL), classifier_guided(MIXTURE, log_prob)(X, SIGMA, LABEL))


def test_autoguidance_goes_beyond_the_good_model():
    bad = lambda x, s, y=None: 0.9 * MIXTURE(x, s, y) + 0.1  # noqa: E731
    good = MIXTURE(X, SIGMA, LABEL)
    for scale in (0.0, 1.0, 2.0):
        expected = bad(X, SIGMA, LABEL) + scale * (good - bad(X, SIGMA, LABEL))
        torch.testing.assert_close(autoguided(MIXTURE, bad, scale)(X, SIGMA, LABEL), expected)
    torch.testing.assert_close(autoguided(MIXTURE, bad, 2.0)(X, SIGMA), MIXTURE(X, SIGMA) * 1.1 - 0.1)


def mismatch(sigma, scale):
    """Relative L2 distance between the guided score and the score of the noised tempered density
    p(x|c)^scale p(x)^(1 - scale), by quadrature on a line under that noised density."""
    mixture = mixture_1d()
    nodes, step = line(-9, 9, 6001)
    label = torch.ones(len(nodes), dtype=torch.long)
    conditional = GaussianMixture(mixture.means[1:], mixture.covs[1:])
    tempered = (scale * conditional.log_prob(nodes[:, None]) + (1 - scale) * mixture.log_prob(nodes[:, None])).exp()
    at = nodes[::20]
    kernel = torch.exp(-((at[:, None] - nodes) ** 2) / (2 * sigma**2)) * tempered * step
    density = kernel.sum(1)
    exact = (kernel @ nodes) / density  # the tempered law's own denoiser, where it has mass
    here = density > 1e-9 * density.max()
    guided = classifier_free(mixture, scale)(at[:, None], sigma, label[::20])[:, 0]
    gap = ((guided - exact)[here].square() * density[here]).sum()
    return float((gap / ((exact - at)[here].square() * density[here]).sum()).sqrt())


def test_the_guided_score_is_that_of_the_tempered_density_at_sigma_0_only():
    """At scale 1 they agree at every level. At scale 3 the gap falls as sigma^2 towards 0 and is as large as the score
    where sigma is the data's scale: guided diffusion samples something else than the tempered density."""
    assert max(mismatch(sigma, 1.0) for sigma in (0.03, 0.3, 1.0, 3.0)) < 1e-5
    small, middle, large = (mismatch(sigma, 3.0) for sigma in (0.01, 0.1, 1.0))
    assert small < 0.002
    assert 80 < middle / small < 120
    assert large > 0.5


def test_the_aligned_loss_removes_guidance():
    """Its minimiser is D_u + (D* - D_u) / scale: at it, the loss is the plain conditional's sample by sample, and
    guidance with the same scale gives D* back."""
    scale = 2.5

    def diluted(x, sigma, label=None):
        return MIXTURE(x, sigma) + (MIXTURE(x, sigma, label) - MIXTURE(x, sigma)) / scale

    x0, noise = MIXTURE.means[LABEL] + 0.3 * normal(60, 2, seed=1), normal(60, 2, seed=2)
    plain = denoising_loss(MIXTURE, x0, SIGMA, noise, LABEL, weight=SIGMA)
    aligned = aligned_guidance_loss(diluted, x0, SIGMA, noise, LABEL, scale, MIXTURE, weight=SIGMA)
    torch.testing.assert_close(aligned, plain)
    each = torch.linspace(1, 4, 60, dtype=torch.float64)  # one scale a sample
    direct = (MIXTURE(X, SIGMA) + each[:, None] * (MIXTURE(X, SIGMA, LABEL) - MIXTURE(X, SIGMA)) - x0).square().mean(1)
    at_x = aligned_guidance_loss(MIXTURE, x0, SIGMA, (X - x0) / SIGMA[:, None], LABEL, each, MIXTURE)
    torch.testing.assert_close(at_x, direct)
    guided = classifier_free(diluted, scale, MIXTURE)
    torch.testing.assert_close(guided(X, SIGMA, LABEL), MIXTURE(X, SIGMA, LABEL))


def test_dropped_labels_train_a_null_class():
    """The null class learns the unconditional denoiser and the others stay conditional: each branch is much nearer
    to its own exact denoiser than to the other's."""
    mixture = GaussianMixture([[-1.0, 0.0], [1.0, 0.0]], 0.3)
    data, labels = mixture.sample_with_labels(4000, rng())
    net = train_denoiser(data, MLP((2,), hidden=64, depth=2, n_classes=3), labels=labels, drop_label=0.2, steps=400,
                         batch_size=128, learning_rate=5e-3, ema_halflife=5000, progress=False)
    sigma, label = 1.0, labels[:1000]
    x = data[:1000] + sigma * torch.randn(1000, 2, generator=rng(1))
    null = torch.full_like(label, 2)
    distance = lambda a, b: float((a - b).square().mean().sqrt())  # noqa: E731
    between = distance(mixture(x, sigma, label), mixture(x, sigma))
    assert distance(net(x, sigma, null), mixture(x, sigma)) < 0.25 * between
    assert distance(net(x, sigma, label), mixture(x, sigma, label)) < 0.25 * between
    guided = classifier_free(net, 2.0, unconditional=2)
    assert guided.n_classes == 2
    torch.testing.assert_close(guided(x, sigma, label), 2 * net(x, sigma, label) - net(x, sigma, null))
    torch.testing.assert_close(guided(x, sigma), net(x, sigma, null))


# ---------------------------------------------------------------------------------- calibration

LEVELS = f64([3.0, 0.1, 0.5])


def biased(x, sigma, label=None):
    """The exact denoiser plus an error that depends on the level and on the class."""
    push = f64([[0.3, -0.2], [-0.1, 0.4], [0.5, 0.1]])
    s = torch.as_tensor(sigma).to(x).reshape(-1, 1)
    return MIXTURE(x, sigma, label) - s.sqrt() * (push[1] if label is None else push[label])


def test_an_exact_score_has_mean_0():
    """|mean| below 4 standard errors in every entry (18 of them), and the error bar is the samples' own."""
    data, labels = MIXTURE.sample_with_labels(3000, rng())
    out = calibrated(MIXTURE, data, LEVELS, labels, generator=rng(1))
    assert out.sigmas.tolist() == [0.1, 0.5, 3.0]
    assert out.eta.shape == out.error.shape == (3, 3, 2)
    assert (out.eta.abs() < 4 * out.error).all()
    assert (out.eta.abs() > 0.3 * out.error).double().mean() > 0.4  # an error bar that is not far too wide
    wrong = calibrated(biased, data, LEVELS, labels, generator=rng(1))
    assert (wrong.eta.abs() > 4 * out.error).double().mean() > 0.9


def test_calibration_lowers_the_loss_by_exactly_the_square_of_the_mean():
    """On the sample that calibrated (same noise), the DSM loss 1/2 w |s + e / sigma|^2 falls by 1/2 w |eta / sigma|^2
    to rounding; on fresh data to the sampling error."""
    n, sigma = 500, 0.5
    data = MIXTURE.sample(n, rng())
    out = calibrated(biased, data, f64([sigma]), generator=rng(1), batch_size=n)
    e = torch.randn(data.shape, generator=rng(1), dtype=data.dtype)
    eta = out.eta[0, 0]

    def score_loss(denoiser, x0, noise):
        level = torch.full((len(x0),), sigma, dtype=torch.float64)
        return (2 / (2 * sigma**4)) * denoising_loss(denoiser, x0, level, noise)

    both = torch.cat([data, data]), torch.cat([e, -e])
    drop = (score_loss(biased, *both) - score_loss(out, *both)).mean()
    torch.testing.assert_close(drop, 0.5 * (eta / sigma).square().sum())
    bias = sigma**0.5 * f64([-0.1, 0.4]) / sigma
    assert ((eta - bias).abs() < 4 * out.error[0, 0]).all()
    fresh = MIXTURE.sample(20_000, rng(2)), normal(20_000, 2, seed=3)
    drops = score_loss(biased, *fresh) - score_loss(out, *fresh)
    expected = 0.5 * (2 * bias * eta - eta**2).sum() / sigma**2  # for an eta that is not quite the bias
    assert abs(float(drops.mean() - expected)) < 4 * float(drops.std()) / len(drops) ** 0.5


def test_calibration_by_class_and_between_levels():
    """eta is linear in log sigma between levels and constant beyond; each class has its own."""
    data, labels = MIXTURE.sample_with_labels(2000, rng())
    out = calibrated(biased, data, LEVELS, labels, generator=rng(1), batch_size=300, pairs=2)
    low, middle, high = out.eta
    at = f64([0.01, 0.1, (0.1 * 0.5) ** 0.5, 0.5, 0.5 * 6**0.25, 3.0, 50.0])
    expected = [low, low, (low + middle) / 2, middle, 0.75 * middle + 0.25 * high, high, high]
    x = normal(7, 2, seed=4)
    for c in range(3):
        label = torch.full((7,), c)
        eta = (out(x, at, label) - biased(x, at, label)) / at[:, None]
        torch.testing.assert_close(eta, torch.stack([row[c] for row in expected]))
        torch.testing.assert_close(out(x, 0.1, label), biased(x, 0.1, label) + 0.1 * low[c])
    assert (out.n_classes, out.shape) == (3, (2,))
    for c in range(3):
        error = out(x, 0.5, torch.full((7,), c)) - MIXTURE(x, 0.5, torch.full((7,), c))
        assert (error.abs() < 4 * 0.5 * out.error[1, c]).all()  # what is left is the estimate's own error


def test_calibration_takes_bytes_and_networks():
    images = torch.randint(256, (40, 1, 2, 2), generator=rng(), dtype=torch.uint8)
    net = small_denoiser(shape=(1, 2, 2))
    out = calibrated(net, images, torch.tensor([0.2, 2.0]), generator=rng(1))
    x = torch.randn(6, 1, 2, 2, generator=rng(2))
    assert out(x, 1.0).dtype == torch.float32
    assert (out(x, 0.2) - net(x, 0.2)).abs().max() > 1e-3
    again = calibrated(out, images, torch.tensor([0.2, 2.0]), generator=rng(1))
    assert again.eta.abs().max() < 1e-6  # the same sample: nothing is left


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: classifier_free(MIXTURE, float("nan")), ValueError, "scale=nan"),
    (lambda: classifier_free(small_denoiser(n_classes=3), 2.0, unconditional=3), ValueError, "wanted its last, 2"),
    (lambda: classifier_free(small_denoiser(n_classes=3), 2.0)(X.float(), 1.0, LABEL), ValueError, "wanted a class"),
    (lambda: classifier_free(small_denoiser(n_classes=3), 2.0, 2)(X.float(), 1.0, LABEL), ValueError, "wanted 0 to 1"),
    (lambda: train_denoiser(X, drop_label=0.1), ValueError, "drop_label=0.1"),
    (lambda: train_denoiser(X, labels=LABEL, drop_label=1.0), ValueError, "drop_label=1.0"),
    (lambda: train_denoiser(X, MLP((2,), n_classes=3), labels=LABEL, drop_label=0.1), ValueError, "has 4"),
    (lambda: calibrated(MIXTURE, X, f64([1.0, 1.0])), ValueError, "each once"),
    (lambda: calibrated(MIXTURE, X, f64([0.0])), ValueError, "level > 0"),
    (lambda: calibrated(MIXTURE, X, LEVELS, LABEL[:3]), ValueError, "labels is"),
    (lambda: calibrated(MIXTURE, X, LEVELS, pairs=0), ValueError, "pairs=0"),
    (lambda: calibrated(MIXTURE, X, LEVELS, LABELS), TypeError, "labels is list"),
    (lambda: classifier_free(MIXTURE, 2.0)(X, 1.0, LABELS), TypeError, "label is list"),
    (lambda: autoguided(NET, NET, 2.0)(X.float(), 1.0, LABELS), TypeError, "label is list"),
    (lambda: aligned_guidance_loss(NET, X.float(), 1.0, X.float(), LABELS, 2.0, MIXTURE.to(torch.float32)), TypeError,
     "label is list"),
])
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
