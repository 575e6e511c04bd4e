"""Gaussian and empirical teachers: against brute force, scipy, solvers, and the limits that theory gives."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from minidistill import samplers
from minidistill.data import to_float
from minidistill.distributions import GaussianMixture
from minidistill.teachers import EmpiricalTeacher, GaussianTeacher
from tests.helpers import LargestTensor, f64, normal, rng


def cloud(n=60, dim=3, seed=0):
    """Correlated data away from the origin, float64."""
    return normal(n, dim, seed=seed) @ normal(dim, dim, seed=seed + 1) + 1.5


def brute_force(data, x, sigma, weights=None):
    """The posterior mean by its definition, from differences, in float64."""
    data, flat = data.double().flatten(1), x.double().flatten(1)
    sigma = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1)
    logits = -(flat[:, None] - data).square().sum(2) / (2 * sigma**2)
    if weights is not None:
        logits = logits + weights.double().log()
    return (logits.softmax(1) @ data).reshape(x.shape)


# ---------------------------------------------------------------------------------- the Gaussian fit

def test_the_gaussian_fit_is_the_mixture_with_one_component():
    data = cloud()
    mean, cov = data.mean(0), data.T.cov(correction=0)
    teacher, exact = GaussianTeacher(data), GaussianMixture(mean[None], cov[None])
    x, sigma = 3 * normal(20, 3, seed=5), torch.linspace(0.01, 5, 20, dtype=torch.float64)
    torch.testing.assert_close(teacher.mean, mean)
    torch.testing.assert_close(teacher.cov, cov)
    assert teacher.sigma_data == pytest.approx(exact.sigma_data)
    torch.testing.assert_close(teacher(x, sigma), exact(x, sigma))
    torch.testing.assert_close(teacher(x, 0.7), exact(x, 0.7))
    again = GaussianTeacher.from_moments(mean, cov)
    torch.testing.assert_close(again(x, 0.7), exact(x, 0.7))
    law = stats.multivariate_normal(mean.numpy(), (cov + 0.3**2 * torch.eye(3)).numpy())
    torch.testing.assert_close(teacher.noised(0.3).log_prob(x), torch.from_numpy(law.logpdf(x.numpy())))


def test_the_gaussian_denoiser_is_the_best_linear_one():
    """Least squares of x0 on noised copies of the data, the noise's own moments taken exactly, gives D."""
    data, sigma, x = cloud(), 0.8, normal(7, 3, seed=3)
    offset = data - data.mean(0)
    second = offset.T @ offset / len(data)
    slope = torch.linalg.solve(second + sigma**2 * torch.eye(3), second)  # (E xx')^-1 E x x0'
    torch.testing.assert_close(GaussianTeacher(data)(x, sigma), data.mean(0) + (x - data.mean(0)) @ slope)


def test_the_gaussian_flow_solves_the_probability_flow():
    """d flow / d after = (x - D) / after by autograd, flows compose, and Heun with many steps lands on the same."""
    teacher, x = GaussianTeacher(cloud()), 4 * normal(9, 3, seed=2)
    after = torch.linspace(0.1, 6, 9, dtype=torch.float64, requires_grad=True)
    moved = teacher.flow(x, 3.0, after)
    speed = torch.stack([torch.autograd.grad(moved[:, k].sum(), after, retain_graph=True)[0] for k in range(3)], 1)
    torch.testing.assert_close(speed, (moved - teacher(moved, after)) / after[:, None])
    torch.testing.assert_close(teacher.flow(teacher.flow(x, 3.0, 0.4), 0.4, 7.0), teacher.flow(x, 3.0, 7.0))
    torch.testing.assert_close(teacher.flow(x, 2.0, 2.0), x)
    solved = samplers.sample(teacher, x, samplers.karras_sigmas(400, 0.002, 3.0, dtype=torch.float64))
    torch.testing.assert_close(solved, teacher.flow(x, 3.0, 0.0), atol=2e-4, rtol=0)  # Heun's error at 400 steps


