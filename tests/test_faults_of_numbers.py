"""One test for each kind of fault in numbers and arguments, named after it: every one was found in this package."""

import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from nbval.plugin import get_sanitize_patterns

from minidistill import check, data, divergences, metrics, plotting, processes, samplers, teachers, training, transport
from minidistill.distillation import diagnose
from minidistill.distillation import draw as distillations
from minidistill.distillation.empirical import EmpiricalFake
from minidistill.distillation.pairs import make_pairs
from minidistill.distributions import GaussianMixture, grid, ring, two_moons
from minidistill.divergences import categorical
from minidistill.metrics import classifier, evaluation
from minidistill.networks import MLP, Denoiser, Discriminator, Generator, UNet, draw, reserve_null_class
from minidistill.processes import convert
from minidistill.score_matching import (
    denoising_loss,
    edm_weight,
    fields,
    implicit_loss,
    log_uniform_sigma,
    sliced_loss,
    sure_loss,
)
from minidistill.studies import sweep
from minidistill.teachers import (
    EmpiricalTeacher,
    calibrated,
    classifier_free,
    distil_energy,
    from_diffusers,
    train_denoiser,
)
from minidistill.training import checkpoints, files
from tests.helpers import LargestTensor, normal, rng, small_denoiser
from tests.training.test_training import toy_state

ROOT = Path(__file__).parent.parent
SHORT: Any = {"steps": 2, "batch_size": 8, "progress": False}


class Scaled:
    """A mixture that tells its shape only as images do, for `sample_teacher`."""

    def __init__(self, mixture):
        self.mixture, self.shape, self.sigma_data = mixture, mixture.shape, mixture.sigma_data

    def __call__(self, x, sigma, label=None):
        return self.mixture(x, sigma)


# ---------------------------------------------------------------------------------- random numbers

@pytest.mark.parametrize("solver", ["edm_stochastic", "ancestral", "gotta_go_fast"])
def test_no_generator_is_made_anew_in_a_loop(solver):
    options = {"levels": 6, "solver": solver, "progress": False}
    x, _ = evaluation.sample_teacher(ring(), 40, batch_size=20, **options)
    z = torch.randn(40, 2, generator=rng())
    assert (x[:20] - x[20:]).abs().min() > 0
    # The chain's noise is not that of the start: with one seed for both, its first draw would be z again.
    again = samplers.sample(ring(), samplers.levels_of(ring(), 6)[0] * z[:20], samplers.levels_of(ring(), 6), solver,
                            generator=rng())
    assert not torch.allclose(x[:20], again)


def test_two_draws_that_should_be_independent_do_not_begin_at_one_state():
    """One seed, given to both: the training's noise and the pairs', an empirical fake's samples and those it judges."""
    made = make_pairs(ring(), 64, (2,), 1.0, 0, seed=5, device=torch.device("cpu"), progress=False)
    assert not torch.allclose(made.z, torch.randn(64, 2, generator=torch.Generator().manual_seed(5)))
    student = Generator(small_denoiser(), 1.0)
    fake = EmpiricalFake(student, n=64)
    seen = diagnose(student, ring(), fake, sigma_data=1.0, n=64, seed=0)
    nearest = fake(seen.x0, 1e-4)  # at so little noise the sample that is nearest
    assert float((nearest - seen.x0).detach().norm(dim=1).min()) > 1e-4


def test_exact_samples_are_not_compared_with_themselves():
    """`over_floor` draws its exact sets from the seed that the samples may have been drawn from."""
    target = ring()
    x = target.sample(500, torch.Generator().manual_seed(3))
    y = target.sample(500, torch.Generator().manual_seed(3)) + 1e-9  # the same, but not in every digit
    assert metrics.over_floor(target, x, seed=3) > 1.15 * metrics.over_floor(target, y, seed=3)


DATA = normal(32, 2, dtype=torch.float32)
RESEEDERS = {
    "train_denoiser": lambda: train_denoiser(DATA, **SHORT),
    "distil_energy": lambda: distil_energy(ring(), DATA, **SHORT),
    "train_classifier": lambda: classifier.train_classifier(DATA, torch.arange(32) % 3, steps=2, progress=False),
    "train_cifar10_classifier": lambda: classifier.train_cifar10_classifier(
        normal(8, 3, 8, 8, dtype=torch.float32), torch.arange(8) % 2, steps=1, batch_size=4, progress=False),
    "sweep.student": lambda: sweep.student(ring(), 0),
    "wasserstein_1_critic": lambda: transport.wasserstein_1_critic(DATA, DATA + 1, steps=2, progress=False),
}


