"""Answers to the exercises; a function is named like its exercise and its check.

`PREDICTIONS` answers each notebook's "Predict, change, look". `python solve.py NOTEBOOK COPY`
writes a copy of a notebook with these functions in the place of its stubs.
"""

import itertools
import math

import torch

from minidistill import score_matching as sm
from minidistill.distillation import objectives

PREDICTIONS = {
    "00": """At 2 a noised point says little about where it came from, so that the guesses fill a
        disc inside the ring. At 0.3 all inputs 0.3 z lie near the centre, far from any data: the
        guess is a mean of several modes, on a smaller ring, and heavy modes draw more. The samples
        are on the ring in neither case. A denoiser is right for inputs that have the law of noised
        data, and sigma z does not have it.""",
    "01": """Euler's error falls by 2 with each doubling: it is of first order. Heun's falls by 4,
        second order, for two calls a step; with 10 steps the two are not so far apart, since
        neither is near its limit.""",
    "02": """At 4 there is little to choose: the denoiser is nearly linear there, and easy for all
        three. Between 0.1 and 2, where the modes take shape, the noise of the small levels spoils
        "relative", and its samples are the worst. w = 1 hardly looks at small levels. EDM's weight
        keeps the loss of every level at about 1, and has the best samples.""",
    "02b": """The errors follow the variances of the gradients: the referee, then the mix, the exact
        trace, the slices with variance reduction, LCSS, plain slices. Denoising and target come
        last, each spoiled by one end of the range. Without the levels below 0.1 the target of
        denoising is no longer so noisy: it passes LCSS and plain slices and nearly reaches the
        exact trace (0.28 against 0.26 at levels from 0.1 on, one seed). Target is still last.""",
    "07": """The mode almost gone and the wrong weights: within each mode the student's score is the
        teacher's. At level 0.3 the Fisher divergence is as blind, since the modes do not overlap
        yet. At 5 all modes have melted into one, whose mean and width tell of lost or moved mass,
        while the shape of each mode is no longer seen.""",
    "07b": """E|X - y|^2 is the squared bias plus the variance of X, and E|X - X'|^2 / 2 is that
        variance too. They cancel, so at alpha = 2 only the mean is trained: the samples have some
        shape that nobody asked for, around the ring's centre. At 0.5 and 1.9 the ring is found, at
        1.9 slowly, since nearly all of the spread cancels.""",
    "08": """Two end across both modes: the wide start, and the one in the middle, which widens
        although it is nearer to the right mode than to the left. Reverse KL has a shallow minimum
        there. The other two end on the mode beside which they started, also on the lighter one.
        So where a run ends is the start's choice as much as the divergence's.""",
    "09": """h = r is forward KL, so your student covers both modes, as the package's does. h = 1 is
        reverse KL, which needs no ratio: it settles on the heavier mode. h = 1 / r is Neyman's chi
        squared. It listens most to samples where the teacher has little, in the gap and outside,
        so these leave even faster, and the student sits on a mode as well.""",
    "10": """The slope in the mean is the same for all three, 2 (b - m) / v^2 with the variance v of
        the noised teacher: the student's width is not in it. The slope in the width is negative for
        the narrow student, which is to become wider, zero for the right one and positive for the
        wide one, whatever the mean. At noise 3 all slopes are far smaller.""",
    "11": """10 is the best: 4.6 floors after 300 steps, against 45 with 4 and 9.7 with 100. With 4
        the target itself is wrong: the first step is so long that Heun's method lands far from the
        path. With 100 the target is right, but what is known at the bottom has hardly reached the
        top. After 1,500 steps 10 is at 1.9 floors, 100 at 4.1, and 4 still at 9.6.""",
    "12": """With 0.07 a sample only hears of real samples next to it: it settles on the first mode
        that it meets, with the right shape, and most modes stay empty (12 floors after 400
        steps). With 0.7 all modes are there, joined by threads: nothing is left that tells a
        thread from a mode (1.9). With 2 the cloud has the right mean and about the right
        spread, and no modes at all (5). Three widths together have the best of each (1.6).""",
    "13": """As eta goes to 0 the stand-in becomes the teacher at the same level, and the pull is
        gone: at 0.01 the particles have hardly moved. As eta grows, the teacher at sigma+ sees so
        much noise that it names all of it, the stand-in becomes x0, and ASD becomes SDS: at 5 the
        particles lie inside the ring, at SDS's radius of 1.7. Between the two, at 0.1 and 1, they
        are in narrow clumps at the right places. They began with the teacher's own law, and at no
        eta do they keep it.""",
    "15": """Higher precision, lower recall. Samples where the student alone has mass are pulled
        hardest, so that it gives up everything that the teacher finds doubtful, and rare ways of
        writing a digit with it. The stored runs say 0.93 and 0.79, against SIM's 0.87 and 0.88.
        Its Frechet distance, which counts lost variety, is more than twice that of SIM.""",
}


