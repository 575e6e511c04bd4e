"""Objectives whose only critic tells real samples from made ones: with the exact ratio their gradients are those of the
divergences; the penalty by hand; what stays frozen."""

import pytest
import torch

from minidistill import divergences as dv
from minidistill.distillation import GAN, Batch, ClassRatio, DistributionMatching, distill
from minidistill.distillation.objectives.ratios import freeze, gaussian_scale, gradient_penalty
from minidistill.distributions import ring
from minidistill.networks import MLP, Denoiser, Generator, UNet
from minidistill.teachers import train_denoiser
from tests.distillation.test_matching import f_divergence
from tests.helpers import assert_close, mixture_1d, mixture_2d, normal, rng, small_ring, states_equal
from tests.quadrature import loss_gradient, relative_error

ROWS = {**dv.F, "alpha": dv.alpha_divergence(0.3), "skew": dv.skew_jensen_shannon(0.25)}


@pytest.mark.parametrize("sigma", [0.4, 1.0])
@pytest.mark.parametrize("name", ROWS)
def test_with_the_exact_ratio_its_gradient_is_the_divergences(name, sigma):
    """(sigma / sigma_data)^2 times that of D_f(p_sigma || q_sigma): no score is asked for."""
    target = mixture_1d()
    got = loss_gradient(ClassRatio(ROWS[name], normalise=False), target, sigma) / sigma**2
    assert relative_error(got, f_divergence(ROWS[name], target, sigma)) < 1e-6


def plane(**more):
    """A batch of 20 with exact denoisers and ratio of two mixtures in the plane."""
    p, q = mixture_2d(), ring(3).to(torch.float64)
    x0, noise, sigma = normal(20, 2), normal(20, 2, seed=1), torch.linspace(0.2, 2.0, 20, dtype=torch.float64)

    def log_ratio(x, s, label=None):
        return torch.stack([p.noised(float(v)).log_prob(row[None])[0] - q.noised(float(v)).log_prob(row[None])[0]
                            for v, row in zip(s, x, strict=True)])

    return Batch(x0, sigma, noise, p, q, ratio=log_ratio, **more)


@pytest.mark.parametrize("name", dv.F)
def test_with_the_exact_ratio_its_pull_is_the_exact_score_difference(name):
    """Sample by sample that of distribution matching with both denoisers exact; and it asks neither of the two."""
    batch, row = plane(sigma_data=1.3), dv.F[name]
    wanted = DistributionMatching(row, normalise=False).pull(batch)[0]
    batch.teacher = batch.fake = None
    assert_close(ClassRatio(row, normalise=False).pull(batch)[0], wanted)
    scaled, scale = ClassRatio(row, clip=None, levels=0, unit_mean=False).pull(batch)
    assert_close(scaled, gaussian_scale(batch) * wanted)
    assert torch.equal(scale, gaussian_scale(batch))


def test_the_scale_is_dmds_for_gaussian_data():
    """sigma_data over the root mean square of x0 - D, exactly."""
    sigma = torch.tensor([0.3, 2.0], dtype=torch.float64)
    batch = Batch(normal(2, 3), sigma, normal(2, 3), None, sigma_data=1.5)
    assert_close(1.5 / gaussian_scale(batch).flatten(), (1 / (1 / 1.5**2 + 1 / sigma**2)).sqrt())


@pytest.mark.parametrize("sigma", [0.4, 1.0])
def test_a_gan_with_the_exact_ratio_descends_the_softened_reverse_kl(sigma):
    target = mixture_1d()
    got = loss_gradient(GAN(), target, sigma)
    assert relative_error(got, f_divergence(dv.F["softened_reverse_kl"], target, sigma)) < 1e-6


@pytest.mark.parametrize("name", ROWS)
def test_a_gan_of_any_loss_is_distribution_matching_through_its_ratios_gradient(name):
    """DMD as a GAN: minus the dual's cost f*(f'(r)) of the made samples, differentiated through x_t, has the gradient
    of D_f itself; for reverse KL the loss is -log r."""
    row, target, sigma = ROWS[name], mixture_1d(), 0.6

    class Dual:
        def generator_loss(self, batch):
            return -row.cost(batch.ratio(batch.xt, batch.sigma, None))

    assert relative_error(loss_gradient(Dual(), target, sigma), f_divergence(row, target, sigma)) < 1e-6


def test_the_penalty_is_half_the_squared_gradient_in_units_of_the_noise():
    x = normal(6, 2)
    batch = Batch(x, torch.linspace(0.5, 2, 6, dtype=x.dtype), normal(6, 2, seed=1), None, real=normal(6, 2, seed=2),
                  ratio=lambda x, s, label: x.square().sum(1) / 2)
    at = batch.real + batch.sigma[:, None] * batch.noise
    assert_close(gradient_penalty(batch), batch.sigma.square() * at.square().sum(1) / 2)
    assert_close(ClassRatio(r1=2.0).critic_loss(batch) - ClassRatio().critic_loss(batch), 2 * gradient_penalty(batch))
    assert_close(GAN(r1=1.0).critic_loss(batch) - GAN(r1=0.0).critic_loss(batch), gradient_penalty(batch))


def test_most_of_a_student_stays_frozen():
    """The inner layers of a U-Net hold nearly all of its weights, and do not move; an MLP's blocks."""
    torch.manual_seed(0)
    assert freeze(Generator(Denoiser(UNet((1, 8, 8), 16, (1, 2), 1), 0.5), 1.0)) > 0.9
    teacher = train_denoiser(ring().sample(200, rng()), MLP((2,), hidden=32, depth=2), steps=2, progress=False)
    options = {"data": ring().sample(200, rng()), "steps": 3, "batch_size": 8, "progress": False}
    out = distill(teacher, objective=GAN(frozen=True), **options)
    moved = {name: not torch.equal(value, teacher.state_dict()[name.removeprefix("denoiser.")])
             for name, value in out.generator.state_dict().items() if "frequencies" not in name}
    assert {name for name, one in moved.items() if not one} == {
        f"denoiser.network.{layer}.weight" for layer in ("condition", "blocks.0", "blocks.1")}
    assert all(one for name, one in moved.items() if name.endswith("bias"))
    with pytest.raises(ValueError, match="without inner layers to freeze"):
        freeze(torch.nn.Flatten())


@pytest.mark.parametrize("rule", [ClassRatio(dv.F["forward_kl"], r1=0.1), GAN(frozen=True)])
def test_it_resumes_to_the_bit(rule, tmp_path):
    def crash(state):
        raise RuntimeError("crash")

    options = {"objective": rule, "steps": 6, "batch_size": 8, "progress": False, "evaluate_every": 4}
    path = tmp_path / "run.safetensors"
    with pytest.raises(RuntimeError, match="crash"):
        distill(small_ring(), checkpoint=path, checkpoint_every=2, callbacks=[crash], **options)
    whole = distill(small_ring(), **options)
    assert whole.fake is None
    assert states_equal(distill(small_ring(), checkpoint=path, resume=True, **options).ema.state_dict(),
                        whole.ema.state_dict())
