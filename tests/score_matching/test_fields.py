"""Jacobian, curl, asymmetry and the Fokker-Planck residual, against closed forms and exact scores."""

import pytest
import torch

from minidistill import score_matching as sm
from minidistill.networks import MLP, Denoiser
from tests.helpers import f64, mixture_1d, mixture_2d, normal, small_denoiser

SIGMA = 0.6
A = f64([[0.5, 0.4, -0.1], [-0.2, 0.3, 0.6], [0.7, 0.1, 0.2]])
PLANE = normal(9, 2)


def linear(x, sigma, label=None):
    return x @ A.T + 0.3


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_jacobian_of_a_linear_field_and_of_a_network(chunk_size):
    x = normal(4, 3)
    torch.testing.assert_close(sm.jacobian(linear, x, 1.0, chunk_size=chunk_size), A.expand(4, 3, 3))
    net = small_denoiser(shape=(3,)).double()
    each = torch.stack([torch.autograd.functional.jacobian(lambda u: net(u[None], SIGMA)[0], row) for row in x])
    torch.testing.assert_close(sm.jacobian(net, x, SIGMA, chunk_size=chunk_size), each)


def test_jacobian_of_images_is_that_of_flat_samples():
    net = small_denoiser(shape=(6,), n_classes=3).double()
    x, sigma, label = normal(4, 1, 2, 3), f64([0.1, 0.5, 1.0, 3.0]), torch.tensor([0, 1, 2, 1])
    image = lambda x, s, y: net(x.flatten(1), s, y).reshape(x.shape)  # noqa: E731
    torch.testing.assert_close(sm.jacobian(image, x, sigma, label), sm.jacobian(net, x.flatten(1), sigma, label))
    torch.testing.assert_close(sm.asymmetry(image, x, sigma, label), sm.asymmetry(net, x.flatten(1), sigma, label))


def test_a_gradient_field_has_no_asymmetry():
    for sigma in (0.1, SIGMA, f64([0.1] * 4 + [2.0] * 5)):
        slices = sm.rademacher(PLANE)
        assert sm.asymmetry(mixture_2d(), PLANE, sigma).max() < 1e-24
        assert sm.conservative_penalty(mixture_2d(), PLANE, sigma, slices).max() < 1e-24
        assert sm.curl(mixture_2d(), PLANE, sigma).abs().max() < 1e-10
    symmetric = lambda x, s, y=None: x @ (A + A.T)  # noqa: E731
    assert sm.conservative_penalty(symmetric, normal(4, 3), 1.0, normal(4, 3, seed=1)).max() < 1e-28