# 00_quickstart
def one_call(denoiser, z, sigma):
    """x + (0 - sigma) (x - D) / sigma at x = sigma z is D itself."""
    return denoiser(sigma * z, sigma)


def score_gap(teacher_x0, fake_x0, sigma):
    """Both scores are (D - x) / sigma^2 at the same x, which cancels."""
    return (teacher_x0 - fake_x0) / sigma[:, None] ** 2


def distillation_loop(teacher, student, fake, steps, rng):
    """The fake network denoises the student's samples; then these move along the score gap."""
    n, scale = 256, teacher.sigma_data
    student_optimizer = torch.optim.Adam(student.parameters(), 2e-3, betas=(0.0, 0.99))
    fake_optimizer = torch.optim.Adam(fake.parameters(), 5e-3, betas=(0.0, 0.99))
    for _ in range(steps):
        x0 = one_call(student, torch.randn(n, 2, generator=rng), 0.5 * scale)
        for _ in range(3):
            sigma = sm.log_uniform_sigma(n, 0.035 * scale, 5 * scale, rng, "cpu")
            noise = torch.randn(n, 2, generator=rng)
            weight = sm.edm_weight(sigma, scale)
            fake_loss = sm.denoising_loss(fake, x0.detach(), sigma, noise, weight=weight).mean()
            fake_optimizer.zero_grad()
            fake_loss.backward()
            fake_optimizer.step()
        sigma = sm.log_uniform_sigma(n, 0.035 * scale, 5 * scale, rng, "cpu")
        xt = x0 + sigma[:, None] * torch.randn(n, 2, generator=rng)
        with torch.no_grad():
            teacher_x0 = teacher(xt, sigma)
            gap = score_gap(teacher_x0, fake(xt, sigma), sigma)
            size = (x0 - teacher_x0).abs().mean(1, keepdim=True)
            pull = sigma[:, None] ** 2 * gap / size.clamp(min=1e-3)
        student_loss = -(pull * x0).sum(1).mean()
        student_optimizer.zero_grad()
        student_loss.backward()
        student_optimizer.step()
    return student


# 01_scores_and_mixtures
def add_noise(x0, sigma, noise):
    """A column of noise levels, so that each belongs to a sample and not to a coordinate."""
    return x0 + sigma[:, None] * noise


def mixture_score(x, means, stds, weights):
    """Responsibilities need each component's normaliser s^-d, which equal stds let one forget."""
    offset = means - x[:, None]  # (n, k, d)
    log_joint = weights.log() - x.shape[1] * stds.log() - (offset**2).sum(2) / (2 * stds**2)
    responsibility = (log_joint - x.shape[1] / 2 * math.log(2 * math.pi)).softmax(1)
    return (responsibility[:, :, None] * offset / stds[:, None] ** 2).sum(1)


def tweedie(score, x, sigma):
    """D(x, sigma) = x + sigma^2 score(x)."""
    return x + sigma**2 * score(x)


def euler_step(denoiser, x, sigma, after):
    """The slope of the probability flow at x, times the step, which is negative."""
    return x + (after - sigma) * (x - denoiser(x, sigma)) / sigma


def langevin_share(start, weight):
    """No walker crosses in any reasonable time: the start decides, whatever the weight."""
    return start


