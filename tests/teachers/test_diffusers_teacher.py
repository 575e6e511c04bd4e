"""A diffusers model as a teacher: its D is the scheduler's own predicted x0, at every time of every kind of table."""

import json

import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers")

from minidistill import samplers  # noqa: E402
from minidistill.teachers.diffusers_teacher import DiffusersDenoiser, from_diffusers  # noqa: E402


def unet(seed=0, side=8, **options):
    """A UNet2DModel of a few thousand weights, none of them zero."""
    torch.manual_seed(seed)
    options = {"in_channels": 2, "out_channels": 2, **options}
    model = diffusers.UNet2DModel(
        side, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        layers_per_block=1, norm_num_groups=4, attention_head_dim=8, **options,
    )
    return model.eval()


def ddpm(prediction="epsilon", schedule="linear", clip=False, steps=1000, **options):
    return diffusers.DDPMScheduler(
        num_train_timesteps=steps, beta_schedule=schedule, prediction_type=prediction, clip_sample=clip, **options
    )


def noised(n=1, seed=1, shape=(2, 8, 8)):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def edm(scheduler, x, t):
    """(x, sigma) in EDM coordinates of the model's own x at times t, in float64."""
    abar = scheduler.alphas_cumprod[t].double().reshape(-1, 1, 1, 1)
    return x.double() / abar.sqrt(), ((1 - abar) / abar).sqrt().flatten()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_denoiser_is_the_schedulers_predicted_x0_at_every_time(prediction, schedule, clip):
    """Within 1e-5 of the scale max(1, sigma), x and sigma both given in float32; the reference is computed one time
    after the other, ours for all of them in one batch."""
    model, scheduler = unet(), ddpm(prediction, schedule, clip)
    denoiser = from_diffusers(model, scheduler=scheduler, clip=clip)
    times = torch.arange(1000)
    x = noised(1000)
    with torch.no_grad():
        answers = model(x, times).sample
        wanted = torch.cat([
            scheduler.step(answers[t : t + 1], t, x[t : t + 1]).pred_original_sample for t in range(1000)
        ])
        inside, sigma = edm(scheduler, x, times)
        out = denoiser(inside.float(), sigma.float())
    assert torch.equal(denoiser.time(sigma.float()), times.double())
    error = (out - wanted).abs().amax((1, 2, 3)) / sigma.clamp(min=1)
    assert float(error.max()) < 1e-5
    if clip:
        assert float(out.abs().max()) <= 1