@pytest.mark.parametrize("name", RESEEDERS)
def test_no_function_reseeds_the_callers_generator(name):
    torch.manual_seed(123)
    torch.randn(100)
    wanted = torch.randn(5)
    torch.manual_seed(123)
    torch.randn(100)
    RESEEDERS[name]()
    assert torch.equal(torch.randn(5), wanted)


def test_a_seeds_weights_are_what_they_were():
    """The seeded block draws just as `torch.manual_seed` did."""
    torch.manual_seed(7)
    wanted = MLP((2,), hidden=256, depth=3)
    got = train_denoiser(DATA, steps=1, batch_size=4, learning_rate=1e-12, seed=7, progress=False)
    torch.testing.assert_close(got.network.inward.weight, wanted.inward.weight, rtol=0, atol=1e-9)


# ---------------------------------------------------------------------------------- digits lost beside far samples

def cloud(reach, n=60, m=51, d=3):
    x, y = normal(n, d), 1.2 * normal(m, d, seed=1) + 0.3
    return torch.cat([x, torch.full((1, d), float(reach), dtype=torch.float64)]), y


FAR = {
    "sinkhorn": lambda x, y: transport.sinkhorn(x, y, 1.0),
    "sinkhorn, p = 1": lambda x, y: transport.sinkhorn(x, y, 1.0, p=1),
    "mmd": lambda x, y: transport.mmd(x, y, bandwidth=[3.0, 0.3]),
    "energy_distance": transport.energy_distance,
    "kernel_stein_discrepancy": lambda x, y: transport.kernel_stein_discrepancy(x, -x),
    "sliced_wasserstein": lambda x, y: transport.sliced_wasserstein(x, y, generator=rng()),
}


@pytest.mark.filterwarnings("ignore:sinkhorn. marginal error:RuntimeWarning")
@pytest.mark.parametrize("name", FAR)
@pytest.mark.parametrize("kind", ["one far sample", "one very far sample", "all far off"])
def test_a_far_sample_takes_no_digits_from_the_others(name, kind):
    x, y = cloud({"one far sample": 1e3, "one very far sample": 1e4, "all far off": 0.0}[kind])
    if kind == "all far off":
        x, y = x + 1e5, y + 1e5
    x, y = x.float(), y.float()
    results = []
    for dtype in (torch.float32, torch.float64):
        at = x.to(dtype).requires_grad_(True)
        value = FAR[name](at, y.to(dtype))
        results.append((value.detach().double(), torch.autograd.grad(value, at)[0].double()))
    (value, gradient), (exact, slope) = results
    assert float((value - exact).abs() / exact.abs()) < 1e-3
    assert float((gradient - slope).abs().max() / slope.abs().max()) < 1e-3


@pytest.mark.filterwarnings("ignore:sinkhorn. marginal error:RuntimeWarning")
def test_the_plan_of_far_samples_is_float64s():
    x, y = (each.float() for each in cloud(1000.0))
    plan, exact = transport.sinkhorn_plan(x, y, 1.0), transport.sinkhorn_plan(x.double(), y.double(), 1.0)
    assert plan.dtype == torch.float32
    assert float((plan - exact).abs().max() / exact.max()) < 1e-3


@pytest.mark.filterwarnings("ignore:sinkhorn. marginal error:RuntimeWarning")
def test_epsilon_is_not_raised_in_silence():
    """Where it is raised a warning names what was taken, and the plan is that epsilon's; elsewhere it is kept."""
    x, y = cloud(1e9)
    with pytest.warns(RuntimeWarning, match="epsilon=1 is below what torch.float64 resolves") as said:
        plan = transport.sinkhorn_plan(x, y, 1.0, max_iterations=3)
    taken = float(re.search(r"; (\S+) was taken", str(said[0].message))[1])
    assert taken > 100
    torch.testing.assert_close(plan, transport.sinkhorn_plan(x, y, 1.1 * taken, max_iterations=3), rtol=0.1, atol=1e-3)
    x, y = (each.float() for each in cloud(1e4))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "sinkhorn: epsilon")
        plan, raised = (transport.sinkhorn_plan(x, y, epsilon, max_iterations=300) for epsilon in (1.0, 140.0))
    assert float((plan - raised).abs().max()) > 1e-3


