"""Students of two levels: the boundary, a teacher's weights, sampling in any number of calls, and files."""

import itertools
import math

import pytest
import torch

from minidistill._autodiff import jvp
from minidistill.distillation import Distilled
from minidistill.networks import MLP, Denoiser, Generator, UNet, draw, jump, told_where
from minidistill.networks.draws import call_levels
from minidistill.networks.jumps import LOWEST, angles
from minidistill.training import checkpoints
from tests.helpers import normal, small_denoiser, states_equal

STD = 0.7  # of Gaussian data whose flow map is known: x sqrt(STD^2 + to^2) / sqrt(STD^2 + sigma^2)
NETWORKS = {
    "mlp": lambda: MLP((2,), hidden=16, depth=2, n_classes=3, null_class=True),
    "unet": lambda: UNet((1, 8, 8), channels=8, multipliers=(1, 2), blocks=1, attention=(4,), n_classes=3),
}


def flow(x, sigma, to):
    """The exact flow map of N(0, STD^2)."""
    sigma, to = (torch.as_tensor(s, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1)) for s in (sigma, to))
    return x * ((STD**2 + to**2) / (STD**2 + sigma**2)).sqrt()


class Exact:
    """A student that knows the flow map of N(0, STD^2), or only where paths end; `calls` are (sigma, to)."""

    shape, levels, sigma_init, denoiser = (1,), (), 50.0, small_denoiser()

    def __init__(self, route):
        self.route, self.calls = route, []

    def __call__(self, x, label, sigma, to=0.0):
        self.calls.append((sigma, to))
        return flow(x, sigma, to)


def told(kind, seed=0):
    """A network that jumps whose second embedding is no longer 0, in float64."""
    torch.manual_seed(seed)
    network = told_where(NETWORKS[kind]())
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network.double()


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_jump_to_where_one_is_goes_nowhere(kind):
    """Exactly, whatever the network says; and a jump to 0 lands on its aim."""
    generator = Generator(Denoiser(told(kind), STD), 50.0)
    generator.route = "jump"
    x, sigma, label = normal(4, *generator.shape), torch.tensor([0.01, 0.5, 3.0, 50.0]), torch.tensor([0, 1, 2, 0])
    assert torch.equal(generator(x, label, sigma, to=sigma), x)
    ends = generator(x, label, sigma, to=0.0)
    assert torch.equal(ends, generator(x, label, sigma))
    assert torch.equal(ends, generator(x, label, sigma, to=0.0, aim=True))
    half = generator(x, label, sigma, to=sigma / 2)
    torch.testing.assert_close(half, (x + generator(x, label, sigma, to=sigma / 2, aim=True)) / 2)
    assert not torch.allclose(half, (x + ends) / 2)  # it heeds where it goes


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_student_that_jumps_begins_as_its_teachers_denoiser(kind):
    torch.manual_seed(0)
    network = NETWORKS[kind]().double()
    teacher, student = Denoiser(network, STD), Denoiser(told_where(network).double(), STD)
    x, sigma, label = normal(3, *teacher.shape), torch.tensor([0.1, 1.0, 9.0]).double(), torch.tensor([0, 2, 1])
    for to in (None, 0.0, sigma / 3):
        assert torch.equal(student(x, sigma, label, to), teacher(x, sigma, label))
    assert torch.equal(student.features(x, sigma, label), teacher.features(x, sigma, label))
    assert network.where_to is None


@pytest.mark.parametrize("kind", NETWORKS)
def test_its_forward_derivatives_are_those_of_finite_differences(kind):
    """Along x, sigma and to at once, with attention, with and without recording; and gradients pass through them."""
    aim, label = Denoiser(told(kind), STD), torch.tensor([0, 2, 1])
    x, sigma = normal(3, *aim.shape), torch.tensor([0.2, 1.0, 9.0]).double()
    v, ones = normal(3, *aim.shape, seed=1), torch.ones(3).double()

    def f(x, sigma, to):
        return jump(aim, x, sigma, to, label)

    with torch.no_grad():
        value, got = jvp(f, (x, sigma, sigma / 3), (v, ones, 2 * ones))
        h = 1e-5
        up, down = (f(x + s * v, sigma + s, sigma / 3 + 2 * s) for s in (h, -h))
    torch.testing.assert_close(got, (up - down) / (2 * h), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(value, f(x, sigma, sigma / 3))  # another kernel of attention
    assert not got.requires_grad
    jvp(f, (x, sigma, sigma / 3), (v, ones, 2 * ones))[1].sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in aim.network.where_to.parameters())