@pytest.mark.parametrize("t", [0, 1, 500, 998, 999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_float_is_that_level_for_every_sample(t, dtype):
    model, scheduler = unet(), ddpm()
    denoiser = from_diffusers(model, scheduler=scheduler)
    x, sigma = edm(scheduler, noised(3), torch.tensor([t] * 3))
    x = x.to(dtype)
    with torch.no_grad():
        each = denoiser(x, sigma.to(dtype))
        for level in (float(sigma[0]), sigma[0].to(dtype)):
            torch.testing.assert_close(denoiser(x, level), each, rtol=1e-5, atol=1e-4)
    assert each.dtype == dtype


def test_time_is_linear_in_log_sigma_between_entries_and_stays_inside_the_table():
    denoiser = from_diffusers(unet(), scheduler=ddpm())
    table = denoiser.sigmas
    middle = (table[:-1] * table[1:]).sqrt()
    torch.testing.assert_close(denoiser.time(middle), torch.arange(999) + 0.5, check_dtype=False)
    outside = torch.tensor([1e-9, denoiser.sigma_min / 2, denoiser.sigma_max * 2, 1e9])
    assert denoiser.time(outside).tolist() == [0, 0, 999, 999]
    fine = denoiser.time(torch.logspace(-3, 3, 5000))
    assert bool((fine.diff() >= 0).all())


def test_outside_the_table_x_is_scaled_by_its_true_sigma():
    model = unet()
    denoiser = from_diffusers(model)
    x = noised(2)
    with torch.no_grad():
        for sigma, t in ((1e-3, 0), (500.0, 999)):
            inside = x / (1 + sigma**2) ** 0.5
            eps = model(inside, torch.full((2,), t)).sample
            torch.testing.assert_close(denoiser(x, sigma), x - sigma * eps, rtol=1e-4, atol=1e-4 * max(1, sigma))


def test_attributes():
    denoiser = from_diffusers(unet(side=(8, 4)))
    assert denoiser.shape == (2, 8, 4)
    assert (denoiser.n_classes, denoiser.sigma_data, denoiser.training) == (0, 0.5, False)
    assert from_diffusers(unet(), sigma_data=0.7).sigma_data == 0.7
    abar = ddpm().alphas_cumprod.double()
    torch.testing.assert_close(denoiser.sigmas, ((1 - abar) / abar).sqrt())
    assert denoiser.sigma_min == pytest.approx(0.01, rel=1e-3)
    assert denoiser.sigma_max == pytest.approx(157.4, rel=1e-3)
    assert all(key.startswith("unet.") for key in denoiser.state_dict())


def test_classes_reach_the_model():
    model, scheduler = unet(num_class_embeds=3), ddpm()
    denoiser = from_diffusers(model, scheduler=scheduler)
    assert denoiser.n_classes == 3
    x, label, t = noised(3), torch.tensor([2, 0, 1]), torch.tensor([10, 400, 900])
    with torch.no_grad():
        inside, sigma = edm(scheduler, x, t)
        out = denoiser(inside.float(), sigma.float(), label)
        eps = model(x, t, class_labels=label).sample
        torch.testing.assert_close(
            out, (inside - sigma.reshape(-1, 1, 1, 1) * eps).float(), rtol=1e-4, atol=1e-4 * float(sigma.max())
        )
        assert not torch.equal(out, denoiser(inside.float(), sigma.float(), (label + 1) % 3))


def test_learned_variance_is_dropped_and_learned_times_are_whole():
    both = unet(out_channels=4)
    x = noised(2)
    with torch.no_grad():
        eps = both(x / 2**0.5, from_diffusers(both).time(torch.ones(2)).float()).sample[:, :2]
        torch.testing.assert_close(from_diffusers(both)(x, 1.0), x - eps, rtol=1e-4, atol=1e-4)
        learned = unet(time_embedding_type="learned", num_train_timesteps=1000)
        assert from_diffusers(learned)(x, 1.234).shape == x.shape


def test_an_infinite_last_sigma_is_left_out():
    scheduler = ddpm("v_prediction", rescale_betas_zero_snr=True)
    assert scheduler.alphas_cumprod[-1] == 0
    denoiser = from_diffusers(unet(), scheduler=scheduler)
    assert len(denoiser.sigmas) == 999
    with torch.no_grad():
        out = denoiser(denoiser.sigma_max * noised(2), denoiser.sigma_max)
    assert bool(torch.isfinite(denoiser.sigmas).all() and torch.isfinite(out).all())


def test_gradients_reach_x_and_the_weights():
    """The gradient through x agrees with a difference quotient, in float64."""
    model = unet().double()
    denoiser = from_diffusers(model)
    x, direction = noised(2).double(), noised(2, seed=2).double()
    x.requires_grad_(True)
    sigma = torch.tensor([0.3, 4.0], dtype=torch.float64)
    denoiser(x, sigma).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        up, down = (denoiser(x + h * direction, sigma).square().sum() for h in (1e-5, -1e-5))
    torch.testing.assert_close((x.grad * direction).sum(), (up - down) / 2e-5, rtol=1e-5, atol=1e-6)


def test_model_pipeline_and_folders_agree(tmp_path):
    model, scheduler = unet(), ddpm("v_prediction", "scaled_linear")
    pipeline = diffusers.DDPMPipeline(model, scheduler)
    pipeline.save_pretrained(tmp_path / "pipeline")
    model.save_pretrained(tmp_path / "model")
    scheduler.save_pretrained(tmp_path / "scheduler")
    ddim = diffusers.DDIMScheduler.from_config(scheduler.config)
    diffusers.DDIMPipeline(model, ddim).save_pretrained(tmp_path / "ddim")
    root = tmp_path / "root"  # as some older repositories of the hub are: no folders
    model.save_pretrained(root)
    scheduler.save_pretrained(root)
    (root / "model_index.json").write_text((tmp_path / "pipeline" / "model_index.json").read_text())
    teachers = [
        from_diffusers(model, scheduler=scheduler),
        from_diffusers(pipeline),
        from_diffusers(tmp_path / "pipeline"),
        from_diffusers(str(tmp_path / "pipeline")),
        from_diffusers(tmp_path / "ddim"),
        from_diffusers(root),
        from_diffusers(tmp_path / "model", scheduler=scheduler),
        from_diffusers(tmp_path / "model", scheduler=tmp_path / "scheduler"),
        from_diffusers(tmp_path / "model", scheduler=str(tmp_path / "pipeline" / "scheduler")),
    ]
    x, sigma = noised(3), torch.tensor([0.05, 1.3, 11.0])
    with torch.no_grad():
        outs = [teacher(x, sigma) for teacher in teachers]
        assert all(torch.equal(out, outs[0]) for out in outs)
        assert not torch.equal(from_diffusers(tmp_path / "model")(x, sigma), outs[0])  # the default: linear, epsilon


@pytest.mark.parametrize("classes", [None, 3])
def test_a_sampler_and_its_clipped_answers(classes):
    denoiser = from_diffusers(unet(num_class_embeds=classes), clip=True)
    sigmas = samplers.karras_sigmas(4, denoiser.sigma_min, denoiser.sigma_max)
    label = None if classes is None else torch.tensor([0, 2])
    out = samplers.heun(denoiser, denoiser.sigma_max * noised(2), sigmas, label=label)
    assert out.shape == (2, 2, 8, 8)
    assert float(out.abs().max()) <= 1


TABLE = torch.linspace(0.99, 0.01, 10)
X = torch.zeros(3, 2, 8, 8)


@pytest.mark.parametrize(("error", "call", "message"), [
    (ValueError, lambda: from_diffusers(unet())(X[:, :1], 1.0), r"x has shape \(3, 1, 8, 8\); wanted \(n, 2, 8, 8\)"),
    (ValueError, lambda: from_diffusers(unet())(X, 0.0), "sigma holds 0; wanted noise levels > 0"),
    (ValueError, lambda: from_diffusers(unet())(X, 1.0, torch.zeros(3).long()), "label: this model has 0 classes"),
    (ValueError, lambda: from_diffusers(unet(num_class_embeds=3))(X, 1.0), "label: this model has 3 classes; wanted a"),
    (ValueError, lambda: DiffusersDenoiser(unet(), TABLE, "eps"), "prediction='eps' is not known.*epsilon"),
    (ValueError, lambda: DiffusersDenoiser(unet(), TABLE.flip(0)), "alphas_cumprod: wanted"),
    (ValueError, lambda: DiffusersDenoiser(unet(), TABLE[:1]), "alphas_cumprod: wanted"),
    (ValueError, lambda: DiffusersDenoiser(unet(), TABLE, sigma_data=-1.0), "sigma_data=-1.0"),
    (ValueError, lambda: from_diffusers(unet(side=None)), "sample_size is None"),
    (ValueError, lambda: from_diffusers(unet(out_channels=3)), "3 channels out, 2 in"),
    (ValueError, lambda: from_diffusers(unet(time_embedding_type="fourier")), "time_embedding_type='fourier'"),
    (ValueError, lambda: from_diffusers(unet(class_embed_type="timestep")), "class_embed_type='timestep'"),
    (ValueError, lambda: from_diffusers(unet(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler()),
     "scheduler is a FlowMatchEulerDiscreteScheduler; wanted one with alphas_cumprod"),
    (ValueError, lambda: from_diffusers(unet(), revision="main"), "revision='main': wanted only with a path"),
    (ValueError, lambda: from_diffusers(unet(), cache_dir="a"), "cache_dir='a': wanted only with a path"),
    (TypeError, lambda: from_diffusers(nn.Linear(2, 2)), "holds a Linear; wanted a UNet2DModel"),
    (FileNotFoundError, lambda: from_diffusers("/no/such/folder"), "/no/such/folder: no such folder"),
    (FileNotFoundError, lambda: from_diffusers(unet(), scheduler="nowhere"), "scheduler='nowhere': no folder"),
])
def test_bad_arguments_are_named(error, call, message):
    with pytest.raises(error, match=message):
        call()


def test_nothing_is_unpickled(tmp_path):
    unet().save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(FileNotFoundError, match=r"holds diffusion_pytorch_model.bin; wanted .safetensors"):
        from_diffusers(tmp_path)
    with pytest.raises(ValueError, match="use_safetensors=False: wanted True"):
        from_diffusers(tmp_path, use_safetensors=False)
    with pytest.raises(ValueError, match=r"revision='main': .* is a folder"):
        from_diffusers(tmp_path, revision="main")
    (tmp_path / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        from_diffusers(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "UNet2DModel"