def test_gaussian_classes_shapes_and_samples():
    data = cloud(80, 12).reshape(80, 3, 2, 2)
    labels = torch.arange(80) % 3
    data[labels == 1] += 2
    teacher = GaussianTeacher(data, labels)
    assert (teacher.shape, teacher.n_classes) == ((3, 2, 2), 3)
    x, sigma = normal(8, 3, 2, 2, seed=4), torch.linspace(0.3, 2, 8, dtype=torch.float64)
    label = torch.tensor([2, 0, 1, 1, 0, 2, 1, 0])
    each = [GaussianTeacher(data[labels == c]) for c in range(3)]
    got, moved = teacher(x, sigma, label), teacher.flow(x, sigma, 0.1, label)
    density = teacher.noised(1).log_prob(x, label)
    for k, c in enumerate(label.tolist()):
        row = x[k : k + 1]
        torch.testing.assert_close(got[k], each[c](row, float(sigma[k]))[0])
        torch.testing.assert_close(moved[k], each[c].flow(row, float(sigma[k]), 0.1)[0])
        torch.testing.assert_close(density[k], each[c].noised(1).log_prob(row)[0])
    torch.testing.assert_close(teacher(x, sigma), GaussianTeacher(data)(x, sigma))
    # Standard errors of a mean and of a covariance's entries (at most sqrt(2) times the product of the stds).
    n, flat = 20_000, teacher.sample(20_000, rng()).flatten(1)
    assert flat.shape == (n, 12)
    std = teacher.cov.diagonal().sqrt()
    assert ((flat.mean(0) - teacher.mean.flatten()).abs() < 4.5 * std / n**0.5).all()
    assert ((flat.T.cov() - teacher.cov).abs() < 4.5 * math.sqrt(2 / n) * torch.outer(std, std)).all()
    assert torch.equal(teacher.sample(3, rng(1)), teacher.sample(3, rng(1)))


def test_a_singular_fit_denoises_and_refuses_a_density():
    """Fewer images than pixels: the flow to 0 lands in the data's span, where the denoiser stays too."""
    data = torch.randint(256, (5, 1, 4, 4), generator=rng(), dtype=torch.uint8)
    teacher = GaussianTeacher(data)
    landed = teacher.flow(80 * normal(6, 1, 4, 4, dtype=torch.float32), 80.0, 0.0)
    offsets = to_float(data).flatten(1) - teacher.mean.flatten()
    span = torch.linalg.svd(offsets.double(), full_matrices=False).Vh[:4]
    away = (landed - teacher.mean).flatten(1).double()
    assert (away - away @ span.T @ span).norm(dim=1).max() < 1e-5
    assert landed.dtype == torch.float32
    with pytest.raises(ValueError, match="singular"):
        teacher.log_prob(landed)
    assert teacher.noised(0.1).log_prob(landed).isfinite().all()


def test_a_singular_class_is_named_and_does_not_stop_the_others():
    """Class 1 is one point three times; all data and class 0 have densities, and only class 1 has none."""
    data = torch.cat([cloud(30, 2), torch.ones(3, 2).double()])
    teacher = GaussianTeacher(data, torch.arange(33) // 30)
    x = cloud(5, 2, seed=3)
    torch.testing.assert_close(teacher.log_prob(x), GaussianTeacher(data).log_prob(x))
    zeros = torch.zeros(5).long()
    torch.testing.assert_close(teacher.log_prob(x, zeros), GaussianTeacher(data[:30]).log_prob(x))
    with pytest.raises(ValueError, match=r"of class 1 is singular; wanted \.noised"):
        teacher.log_prob(x, torch.tensor([0, 1, 0, 0, 0]))
    with pytest.raises(ValueError, match="of all data is singular"):
        GaussianTeacher(data[30:], zeros[:3]).log_prob(x)
    assert teacher.noised(0.1).log_prob(x, zeros + 1).isfinite().all()
    assert teacher.log_prob(x[:0], zeros[:0]).shape == (0,)


def test_without_smoothing_nothing_is_drawn():
    generator = rng()
    before, own = generator.get_state(), torch.get_rng_state()
    plain = EmpiricalTeacher(cloud(), generator=generator)
    EmpiricalTeacher(cloud())
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), own)
    assert plain.noise.shape == (0, 3)
    smoothed = EmpiricalTeacher(cloud(), 0.1, generator=generator)
    assert torch.equal(smoothed.noise[:8], torch.randn(8, 3, generator=rng()))


# ---------------------------------------------------------------------------------- the data set itself

@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 40), chunk=st.integers(1, 50), log_sigma=st.floats(-6, 4.4), seed=st.integers(0, 99),
    top_k=st.sampled_from([None, 100]),
)
def test_the_running_softmax_is_the_posterior_mean(n, chunk, log_sigma, seed, top_k):
    """Any chunk size, one level each; in float64, and with k at least n the nearest neighbours are all of them."""
    data, x = normal(n, 2, 3, seed=seed), 2 * normal(6, 2, 3, seed=seed + 1)
    sigma = math.exp(log_sigma) * torch.linspace(0.5, 2, 6, dtype=torch.float64)
    teacher = EmpiricalTeacher(data, chunk=chunk, top_k=top_k)
    torch.testing.assert_close(teacher(x, sigma), brute_force(data, x, sigma), atol=1e-9, rtol=0)


