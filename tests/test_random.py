"""Every draw happens where the generator lives: no accelerator needed, one device stands for another."""

from functools import partial

import pytest
import torch

from minidistill import samplers, transport
from minidistill._random import home, noise_like, normal
from minidistill.distributions import ring
from minidistill.divergences import fisher, kl_from_scores
from minidistill.divergences.noise_integral import noised
from minidistill.score_matching.fields import rademacher
from minidistill.teachers import EmpiricalTeacher, GaussianTeacher, calibrated
from tests.helpers import mixture_2d, rng

META = torch.device("meta")


class Foreign:
    """Stands for a generator on another device."""

    device = META


@pytest.fixture
def foreign(monkeypatch):
    """A generator that torch's draws refuse, as they refuse one of another device, unless they are asked for on that
    device; then they are made on the cpu, so that the numbers exist."""
    generator = Foreign()

    def patch(name):
        draw = getattr(torch, name)

        def patched(*args, device=None, **kwargs):
            if kwargs.get("generator") is not generator:
                return draw(*args, **kwargs) if name == "multinomial" else draw(*args, device=device, **kwargs)
            where = args[0].device if name == "multinomial" else torch.device(device or "cpu")
            if where != META:
                raise RuntimeError(f"Expected a '{where}' device type for generator but found 'meta'")
            if name == "multinomial":  # its weights are on the other device, which has no values
                return torch.zeros(args[1]).long()
            return draw(*args, **kwargs | {"generator": rng()})

        monkeypatch.setattr(torch, name, patched)

    for name in ("randn", "rand", "randint", "randperm", "multinomial"):
        patch(name)
    return generator


X = torch.randn(12, 2, generator=rng(), dtype=torch.float64)
LEVELS = samplers.karras_sigmas(3, 0.1, 2.0, dtype=torch.float64)


def run(solver, generator):
    return samplers.sample(mixture_2d(), 2 * X, LEVELS, solver, generator=generator)


CALLS = {
    "noise_like": lambda g: noise_like(X, g),
    "rademacher": lambda g: rademacher(X, g),
    "mixture": lambda g: mixture_2d().sample(5, g),
    "gaussian": lambda g: GaussianTeacher(X).sample(5, g),
    "empirical": lambda g: EmpiricalTeacher(X, 0.2, generator=g).noise,
    "calibrated": lambda g: calibrated(mixture_2d(), X, LEVELS[:2], generator=g).eta,
    "noised": lambda g: noised(X, torch.arange(4), torch.ones(4, dtype=torch.float64), g),
    "fisher": lambda g: fisher(mixture_2d(), mixture_2d(), X, LEVELS[:1], generator=g, progress=False).value,
    "kl_from_scores": lambda g: kl_from_scores(mixture_2d(), mixture_2d(), X, n=8, generator=g, progress=False).value,
    "sliced": lambda g: transport.sliced_wasserstein(X, X + 1, 4, generator=g),
    **{name: partial(run, name) for name in (
        "euler_maruyama", "ancestral", "edm_stochastic", "predictor_corrector", "accelerated_ddpm",
        "annealed_langevin", "gotta_go_fast")},
    "ddim": lambda g: samplers.ddim(mixture_2d(), 2 * X, LEVELS, g, eta=1.0),
    "langevin": lambda g: samplers.langevin(mixture_2d(), X, 1.0, 2, 0.1, g),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_generator_on_another_device_serves(name, foreign):
    assert CALLS[name](foreign) is not None


def test_the_stand_in_refuses_what_torch_refuses(foreign):
    with pytest.raises(RuntimeError, match="device type for generator"):
        torch.randn(3, generator=foreign, device="cpu")
    with pytest.raises(RuntimeError, match="device type for generator"):
        torch.multinomial(torch.ones(2), 3, replacement=True, generator=foreign)
    assert torch.randn(3, generator=foreign, device=META).shape == (3,)


def test_a_cpu_generators_numbers_move_to_the_data():
    x = torch.zeros(3, 2, device="meta")
    drawn = noise_like(x, rng())
    assert (drawn.device, drawn.shape, drawn.dtype) == (META, (3, 2), torch.float32)
    assert normal((4,), META, torch.float64, rng()).dtype == torch.float64
    assert (home(META, None), home(META, rng())) == (META, torch.device("cpu"))


def test_numbers_on_the_cpu_are_torchs_own():
    """The draws of before the helper, one after the other from one generator."""
    generator = rng(3)
    assert torch.equal(noise_like(X, rng(3)), torch.randn(12, 2, generator=generator, dtype=torch.float64))
    generator = rng(3)
    component = torch.multinomial(torch.full((8,), 1 / 8), 50, replacement=True, generator=generator)
    wanted = ring().means[component] + 0.2 * torch.randn(50, 2, generator=generator)
    x, label = ring().sample_with_labels(50, rng(3))
    assert torch.equal(label, component)
    torch.testing.assert_close(x, wanted)
    assert ring().sample_with_labels(0)[1].dtype == torch.long