def test_neighbourhoods_do_not_grow_with_the_farthest_sample():
    x, y = cloud(1e7)
    apart, own_x, own_y = (torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
                           for a, b in ((x, y), (x, x), (y, y)))
    found = metrics.precision_recall(x, y)
    assert found.precision == float((apart <= own_y.kthvalue(4, 1).values).any(1).double().mean()) < 1
    assert found.recall == float((own_x.kthvalue(4, 1).values >= apart.T).any(1).double().mean()) < 1


def test_an_empirical_teacher_with_a_far_point():
    x, _ = (each.float() for each in cloud(1e6))
    at = normal(20, 3, seed=2, dtype=torch.float32)
    for sigma in (0.05, 0.5, 3.0):
        exact = EmpiricalTeacher(x.double())(at.double(), sigma)
        torch.testing.assert_close(EmpiricalTeacher(x)(at, sigma).double(), exact, rtol=1e-3, atol=1e-3)


def test_a_mixtures_scale_far_from_the_origin():
    near, far = GaussianMixture([[0.0, 1.0]], 0.1), GaussianMixture([[1e4, 1e4 + 1]], 0.1)
    assert far.sigma_data == pytest.approx(near.sigma_data, rel=1e-6)


# ---------------------------------------------------------------------------------- classes, units, students

def test_a_null_class_is_no_class(tmp_path):
    data, labels = normal(60, 2, dtype=torch.float32), torch.arange(60) % 3
    for network in (None, MLP((2,), hidden=8, n_classes=4), MLP((2,), hidden=8, n_classes=3, null_class=True)):
        net = train_denoiser(data, network, labels=labels, drop_label=0.3, **SHORT)
        assert (net.n_classes, net.null_class, net.network.label.num_embeddings) == (3, 3, 4)
        _, asked = evaluation.sample_teacher(net, 9, levels=2, progress=False)
        assert asked.tolist() == [0, 1, 2] * 3
        null = torch.full((5,), 3)
        torch.testing.assert_close(net(data[:5], 1.0), net(data[:5], 1.0, null))
        guided = classifier_free(net, 2.0, unconditional=3)
        assert guided.n_classes == 3
        torch.testing.assert_close(guided(data[:5], 1.0), net(data[:5], 1.0, null))
        checkpoints.save_model(tmp_path / "net.safetensors", net)
        loaded, _ = checkpoints.load_model(tmp_path / "net.safetensors")
        assert (loaded.n_classes, loaded.null_class) == (3, 3)
        torch.testing.assert_close(loaded(data[:5], 1.0), net(data[:5], 1.0))
    with pytest.raises(ValueError, match="label runs from 4 to 4; wanted 0 to 3"):
        net(data[:5], 1.0, torch.full((5,), 4))
    old = MLP((2,), n_classes=4)  # a file of before says nothing of a null class
    checkpoints.save_model(tmp_path / "old.safetensors", Denoiser(old, 0.5))
    assert checkpoints.load_model(tmp_path / "old.safetensors")[0].n_classes == 4
    reserve_null_class(old)
    assert old.config["n_classes"] == 3


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_levels_are_in_the_datas_units(scale):
    target = ring(8, radius=2 * scale, std=0.2 * scale)
    x, _ = evaluation.sample_teacher(target, 400, progress=False)
    assert float((x / scale).std()) == pytest.approx(1.43, rel=0.07)
    assert metrics.mode_coverage(target, x).high_quality > 0.9
    exact = target.sample(20, rng())
    got = samplers.log_likelihood(target, exact)
    torch.testing.assert_close(got, target.log_prob(exact), rtol=0, atol=0.02)