@pytest.mark.parametrize("sigma", [0.002, 0.01, 0.1, 1.0, 10.0, 80.0])
@pytest.mark.parametrize("kind", ["fine", "far", "images"])
def test_float32_stays_accurate_at_every_level(kind, sigma):
    """Against float64 brute force. `fine`: neighbours as close as the noise, where |x - x_i|^2 by a float32 product
    is off by whole nats; `far`: a common offset of 30 standard deviations."""
    data = {"fine": lambda: torch.cat([0.002 * normal(500, 2), 3 + 0.002 * normal(500, 2, seed=1)]),
            "far": lambda: normal(1000, 2) + 30,
            "images": lambda: torch.randint(256, (300, 3, 8, 8), generator=rng(), dtype=torch.uint8)}[kind]()
    data = data if data.dtype == torch.uint8 else data.float()
    x = to_float(data)[::5] + sigma * torch.randn(to_float(data)[::5].shape, generator=rng(1))
    size = float(to_float(data).abs().max())
    got = EmpiricalTeacher(data, chunk=128)(x, sigma)
    assert got.dtype == torch.float32
    error = float((got - brute_force(to_float(data), x, sigma)).abs().max())
    assert error < 1e-5 * size  # the float32 product alone: up to 1e-3 here


def test_labels_pick_their_class_and_bytes_are_images():
    data = torch.randint(256, (50, 3, 2, 2), generator=rng(), dtype=torch.uint8)
    labels = torch.arange(50) % 4
    teacher = EmpiricalTeacher(data, labels=labels, chunk=7)
    assert (teacher.shape, teacher.n_classes) == ((3, 2, 2), 4)
    assert teacher.data.dtype == torch.uint8
    variances = to_float(data).double().flatten(1).var(0, correction=0)
    assert teacher.sigma_data == pytest.approx(float(variances.mean().sqrt()))
    x, label = normal(9, 3, 2, 2, seed=2), torch.tensor([3, 1, 1, 0, 2, 3, 0, 0, 1])
    sigma = torch.linspace(0.2, 1, 9, dtype=torch.float64)
    inside = (labels == label[:, None]).double()
    exact = brute_force(to_float(data), x, sigma, inside)
    torch.testing.assert_close(teacher(x, sigma, label), exact, atol=1e-6, rtol=0)  # bytes are floats of 32 bits
    torch.testing.assert_close(teacher(x, sigma), brute_force(to_float(data), x, sigma), atol=1e-6, rtol=0)


def test_top_k_is_the_softmax_over_the_nearest():
    data, x = cloud(200, 4), cloud(15, 4, seed=7)
    for sigma in (0.05, 0.5, 5.0):
        distance = torch.cdist(x, data)
        near = distance <= distance.sort(1).values[:, 9:10]
        got = EmpiricalTeacher(data, top_k=10, chunk=33)(x, sigma)
        torch.testing.assert_close(got, brute_force(data, x, sigma, near.double()))


def test_memory_is_bounded_by_the_chunk():
    """No tensor that is made along the way is larger than the bytes of a few chunks, however many data there are."""
    data, x = normal(4000, 30, dtype=torch.float32), normal(16, 30, dtype=torch.float32)
    labels = torch.arange(4000) % 2
    cases = ({}, ()), ({"top_k": 20}, ()), ({"labels": labels}, (labels[:16],)), ({"smoothing": 0.3}, ())
    for options, call in cases:
        teacher = EmpiricalTeacher(data, chunk=50, **options)
        with LargestTensor() as mode:
            teacher(x, 0.1, *call)
        assert 16 * 30 <= mode.elements <= max(50 * 30, 16 * (20 + 50), 2000), options


# ---------------------------------------------------------------------------------- the smoothed variant

def test_smoothing_is_the_mean_score_of_perturbed_inputs():
    """The paper's process z = t x0 + (1 - t) e with its own formula for the smoothed score, turned into a denoiser."""
    data, h, sigma = cloud(30), 0.4, 0.6
    teacher = EmpiricalTeacher(data, h, generator=rng(), draws=6)
    e, x = teacher.noise.double(), cloud(8, seed=4)
    assert e.mean(0).abs().max() < 1e-7
    t = 1 / (1 + sigma)
    z, scores = t * x, []
    for m in e:
        moved = z + h * m
        w = (-(moved[:, None] - t * data).square().sum(2) / (2 * (1 - t) ** 2)).softmax(1)
        scores.append((t * (w @ data) - moved) / (1 - t) ** 2)
    score = torch.stack(scores).mean(0)
    expected = (z + (1 - t) ** 2 * score) / t  # Tweedie: E x0 = (z + (1 - t)^2 score) / t
    torch.testing.assert_close(teacher(x, sigma), expected, atol=1e-6, rtol=0)
    assert (teacher(x, sigma) - EmpiricalTeacher(data)(x, sigma)).abs().max() > 0.05