# 02_score_matching
def denoising_loss(denoiser, x0, sigma, noise):
    """The mean over coordinates, one number a sample."""
    xt = x0 + sigma[:, None] * noise
    return ((denoiser(xt, sigma) - x0) ** 2).mean(1)


def training_loop(loss, optimizer, steps):
    """Gradients add up until they are set to zero."""
    losses = []
    for _ in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def even_weight(sigma, sigma_data):
    """p(x0 | x) is N(x0; 0, sigma_data^2) N(x; x0, sigma^2), up to a constant. Their exponents add,
    and so do one over their variances; that sum is one over the variance of x0 given x."""
    return 1 / sigma**2 + 1 / sigma_data**2


# 02b_more_losses
def stein_trace(field, x, noise, radius):
    """E[e'(s(x + re) - s(x)) / r] is the mean of tr grad s around x."""
    return (noise * (field(x + radius * noise) - field(x))).sum(1) / radius


def best_share(target, denoising, covariance):
    """Where the derivative of k^2 T + (1 - k)^2 D + 2 k (1 - k) C vanishes."""
    return (denoising - covariance) / (target + denoising - 2 * covariance)


# 03_conditional_and_curl_free
def class_gradient(W, probabilities, label):
    """The label's row less the mean row: the gradient of the normaliser."""
    return W[label] - probabilities @ W


def gauge_defect(jacobian, r, score):
    """div(p r) / p = div r + r . grad log p."""
    return jacobian.diagonal(dim1=1, dim2=2).sum(1) + (r * score).sum(1)


PREDICTIONS["03"] = """The gauge field still finds the ring with its weights, at three times its
strength too (1.3 floors with 40 levels, 0.9 with 160): it turns samples along the contours of the
density. The score again does not: samples shrink to points near the centres of the modes."""


# 03b_nonlinear_drift
def step_score(after, before, drift, g, step):
    """The score of N(mean, variance) is (mean - x) / variance."""
    return (before + drift * step - after) / (g**2 * step)


def linear_step(x, drift, slope, g, step):
    """Both are u' = a + b u with u(0) = 0, for u = m - x_s and u = v: u = a (exp(b t) - 1) / b."""
    mean = x + drift * torch.expm1(slope * step) / slope
    variance = g**2 * torch.expm1(2 * slope * step) / (2 * slope)
    return mean, variance


PREDICTIONS["03b"] = """An error of first order halves with the step, one of second order falls
fourfold. From 0.2 down to 0.025 Euler's falls 1.9-, 2.5- and 3.1-fold, the linear step's 2.8-, 3.4-
and 3.7-fold: long steps are beyond the reach of either series. At t = 0.25 hardly anything changes
(0.103 for 0.096, Euler at 0.05): the error belongs to the step, not to the law."""


# 04_processes
def velocity(x, x0, alpha, sigma, d_alpha, d_sigma):
    """d_alpha x0 + d_sigma e, with the noise e that x and x0 imply."""
    return d_alpha * x0 + d_sigma * (x - alpha * x0) / sigma


def uniform_time_density(level):
    """ln level = logit t, so that the density is dt / d logit t = t (1 - t): the logistic law."""
    return level / (1 + level) ** 2


PREDICTIONS["04"] = """With 8 calls down to 0.02 cosine is best (0.08), flow about the same (0.09),
and Karras's clock worst of the three (0.16). Down to 0.2 the order is the same (0.11, 0.12, 0.21).
The distances are larger there, since the last part of the flow pulls neighbours together."""


# 04b_two_sides
def bridge_velocity(x0, x1, z, t):
    """The derivative of gamma = sqrt(t (1 - t)) is (1 - 2 t) / (2 gamma)."""
    return x1 - x0 + (1 - 2 * t) / (2 * (t * (1 - t)) ** 0.5) * z


PREDICTIONS["04b"] = """Less than one would think: with 8 steps 1.4 floors at epsilon = 0, 1.2
at 0.3 and 1.6 at 1. Without noise the errors of all steps add up, and with much noise each step
is a long one: a little noise repairs more than it costs."""