def test_levels_for_edms_data_are_edms():
    denoiser = small_denoiser()
    denoiser.sigma_data = 0.5
    assert torch.equal(samplers.levels_of(denoiser, 18), samplers.karras_sigmas(18))
    assert samplers.range_of(denoiser) == (0.002, 80.0) == samplers.range_of(lambda x, sigma: x)
    table = calibrated(ring(), ring().sample(50, rng())).sigmas
    torch.testing.assert_close(table.flip(0), samplers.levels_of(ring(), 18)[:-1])


def test_one_way_to_draw_from_a_student_of_several_steps():
    student = Generator(small_denoiser(), 1.0)
    student.levels = (0.6, 0.3)
    report = samplers.Report()
    x, _ = evaluation.sample_student(student, 10, seed=3, batch_size=4, progress=False, report=report)
    assert report.calls == 3
    torch.testing.assert_close(x, draw(student, 10, seed=3), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x, distillations(student, 10, seed=3), rtol=1e-5, atol=1e-6)
    once, _ = evaluation.sample_student(student, 10, seed=3, steps=1, progress=False)
    assert not torch.allclose(once, x)
    with pytest.raises(ValueError, match="steps=4: this student has 3"):
        evaluation.sample_student(student, 10, steps=4, progress=False)


def test_calls_are_counted_and_the_solver_is_used():
    features = evaluation.Extractor("pixels", 4, lambda x: x.flatten(1), (1, 2, 2))
    shape = (1, 2, 2)
    teacher = Denoiser(MLP(shape, hidden=8), 0.5)
    student = Generator(Denoiser(MLP(shape, hidden=8), 0.5), 1.0)
    student.levels = (0.5,)
    reference = normal(20, *shape, dtype=torch.float32).clamp(-1, 1)
    result = evaluation.compare(teacher, student, reference, n=12, levels=5, solver="euler", features=features,
                                progress=False)
    assert [row["calls"] for row in result.rows] == [5, 2]
    assert result.rows[0]["solver"] == "euler"
    heun = evaluation.compare(teacher, {}, reference, n=12, levels=5, features=features, progress=False)
    assert heun.rows[0]["calls"] == 9
    assert not torch.equal(heun.samples["teacher"], result.samples["teacher"])


# ---------------------------------------------------------------------------------- number formats

def test_mixed_and_half_precision():
    x, y = normal(20, 3, dtype=torch.float32), normal(24, 3, seed=1)
    for f in (transport.mmd, transport.energy_distance, transport.wasserstein_1d, transport.wasserstein_2,
              lambda a, b: transport.sinkhorn(a, b, 1.0),
              lambda a, b: transport.sliced_wasserstein(a, b, generator=rng())):
        torch.testing.assert_close(f(x, y), f(x.double(), y), rtol=1e-5, atol=1e-6)
        for half in (torch.float16, torch.bfloat16):
            got = f(x.to(half), y.to(half))
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, f(x.to(half).float(), y.to(half).float()))
    half = x.half()
    torch.testing.assert_close(transport.kernel_stein_discrepancy(half, -half),
                               transport.kernel_stein_discrepancy(half.float(), -half.float()))
    assert categorical.sinkhorn_distillation(half, half + 1).dtype == torch.float32
    target = GaussianMixture(normal(4, 2), 0.5)
    assert metrics.over_floor(target, target.sample(200, rng()).float()) < 3
    assert metrics.precision_recall(half, y).precision >= 0
    plotting.scatter(x[:, :2].bfloat16())
    plotting.field(x[:, :2].half(), x[:, :2].bfloat16())
    plt.close("all")


def test_networks_take_any_number_format():
    """A float64 mixture's samples go into float32 networks, and come out as they went in."""
    net = small_denoiser()
    x = ring().to(torch.float64).sample(5, rng())
    assert net(x, 0.5).dtype == net.features(x, 0.5).dtype == torch.float64
    torch.testing.assert_close(net(x, 0.5).float(), net(x.float(), 0.5))
    assert Discriminator(MLP((2,), out_features=1), 1.0)(x, 0.5).dtype == torch.float64
    assert ring().to(torch.float64)(x.float(), 0.5).dtype == torch.float32


@pytest.mark.parametrize("solver", samplers.SOLVERS)
def test_half_precision_samples_are_finite(solver):
    sigmas = samplers.karras_sigmas(8, 0.01, 400.0)
    x = (400 * torch.randn(20, 2, generator=rng())).half()
    out = samplers.sample(ring(radius=3.0, std=1.0), x, sigmas, solver, generator=rng())
    assert out.dtype == torch.float16
    assert out.isfinite().all()