def test_an_operation_without_a_forward_derivative_is_named_with_the_way_round():
    class Odd(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    with pytest.raises(RuntimeError, match=r"can't be differentiated forwards .*wanted derivatives by finite"):
        jvp(Odd.apply, (normal(2),), (normal(2),))


def test_other_networks_cannot_be_told():
    with pytest.raises(TypeError, match="network is Linear; a student that jumps has to be told where to"):
        told_where(torch.nn.Linear(2, 2))


# ------------------------------------------------- sampling

@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_jumps_without_new_noise_compose_to_the_flow_map(steps):
    """Whatever the number of calls, of one seed come the same samples; the levels' angles are evenly spaced."""
    student = Exact("jump")
    samples = draw(student, 500, seed=3, steps=steps)
    z = torch.randn(500, 1, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(samples, flow(50 * z, 50.0, 0.0))
    sigmas = [sigma for sigma, _ in student.calls]
    assert [to for _, to in student.calls] == [*sigmas[1:], 0.0]
    scaled = [math.atan(sigma / 0.7) for sigma in sigmas]  # the sigma_data of its denoiser
    assert scaled == pytest.approx([math.atan(50 / 0.7) * (1 - i / steps) for i in range(steps)])


@pytest.mark.parametrize("gamma", [0.3, 1.0])
def test_with_new_noise_every_level_has_its_law(gamma):
    """The flow map is exact, so the spread of what arrives at each level is that of the noised data; with gamma = 1
    the jumps all end at 0."""
    student = Exact("jump")
    samples = draw(student, 200_000, steps=4, gamma=gamma, batch_size=200_000)
    assert samples.std() == pytest.approx(STD, rel=0.01)
    for (_, to), (level, _) in itertools.pairwise(student.calls):
        assert to == pytest.approx(math.sqrt(1 - gamma**2) * level)
    assert student.calls[-1][1] == 0


def test_consistency_functions_are_given_as_much_noise_as_is_missing():
    """sqrt(t^2 - t_min^2): answers stand at t_min."""
    class Zero(Exact):
        def __call__(self, x, label, sigma, to=0.0):
            self.calls.append((sigma, float(x.std())))
            return 0 * x

    student = Zero("end")
    student.levels = (1.0, 0.003)
    draw(student, 100_000, steps=3, batch_size=100_000)
    low = LOWEST * 0.7
    wanted = [math.sqrt(level**2 - low**2) for level in student.levels]
    assert [level for level, _ in student.calls] == [50.0, 1.0, 0.003]
    assert [std for _, std in student.calls[1:]] == pytest.approx(wanted, rel=0.02)
    assert call_levels(student, 2) == pytest.approx([50.0, 0.7 * angles(2, 50 / 0.7)[1]])
    with pytest.raises(ValueError, match=r"gamma=0\.5: this student can't stop on its way"):
        draw(student, 3, gamma=0.5)


def test_a_straight_way_is_the_first_order_solver():
    """DDIM: each step along the line to the student's answer."""
    generator = Generator(small_denoiser(), 5.0)
    generator.route = "line"
    got = draw(generator, 6, steps=3)
    x, levels = 5 * torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), [*call_levels(generator, 3), 0.0]
    with torch.no_grad():
        for sigma, to in itertools.pairwise(levels):
            x = x + (to - sigma) * (x - generator.denoiser(x, sigma)) / sigma
    torch.testing.assert_close(got, x)


def test_students_of_one_call_are_asked_nothing_more():
    generator = Generator(small_denoiser(), 1.5)
    with pytest.raises(ValueError, match="steps=2: this student has 1"):
        draw(generator, 3, steps=2)
    with pytest.raises(ValueError, match=r"to=0\.3: this student \('call'\) only knows where paths end"):
        generator(normal(3, 2).float(), None, 1.0, to=0.3)
    with pytest.raises(ValueError, match="gamma=0: this student can't stop"):
        draw(generator, 3, gamma=0.0)
    done = Distilled(generator, generator, [], small_denoiser(), None, None)
    with pytest.raises(ValueError, match="this student was trained at one level"):
        done.jump(normal(3, 2).float(), 1.0)


def test_distilled_jump_checks_its_levels():
    generator = Generator(Denoiser(told_where(MLP((2,), hidden=8)), 1.0), 5.0)
    generator.route = "jump"
    done, x = Distilled(generator, generator, [], small_denoiser(), None, None), normal(2, 2).float()
    assert torch.equal(done.jump(x, 2.0, 2.0), x)
    assert not done.jump(x, torch.tensor([2.0, 1.0]), 0.5).requires_grad
    with pytest.raises(ValueError, match="to is above sigma"):
        done.jump(x, 1.0, torch.tensor([0.5, 1.1]))
    with pytest.raises(ValueError, match="to holds -1"):
        done.jump(x, 1.0, -1.0)


# ------------------------------------------------- files

@pytest.mark.parametrize("kind", NETWORKS)
def test_students_that_jump_come_back_from_their_file(tmp_path, kind):
    generator = Generator(Denoiser(told(kind).float(), STD), 5.0)
    generator.route = "jump"
    file = checkpoints.save_model(tmp_path / "student.safetensors", generator)
    again, _ = checkpoints.load_model(file)
    assert again.route == "jump"
    assert states_equal(again.state_dict(), generator.state_dict())
    assert torch.equal(draw(again, 3, steps=2), draw(generator.eval(), 3, steps=2))


def test_files_of_other_students_are_as_they_were(tmp_path):
    generator = Generator(small_denoiser(), 1.5)
    plain = checkpoints.save_model(tmp_path / "plain.safetensors", generator).read_bytes()
    assert b"route" not in plain
    assert b"jumps" not in plain
    assert checkpoints.load_model(tmp_path / "plain.safetensors")[0].route == "call"
    generator.route = "end"
    checkpoints.save_model(tmp_path / "end.safetensors", generator)
    assert checkpoints.load_model(tmp_path / "end.safetensors")[0].route == "end"


@pytest.mark.parametrize(("route", "said"), [("jump", "is not told where"), ("nowhere", "route='nowhere'")])
def test_files_whose_route_does_not_fit_are_refused(tmp_path, route, said):
    generator = Generator(small_denoiser(), 1.5)
    generator.route = route
    file = checkpoints.save_model(tmp_path / "student.safetensors", generator)
    with pytest.raises(ValueError, match=said):
        checkpoints.load_model(file)