# 05_teachers
def weighted_denoiser(x, data, weights, sigma):
    """Bayes' rule: prior times likelihood; log weights before the softmax are factors after it."""
    distance = (x[:, None] - data).square().sum(2)  # (n, m)
    return (weights.log() - distance / (2 * sigma[:, None] ** 2)).softmax(1) @ data


def aligned_share(scales):
    """The derivative E[2 w (w rho - 1)] vanishes there; one scale alone gives 1 / w."""
    return scales.mean() / (scales**2).mean()


PREDICTIONS["05"] = """With draws = 2 there is one pair, +e and -e: every sample is the midpoint of
two training points, all 100 % of them, and in a quarter of the cases of one point twice, a copy.
Where the two are far apart on the curve the midpoint lies off it. More draws average more points,
so there are fewer copies (1 % with 64 draws) and more different samples; but fresh data are no
nearer to them: what a mean of neighbours cuts off stays cut off."""


PREDICTIONS["05b"] = """Those on the biased data alone and on the exact ratio do not change. All
that learn from the reference get better with its size. With 20 points (two seeds) the total
variation is 0.21 and 0.20 for the reference's own teacher, 0.19 and 0.13 for TIW-DSM, 0.23 and 0.18
for clean weights: TIW-DSM is the best of the three, since the biased data still show where the
modes are. With 1000 points (one seed) all three are at 0.05, and nothing is left to gain from
biased data."""


# 05b_biased_and_guided
def unbiased_loss(denoised, x0, sigma, log_ratio, slope):
    """Weigh each sample by r, and move its target along the gradient of log r."""
    target = x0 + sigma[:, None] ** 2 * slope
    return log_ratio.exp() * (denoised - target).square().mean(1)


# 06_samplers
def heun_solver(denoiser, x, levels):
    """The mean of the slopes at both ends of Euler's step; at level 0 there is none."""
    for sigma, after in itertools.pairwise(levels):
        slope = (x - denoiser(x, sigma)) / sigma
        guess = x + (after - sigma) * slope
        if after > 0:
            second = (guess - denoiser(guess, after)) / after
            guess = x + (after - sigma) * (slope + second) / 2
        x = guess
    return x


def ddim_step(x, x0, sigma, after, eta, z):
    """Part of the noise is drawn anew; its variance and that of what stays add up to after^2."""
    fresh = eta * after * (1 - (after / sigma) ** 2) ** 0.5
    return x0 + (after**2 - fresh**2) ** 0.5 * (x - x0) / sigma + fresh * z


PREDICTIONS["06"] = """With 10 levels no noise is best: 3.4 floors at eta = 0, 3.7 at 0.5, 5.1 at 1.
Fresh noise only adds error to that of long steps. With 100 levels all three are at 1.1 to 1.2
floors, so that the dial does nothing: an exact denoiser makes no errors that noise could repair."""


# 06b_fewer_calls
def gaussian_flow(x, sigma, after, mean, variances, axes):
    """Along a principal axis the flow keeps x - mean in units of the noised standard deviation."""
    stretch = ((variances + after**2) / (variances + sigma**2)) ** 0.5
    return mean + ((x - mean) @ axes * stretch) @ axes.T


PREDICTIONS["06b"] = """On one Gaussian lambda = -2 makes the error 2.4 times smaller, and -1 makes
it 14 times smaller. On the mixture -1 gained 2.6 times and -2 gained 4.1 times. The best lambda
depends on the target (and on the clock), so the paper's search for it is part of the method."""


# 07_divergences
def flipped_weight(weight, r):
    """f°(u) = u f(1/u) has f°''(u) = f''(1/u) / u^3, so h°(u) = u^2 f°''(u) = u h(1/u)."""
    return r * weight(1 / r)


def chi_squared_conjugate(u):
    """The parabola's best r is 1 + u / 2, unless that is negative: then r = 0."""
    r = (1 + u / 2).clamp(min=0)
    return u * r - (r - 1) ** 2


def kl_integrand(p_x0, q_x0, sigma):
    """sigma |s_p - s_q|^2 d sigma = sigma^2 |D_p - D_q|^2 / sigma^4 d ln sigma."""
    return ((p_x0 - q_x0) ** 2).sum(1) / sigma**2