def attentive(n_classes=0):
    torch.manual_seed(0)
    net = UNet((1, 4, 4), channels=32, multipliers=(1, 2), blocks=1, attention=(4,), n_classes=n_classes)
    for name, weight in net.named_parameters():
        if name.endswith("out.weight") or "outward" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return net


def test_attention_has_second_derivatives():
    net, g = attentive(), rng()
    D, x = Denoiser(net, 0.5), torch.randn(2, 1, 4, 4, generator=g)
    slices = fields.rademacher(x, g)
    for loss in (sliced_loss(D, x, 0.5, slices), sure_loss(D, x, 0.5, slices), implicit_loss(D, x, 0.5),
                 fields.conservative_penalty(D, x, 0.5, slices)):
        gradient = torch.autograd.grad(loss.mean(), net.first.weight)[0]
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0
    images = torch.randn(8, 1, 4, 4, generator=g)
    assert distil_energy(lambda x, sigma, label: 0.5 * x, images, attentive(), **SHORT).energy(x, 0.5).isfinite().all()


def test_derivatives_are_right_in_inference_mode():
    target, p = ring(), processes.vp()
    x, t = target.sample(6, rng()), torch.linspace(0.1, 0.9, 6)
    drift, J = p.drift(t), fields.jacobian(target, x, 0.5)
    with torch.inference_mode():
        inside, s = x.clone(), torch.full((6,), 0.5)
        torch.testing.assert_close(p.drift(t.clone()), drift)
        torch.testing.assert_close(fields.jacobian(target, inside, s), J)
        torch.testing.assert_close(
            samplers.log_likelihood(target, inside), samplers.log_likelihood(target, x), rtol=1e-4, atol=1e-4)


def test_likelihood_with_labels():
    data, labels = normal(30, 2), torch.arange(30) % 3
    teacher = teachers.GaussianTeacher(data, labels)
    got = samplers.log_likelihood(teacher, data[:6], label=labels[:6].to(torch.uint8))
    torch.testing.assert_close(got, teacher.noised(0.004 * teacher.sigma_data).log_prob(data[:6], labels[:6]),
                               rtol=0, atol=1e-2)


# ---------------------------------------------------------------------------------- memory

def test_memory_does_not_grow_with_the_datas_scale():
    two = GaussianMixture([[0.0, 0.0], [1400.0, 0.0]], 20.0)
    samples = two.sample(500, rng())
    with LargestTensor() as seen:
        far = metrics.kl_both_ways(two, samples, sigma=0.4)  # 8,000 x 1,000 cells
    assert seen.elements <= 2**24
    assert far.outside < 1e-3
    with pytest.raises(ValueError, match=r"sigma=0.1: cells half as wide would be .* wanted a sigma that leaves"):
        metrics.kl_both_ways(GaussianMixture([[0.0, 0.0], [1e5, 1e5]], 20.0), samples)
    wide = GaussianMixture(torch.randn(40, 3072, generator=rng()), 0.1)
    with LargestTensor() as seen:
        assert wide.sigma_data == pytest.approx(1.0, rel=0.05)
        wide.variances.sum()
        processes.vp().marginal(wide, 0.5)
    assert seen.elements * 8 < 10 * 2**20


def test_blocks_give_the_whole_grids_numbers(monkeypatch):
    target, samples = ring(), ring(std=0.3).sample(2000, rng())
    whole = metrics.kl_both_ways(target, samples)
    monkeypatch.setattr("minidistill.metrics.mixtures.WHOLE", 90_000)
    torch.testing.assert_close(metrics.kl_both_ways(target, samples)[:3], whole[:3], rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------------------- arguments

def test_numpys_scalars_and_tensors_of_one_number():
    assert torch.equal(samplers.karras_sigmas(np.int64(4), np.float32(0.5), torch.tensor(2.0)),
                       samplers.karras_sigmas(4, 0.5, 2.0))
    x = normal(40, 2, dtype=torch.float32)
    assert Denoiser(MLP((np.int64(2),), np.int32(8)), x.std()).sigma_data == pytest.approx(float(x.std()))
    assert ring(np.int64(4), np.float64(1.0), np.float32(0.1)).n_components == 4
    assert type(UNet((np.int64(1), 8, 8), channels=np.int64(8)).config["channels"]) is int
    assert len(two_moons(torch.tensor(7), noise=np.float32(0.1))) == 7
    assert transport.mmd(x, x + 1, bandwidth=np.float32(1.0)).isfinite()
    for bad in (True, 2.5, np.float64(2.0), "4", None, torch.tensor([4])):
        with pytest.raises(ValueError, match="wanted a whole number >= 1"):
            samplers.karras_sigmas(bad)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int16])