def test_smoothed_samples_are_new_and_fill_the_gaps():
    """sigma-CFDM's claims: without smoothing every sample is a training point, with it hardly any, all are means of
    `draws` training points, and fresh data have a sample nearer by (their W2 to all samples stays the same here: it
    is the training set's own error, which averages of it share)."""
    near, gap = [], []
    sigmas = samplers.karras_sigmas(30, 0.002, 20.0, dtype=torch.float64)
    for h in (0.0, 0.2):
        fractions, distances = [], []
        for seed in range(3):
            train, fresh = normal(40, 2, seed=seed), normal(800, 2, seed=100 + seed)
            teacher = EmpiricalTeacher(train, h, generator=rng(4), draws=4)
            out = samplers.sample(teacher, 20 * normal(800, 2, seed=3), sigmas, solver="euler")
            fractions.append(float((torch.cdist(out, train).amin(1) < 0.01).double().mean()))
            distances.append(float(torch.cdist(fresh, out).amin(1).mean()))
        near.append(sum(fractions) / 3)
        gap.append(sum(distances) / 3)
    assert near[0] == 1.0
    assert near[1] < 0.1
    assert gap[1] < 0.93 * gap[0]
    x = normal(5, 2, seed=6)
    nearest = torch.cdist(x[:, None] + 0.2 * teacher.noise.double() * (1 + 1e-4), train).argmin(2)  # (5, draws)
    torch.testing.assert_close(teacher(x, 1e-4), train[nearest].mean(1), atol=1e-6, rtol=0)


def test_the_teachers_have_gradients():
    """Objectives differentiate through their teacher: against central differences in float64."""
    data = cloud(30)
    smoothed = EmpiricalTeacher(data, 0.2, chunk=7, top_k=9, generator=rng())
    for teacher in (GaussianTeacher(data), EmpiricalTeacher(data, chunk=7), smoothed):
        x = cloud(3, seed=5).requires_grad_()
        torch.autograd.gradcheck(lambda u, t=teacher: t(u, f64([0.5, 1.0, 2.0])), x)


@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda: GaussianTeacher(torch.zeros(4)), ValueError, "data has shape"),
    (lambda: GaussianTeacher(torch.zeros(4, 2).long()), TypeError, "data is a tensor of torch.int64"),
    (lambda: GaussianTeacher(cloud(4), torch.tensor([0, 2, 2, 0])), ValueError, "no sample has class 1"),
    (lambda: GaussianTeacher.from_moments(torch.zeros(2), torch.ones(3, 3)), ValueError, r"a symmetric \(2, 2\)"),
    (lambda: GaussianTeacher.from_moments(torch.zeros(2), -torch.eye(2)), ValueError, "eigenvalue -1"),
    (lambda: GaussianTeacher(cloud())(cloud(4, 2), 1.0), ValueError, r"wanted floats of shape \(n, 3\)"),
    (lambda: GaussianTeacher(cloud())(cloud(), 1.0, torch.zeros(60).long()), ValueError, "made without labels"),
    (lambda: GaussianTeacher(cloud()).flow(cloud(), 0.0, 1.0), ValueError, "noise levels > 0"),
    (lambda: EmpiricalTeacher(cloud(), -1.0), ValueError, "smoothing=-1.0"),
    (lambda: EmpiricalTeacher(cloud(), draws=3), ValueError, "draws=3: wanted an even number"),
    (lambda: EmpiricalTeacher(cloud(), top_k=0), ValueError, "top_k=0"),
    (lambda: EmpiricalTeacher(cloud(), chunk=0), ValueError, "chunk=0"),
    (lambda: EmpiricalTeacher(cloud() / 0), ValueError, "data holds a NaN"),
    (lambda: EmpiricalTeacher(cloud())(cloud(), 0.0), ValueError, "noise levels > 0"),
])
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_no_samples_in_none_out():
    data = torch.randn(20, 2, generator=rng())
    for teacher in (GaussianTeacher(data), EmpiricalTeacher(data)):
        assert teacher(torch.zeros(0, 2), 1.0).shape == (0, 2)


def test_moments_of_a_singular_fit_go_round():
    data = torch.randn(5, 20, generator=rng())
    teacher, x = GaussianTeacher(data), torch.ones(1, 20)
    again = GaussianTeacher.from_moments(teacher.mean, teacher.cov)
    torch.testing.assert_close(again(x, 1.0), teacher(x, 1.0))