# 07b_from_samples
def energy_loss(first, second, y, alpha):
    """Both draws are pulled to the data, and pushed apart by half as much."""
    to_data = ((first - y).norm(dim=1) ** alpha + (second - y).norm(dim=1) ** alpha) / 2
    return to_data - (first - second).norm(dim=1) ** alpha / 2


# 08_from_divergence_to_gradient
def divergence_weight(f, r):
    """r^2 f''(r), with the first derivative kept differentiable."""
    r = r.detach().requires_grad_(True)
    slope = torch.autograd.grad(f(r).sum(), r, create_graph=True)[0]
    return r.detach() ** 2 * torch.autograd.grad(slope.sum(), r)[0]


def reverse_kl_gradient(score_p, mean, std, z):
    """h = 1, and dx / d(mean, std) = (1, z)."""
    gap = -z / std - score_p(mean + std * z)
    return torch.stack([gap.mean(), (gap * z).mean()])


def best_cover(means, stds, weights):
    """The moments of the mixture: variances within the modes plus that of the modes' means."""
    mean = (weights * means).sum()
    return torch.stack([mean, (weights * (stds**2 + (means - mean) ** 2)).sum().sqrt()])


# 09_distribution_matching
def dmd_gradient(x0, teacher_x0, fake_x0):
    """The difference of the denoisers, over how far the teacher would move each sample."""
    return (fake_x0 - teacher_x0) / (x0 - teacher_x0).abs().mean(1, keepdim=True)


class OwnObjective:
    """The ratio and the direction are constants; autograd sees x0 alone."""

    needs_ratio = True

    def __init__(self, weight):
        self.weight = weight

    def critic_loss(self, batch):
        return objectives.fake_loss(batch) + objectives.ratio_loss(batch)

    def generator_loss(self, batch):
        with torch.no_grad():
            teacher_x0 = batch.teacher(batch.xt, batch.sigma)
            fake_x0 = batch.fake(batch.xt, batch.sigma)
            h = self.weight(batch.ratio(batch.xt, batch.sigma).clamp(-5, 5).exp())
            gradient = h[:, None] * dmd_gradient(batch.x0, teacher_x0, fake_x0)
        return (gradient * batch.x0).sum(1)


def mixture_denoiser(teacher_x0, fake_x0, log_ratio, alpha):
    """E[x0 | x] is the mean of both, by the probability rho that x came from the teacher."""
    rho = torch.sigmoid(log_ratio + math.log(alpha / (1 - alpha)))[:, None]
    return rho * teacher_x0 + (1 - rho) * fake_x0


# 10_score_implicit_matching
def pseudo_huber_slope(y, c):
    """The length is that of a whole row, so that d' points along y."""
    return y / (y.square().sum(1, keepdim=True) + c**2).sqrt()


def implicit_loss(x0, teacher_x0, fake_x0, value, slope, alpha):
    """The law part, and the field part as a derivative through the samples."""
    y = fake_x0 - teacher_x0
    return 2 * (1 - alpha) * value(y) - (slope(y) * (fake_x0 - x0)).sum(1)


def gaussian_fisher(mean_p, std_p, mean_q, std_q, sigma):
    """s_p - s_q = (1/q - 1/p) (x - mean_q) + (mean_p - mean_q) / p, noised variances p and q."""
    p, q = std_p**2 + sigma**2, std_q**2 + sigma**2
    return q * (1 / q - 1 / p) ** 2 + ((mean_p - mean_q) / p) ** 2


# 11_trajectories
def consistency_loss(student, x, below, upper, lower, lowest):
    """The answer below is held fixed; where the path ends it is the point itself."""
    with torch.no_grad():
        answer = torch.where((lower == lowest)[:, None], below, student(below, lower))
    return (student(x, upper) - answer).square().sum(1)


def gamma_step(jump, x, sigma, after, gamma, z):
    """The jump's level and the new noise add up to `after` in their squares."""
    return jump(x, sigma, (1 - gamma**2) ** 0.5 * after) + gamma * after * z