def test_labels_of_any_integer_type(dtype):
    label, x = torch.tensor([0, 1, 1, 0]), normal(4, 2, dtype=torch.float32)
    net = small_denoiser(n_classes=2)
    torch.testing.assert_close(net(x, 1.0, label.to(dtype)), net(x, 1.0, label))
    mixture = ring(2)
    torch.testing.assert_close(mixture(x, 1.0, label.to(dtype)), mixture(x, 1.0, label))
    eta = [calibrated(mixture, x, torch.tensor([1.0]), kind, generator=rng()).eta for kind in (label, label.to(dtype))]
    torch.testing.assert_close(*eta)


class Bare(torch.nn.Module):
    """A network that tells its shape and classes, and has no recipe."""

    shape, n_classes = (2,), 0

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, x, c_noise, label=None):
        return self.layer(x)


def test_a_network_without_a_config_can_be_trained():
    assert train_denoiser(DATA, Bare(), **SHORT)(DATA, 1.0).isfinite().all()


def test_a_tilde_is_the_home_folder_in_python_too(tmp_path, monkeypatch):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(elsewhere)
    assert checkpoints.save_model("~/m.safetensors", small_denoiser()) == home / "m.safetensors"
    checkpoints.load_model("~/m.safetensors")
    assert checkpoints.exists("~/m.safetensors")
    assert checkpoints.read_info("~/m.safetensors")["kind"] == "denoiser"
    assert checkpoints.write("~/w", {"x": torch.ones(1)}, {"kind": "w"}) == home / "w"
    train_denoiser(DATA, small_denoiser().network, checkpoint="~/run/state", **SHORT)
    assert training.progress_of("~/run/state")["step"] == 2
    training.save_state("~/copy", toy_state())
    training.load_state("~/copy", toy_state())
    assert plotting.save(plt.figure(), "~/f") == home / "f.png"
    model = classifier.ConvClassifier((1, 8, 8), stages=((4,),)).folded()
    classifier.save("~/c", model)
    classifier.load("~/c")
    with files.hold("~/held"):
        assert (home / "held" / ".lock").is_file()
    for look in (sweep.read, data.cifar10, data.images, from_diffusers, checkpoints.load_model):
        with pytest.raises(FileNotFoundError, match=re.escape(str(home / "nothing"))):
            look("~/nothing")
        with pytest.raises(TypeError, match=r"(is|is or holds an?) int; wanted"):
            look(3)
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize(("name", "written"), [("figure", "figure.png"), ("a.svg", "a.svg"), ("b.pdf", "b.pdf")])
def test_a_figure_is_saved_under_any_name(tmp_path, name, written):
    content = []
    for _ in range(2):
        figure, ax = plt.subplots()
        ax.plot([0, 1])
        assert plotting.save(figure, tmp_path / name) == tmp_path / written
        content.append((tmp_path / written).read_bytes())
    assert content[0] == content[1]
    assert [path.name for path in tmp_path.iterdir()] == [written]
    with pytest.raises(ValueError, match=r"path=.*a.xyz': wanted a name that ends in one of .*png"):
        plotting.save(figure, tmp_path / "a.xyz")
    plt.close("all")


def test_claims_take_whatever_is_true_or_false(capsys):
    check.claims([("a", "1", torch.tensor(True)), ("b", "2", np.bool_(False)), ("c", "3", "in part")])
    assert [line.split("|")[-1].strip() for line in capsys.readouterr().out.splitlines()] == [
        "holds?", "yes", "no", "in part"]


def test_an_exercise_may_be_solved_with_torch_func():
    def weight(f, r):
        second = torch.func.vmap(torch.func.grad(torch.func.grad(lambda u: f(u).sum())))
        return r**2 * second(r)

    assert check.divergence_weight(weight)