def test_the_penalty_of_a_linear_field():
    """|A - A'|_F^2 / dim; the Hutchinson estimate is |(A - A') v|^2 / dim sample by sample, signs 4 s.e. near."""
    x, exact = normal(20_000, 3), float((A - A.T).square().sum() / 3)
    v = sm.rademacher(x, torch.Generator().manual_seed(0))
    assert set(v.unique().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(sm.asymmetry(linear, x[:2], 1.0), f64([exact, exact]))
    penalty = sm.conservative_penalty(linear, x, 1.0, v, weight=2.0)
    torch.testing.assert_close(penalty, 2 * (v @ (A - A.T).T).square().mean(1))
    assert abs(float(penalty.mean()) - 2 * exact) < 4 * float(penalty.std()) / len(x) ** 0.5
    score_jacobian = (A - torch.eye(3)) / SIGMA**2  # the textbook's 1/2 |K - K'|^2, and the factor dim / (2 sigma^4)
    textbook = float((score_jacobian - score_jacobian.T).square().sum() / 2)
    assert abs(3 / (2 * SIGMA**4) * exact / textbook - 1) < 1e-12


def test_normalised_asymmetry_runs_from_gradient_to_rotation():
    def field(turn):
        K = f64([[turn - 1.0, -turn], [turn, turn - 1.0]])  # the score's: a pull at 0, a rotation at 1
        return lambda x, s, y=None: x + s**2 * x @ K.T

    values = [float(sm.asymmetry(field(turn), PLANE[:1], SIGMA, normalised=True)) for turn in (0.0, 0.5, 1.0)]
    assert values == pytest.approx([0.0, 0.5, 1.0])


def test_curl_of_a_turning_field():
    """A pull towards 0 plus a rotation at rate w has curl 2 w, at any noise level and place."""
    turn = lambda x, s, y=None: x + s.reshape(-1, 1) ** 2 * (1.5 * torch.stack([-x[:, 1], x[:, 0]], 1) - x)  # noqa: E731
    sigma = torch.linspace(0.1, 3, 9, dtype=torch.float64)
    torch.testing.assert_close(sm.curl(turn, PLANE, sigma), torch.full((9,), 3.0, dtype=torch.float64))
    label = torch.tensor([0, 1, 2] * 3)
    assert sm.curl(mixture_2d(), PLANE, sigma, label).abs().max() < 1e-10


@pytest.mark.parametrize("mixture", [mixture_1d(), mixture_1d("three"), mixture_2d()], ids=["two", "three", "2-D"])
def test_the_exact_scores_obey_the_fokker_planck_equation(mixture):
    x, sigma = 1.5 * normal(9, mixture.means.shape[1]), torch.linspace(0.1, 3, 9, dtype=torch.float64)
    assert sm.fokker_planck_residual(mixture, x, sigma).abs().max() < 1e-10
    label = torch.arange(9) % mixture.n_components
    assert sm.fokker_planck_residual(mixture, x, 0.3, label).abs().max() < 1e-10
    assert sm.fokker_planck_loss(mixture, x, sigma).max() < 1e-20
    for wrong in (
        lambda x, s, y=None: mixture(x, s) + 0.1 * s.reshape(-1, 1) ** 2,
        lambda x, s, y=None: mixture(x, 1.1 * s),
        lambda x, s, y=None: 0.95 * mixture(x, s),
    ):
        assert sm.fokker_planck_loss(wrong, x, sigma).mean() > 1e-4


def test_fokker_planck_residual_of_any_field_is_the_textbook_one():
    """sigma^3 (ds/d sigma - sigma grad(div s + |s|^2)) by plain autograd, one point at a time."""
    torch.manual_seed(0)
    net = Denoiser(MLP((2,), hidden=16, depth=1), 0.7).double()
    x, sigma = PLANE[:3], f64([0.3, 0.8, 2.0])
    got = sm.fokker_planck_residual(net, x, sigma)
    jacobian = torch.autograd.functional.jacobian

    def score(u, s):
        return (net(u[None], s)[0] - u) / s**2

    def growth(u, s):
        return jacobian(lambda v: score(v, s), u, create_graph=True).trace() + score(u, s).square().sum()

    for u, s, residual in zip(x, sigma, got, strict=True):
        textbook = jacobian(lambda t, u=u: score(u, t), s) - s * jacobian(lambda v, s=s: growth(v, s), u)
        torch.testing.assert_close(residual, s**3 * textbook)
    assert got.abs().max() > 1e-3


def test_sliced_fokker_planck_residuals_average_to_the_exact_one():
    """The residual is linear in v v': both signs of v agree, and orthogonal slices sqrt(dim) e_i average to it."""
    net = small_denoiser(shape=(3,)).double()
    x = normal(5, 3)
    basis = 3**0.5 * torch.eye(3, dtype=torch.float64)
    sliced = [sm.fokker_planck_residual(net, x, SIGMA, slices=v.expand(5, 3)) for v in basis]
    exact = sm.fokker_planck_residual(net, x, SIGMA, chunk_size=2)
    torch.testing.assert_close(sum(sliced) / 3, exact)
    torch.testing.assert_close(sliced[0], sm.fokker_planck_residual(net, x, SIGMA, slices=-basis[0].expand(5, 3)))
    torch.testing.assert_close(sm.fokker_planck_loss(net, x, SIGMA), exact.square().mean(1))


def test_rademacher_is_reproducible_and_shaped():
    x = torch.zeros(3, 1, 2, 2)
    one, two = (sm.rademacher(x, torch.Generator().manual_seed(5)) for _ in range(2))
    assert one.shape == x.shape
    assert one.dtype == x.dtype
    assert torch.equal(one, two)
    assert one.abs().eq(1).all()


def test_training_with_the_penalty_straightens_a_network():
    """A turned field in the plane: descending denoising plus penalty leaves less asymmetry than denoising alone."""
    mixture, asymmetries = mixture_2d().to(torch.float32), []
    for strength in (0.0, 1.0):
        torch.manual_seed(0)
        rng = torch.Generator().manual_seed(0)
        net = Denoiser(MLP((2,), hidden=32, depth=1), 0.9)
        optimizer = torch.optim.Adam(net.parameters(), 5e-3)
        for _ in range(200):
            x0, noise = mixture.sample(128, rng), torch.randn(128, 2, generator=rng)
            sigma = sm.log_uniform_sigma(128, 0.2, 2.0, rng, "cpu")
            loss = sm.denoising_loss(net, x0, sigma, noise)
            x = x0 + sigma[:, None] * noise
            loss = loss + strength * sm.conservative_penalty(net, x, sigma, sm.rademacher(x, rng))
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
        x = mixture.noised(0.5).sample(1000, rng)
        asymmetries.append(float(sm.asymmetry(net, x, 0.5).mean().detach()))
    assert asymmetries[1] < asymmetries[0] / 3