def mean_flow_target(u, z, r, t, v):
    """One forward derivative: the point moves with velocity v, r stays, t moves."""
    tangents = (v, torch.zeros_like(r), torch.ones_like(t))
    rate = torch.func.jvp(u, (z, r, t), tangents)[1]
    return v - (t - r)[:, None] * rate


# 12_without_a_teacher_score
def drift(x, real, width):
    """Softmax makes Gaussian weights that sum to 1; an infinite distance makes a weight of 0."""
    to_real = torch.cdist(x, real) ** 2
    to_own = (torch.cdist(x, x) ** 2).fill_diagonal_(torch.inf)
    pull = (-to_real / (2 * width**2)).softmax(1) @ real
    push = (-to_own / (2 * width**2)).softmax(1) @ x
    return pull - push


def energy_pull(x, real):
    """Ways (n, m, d) over their lengths; the way to oneself has length 0 and adds nothing."""
    to_real = real[None] - x[:, None]
    to_own = x[None] - x[:, None]
    pull = (to_real / to_real.norm(dim=2, keepdim=True)).mean(1)
    lengths = to_own.norm(dim=2, keepdim=True)
    push = (to_own / lengths.clamp(min=1e-12)).sum(1) / (len(x) - 1)
    return pull - push


def ratio_pull(log_ratio, x, weight):
    """One gradient of the sum: each sample's log r depends on that sample alone."""
    x = x.detach().requires_grad_()
    log_r = log_ratio(x)
    slope = torch.autograd.grad(log_r.sum(), x)[0]
    return weight(log_r.detach().exp())[:, None] * slope


# 13_paths_and_forgetting
def stage_at(progress, stages, share):
    """s_{N-1} to s_1 divide the way among them; then the teacher."""
    if progress >= share:
        return 0
    targets = stages - 1
    return targets - int(progress / share * targets)


def asd_stand_in(teacher, x0, sigma, noise, later):
    """The noise that the teacher sees at the higher level comes off x_t."""
    x = x0 + later[:, None] * noise
    seen = (x - teacher(x, later)) / later[:, None]
    return x0 + sigma[:, None] * (noise - seen)


def forgetting_teacher(teacher, x, sigma, label, forget, safe):
    """Who asks for the forgotten class is answered for the safe one."""
    return teacher(x, sigma, torch.where(label == forget, safe, label))


def cut(pull, most):
    """A factor for each row, at most 1."""
    length = pull.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return pull * (most / length).clamp(max=1)


# 15_digits
def normalised_ratio(ratio, level):
    """E_q[p / q] = 1 at every noise level, so that each level has its own mean."""
    result = ratio.clone()
    for one in level.unique():
        result[level == one] /= ratio[level == one].mean()
    return result


def sim_gradient(y, residual, J_p, J_q):
    """DMD's 2 y, the fake network's answer to a moving x0, and the change of y itself."""
    return 2 * y - 2 * y @ J_q - 2 * residual @ (J_q - J_p)


# 16_cifar10_teacher
def c_out(c_skip, sigma, sigma_data):
    """x0 - c_skip x = (1 - c_skip) x0 - c_skip sigma e, two independent parts."""
    return ((1 - c_skip) ** 2 * sigma_data**2 + c_skip**2 * sigma**2) ** 0.5


def ema_decay(halflife, batch_size):
    """One step sees batch_size images, a fraction batch_size / halflife of a halving."""
    return 0.5 ** (batch_size / halflife)


def mirror(images, coins):
    """The last axis is the width."""
    return coins[:, None, None, None] * images.flip(-1) + ~coins[:, None, None, None] * images


# 17_cifar10_one_step
def noise_through(sigma_init, sigma_data):
    """The skip lets c_skip sigma_init z through, most of it at sigma_init = sigma_data."""
    return sigma_init * sigma_data**2 / (sigma_init**2 + sigma_data**2)


def sid_loss(teacher_x0, fake_x0, x0, alpha):
    """Zhou 2024: (1 - alpha) |D_p - D_q|^2 + (D_p - D_q) . (D_q - x0)."""
    gap = teacher_x0 - fake_x0
    return (gap * ((1 - alpha) * gap + fake_x0 - x0)).flatten(1).sum(1)