@pytest.mark.parametrize("solver", samplers.SOLVERS)
def test_a_level_whose_square_is_no_number(solver):
    sigmas = torch.tensor([1.0, 1e-20, 0.0])
    with pytest.raises(ValueError, match=r"sigmas holds 1e-20, whose square is beyond torch.float32"):
        samplers.sample(ring(), torch.randn(4, 2, generator=rng()), sigmas, solver)
    samplers.sample(ring(), normal(4, 2), sigmas.double(), "euler")


WRONG = {  # n = 4, (n, 2) wanted
    "broadcast": (lambda x, sigma, label=None: x[:, :1], ValueError, r"returned shape \(4, 1\); wanted \(4, 2\)"),
    "one sample": (lambda x, sigma, label=None: x[:1], ValueError, r"returned shape \(1, 2\); wanted \(4, 2\)"),
    "whole numbers": (lambda x, sigma, label=None: x.long(), TypeError, "returned a tensor of torch.int64"),
    "no tensor": (lambda x, sigma, label=None: 0.0, TypeError, "returned float"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_denoiser_of_another_shape_is_not_broadcast(kind):
    D, error, message = WRONG[kind]
    x, noise, sigmas = normal(4, 2), normal(4, 2, seed=1), samplers.karras_sigmas(3)
    calls = [lambda solver=solver: samplers.sample(D, x, sigmas, solver) for solver in samplers.SOLVERS] + [
        lambda: samplers.langevin(D, x, 1.0, 2, 0.1),
        lambda: samplers.log_likelihood(D, x),
        lambda: denoising_loss(D, x, torch.ones(4), noise),
        lambda: processes.as_denoiser(lambda x, t: D(x, t), processes.vp())(x, 1.0),
        lambda: processes.as_model(D, processes.vp())(x, 0.5),
        lambda: processes.deblend(lambda x, t: D(x, t), x, torch.tensor([0.0, 1.0])),
        lambda: calibrated(D, x, torch.tensor([1.0])),
    ]
    for call in calls:
        with pytest.raises(error, match=message):
            call()
    eight = normal(8, 2)  # the estimates want a few more samples
    for call in (
        lambda: divergences.kl_from_scores(ring(), D, eight, n=8, progress=False),
        lambda: divergences.kl_from_scores(D, ring(), eight, n=8, progress=False),
        lambda: divergences.fisher(D, ring(), eight, torch.tensor([1.0]), progress=False),
        lambda: divergences.entropy_from_scores(D, eight, n=8, progress=False),
    ):
        with pytest.raises(error, match="returned"):
            call()


def test_predictions_are_not_broadcast():
    with pytest.raises(ValueError, match=r"prediction has shape \(4, 1\); wanted \(4, 2\)"):
        convert(normal(4, 1), normal(4, 2), 0.5, 0.5, "eps", "x0")


X, E0 = normal(4, 2), normal(4, 2, seed=1)
NAMED = {
    "the start of a range": (lambda: processes.vp().convert(X, X, 0.0, "x0", "eps"), "sigma is 0"),
    "the end of a range": (lambda: processes.flow().convert(X, X, 1.0, "eps", "x0"), "alpha is 0"),
    "an infinite rate": (lambda: processes.vp().convert(X, X, 0.0, "v", "velocity"), "changes infinitely fast"),
    "an infinite drift": (lambda: processes.flow().drift(torch.tensor([0.5, 1.0])), "t holds 1, where the drift"),
    "an infinite weight": (lambda: processes.flow().loss_weight(torch.tensor([1.0]), "eps"), "t holds 1, where the"),
    "one sample": (lambda: calibrated(ring(), DATA[:1], torch.tensor([1.0])), "data has 1 sample; wanted at least 2"),
    "epsilon = 0": (lambda: categorical.soft_label_plan(X, X, 0.0, 3), "epsilon=0.0: wanted a finite number > 0"),
    "a negative level": (lambda: log_uniform_sigma(3, -1.0, 2.0, rng(), "cpu"), "low=-1.0: wanted a finite number > 0"),
    "an infinite level": (lambda: ring()(DATA, float("inf")), "sigma holds inf"),
    "a weight of nan": (lambda: denoising_loss(ring(), DATA, torch.ones(32), DATA, weight=float("nan")), "weight=nan"),
    "weights of nan": (lambda: denoising_loss(ring(), DATA, torch.ones(32), DATA, weight=torch.full((32,), torch.nan)),
                       "weight holds a NaN"),
    "a level of 0": (lambda: edm_weight(torch.zeros(2), 0.5), "sigma holds a number that is no noise level"),
    "a scale of nan": (lambda: classifier_free(ring(), float("nan")), "scale=nan: wanted a finite number"),
    "a share of nan": (lambda: teachers.aligned_guidance_loss(ring(), DATA, 1.0, DATA, torch.zeros(32).long(),
                                                              float("nan"), ring()), "scale holds a NaN"),
    "std of ring": (lambda: ring(std=-1), "std=-1: wanted a finite number > 0"),
    "std of grid": (lambda: grid(std=float("nan")), "std=nan: wanted"),
    "no channels": (lambda: UNet((1, 8, 8), channels=0), "channels=0: wanted a whole number >= 1"),
    "no layers": (lambda: MLP((2,), hidden=0), "hidden=0: wanted a whole number >= 1"),
    "no columns": (lambda: plotting.image_grid(torch.zeros(2, 1, 4, 4), columns=0), "columns=0: wanted a whole number"),
    "an unknown device": (lambda: train_denoiser(DATA, device="gpu"), "device='gpu': wanted a device that is here"),
    "constant data": (lambda: train_denoiser(torch.ones(4, 2), **SHORT), "data's standard deviation=0.0"),
    "noise below 0": (lambda: two_moons(3, noise=-1), "noise=-1: wanted a finite number >= 0"),
}


@pytest.mark.parametrize("name", NAMED)
def test_errors_name_the_callers_argument(name):
    call, message = NAMED[name]
    with pytest.raises(ValueError, match=message):
        call()


SEED: Any = 0


@pytest.mark.parametrize("call", [
    lambda: ring().sample(3, SEED), lambda: two_moons(3, SEED),
    lambda: transport.sliced_wasserstein(X, X, generator=SEED),
    lambda: samplers.sample(ring(), X, samplers.karras_sigmas(3), "ancestral", generator=np.random.default_rng(0)),
])
def test_generators_of_another_kind_are_named(call):
    with pytest.raises(TypeError, match=r"generator is .*; wanted a torch\.Generator"):
        call()


def test_samples_of_a_model_of_nans_are_refused():
    net = small_denoiser()
    torch.nn.init.constant_(net.network.outward.bias, torch.nan)
    with pytest.raises(FloatingPointError, match="samples are not finite"):
        evaluation.sample_teacher(net, 4, levels=3, progress=False)
    with pytest.raises(FloatingPointError, match="samples are not finite"):
        evaluation.sample_student(Generator(net, 1.0), 4, progress=False)


def test_far_points_have_a_score():
    x = torch.tensor([[1e25, 0.0], [0.0, 0.0]])
    assert ring().score(x)[1].isfinite().all()
    assert ring()(x, 0.5).isfinite().all()


# ---------------------------------------------------------------------------------- notebooks elsewhere

def test_a_missing_record_says_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"results.json: no such file; take figures/sweep from"):
        sweep.read(tmp_path)


def test_notebooks_are_collected_wherever_they_lie(tmp_path):
    folder = tmp_path / "tutorials"
    folder.mkdir()
    for name in ("01_scores_and_mixtures.ipynb", "conftest.py", "nbval.cfg"):
        shutil.copy(ROOT / "tutorials" / name, folder)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tutorials"]
    seen = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "01_scores_and_mixtures.ipynb::Cell" in seen.stdout, seen.stdout + seen.stderr


def test_a_solved_exercise_is_no_difference():
    def clean(text):
        for pattern, replacement in get_sanitize_patterns((ROOT / "tutorials" / "nbval.cfg").read_text()):
            text = re.sub(pattern, replacement, text)
        return text

    assert clean("exercise 2: correct") == clean("exercise 2: not attempted yet") == clean("exercise 2: correct\n")[:-1]
    assert clean("exercise 2: expected 1, got 2") == "exercise 2: expected 1, got 2"
