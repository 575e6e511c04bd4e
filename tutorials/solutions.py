"""Answers to the exercises; a function is named like its exercise and its check."""

import math


# 00_quickstart
def one_call(denoiser, z, sigma):
    """x + (0 - sigma) (x - D) / sigma at x = sigma z is D itself."""
    return denoiser(sigma * z, sigma)


def score_gap(teacher_x0, fake_x0, sigma):
    """Both scores are (D - x) / sigma^2 at the same x, which cancels."""
    return (teacher_x0 - fake_x0) / sigma[:, None] ** 2


# 01_scores_and_mixtures
def mixture_score(x, means, stds, weights):
    """The responsibilities need each component's normaliser s^-d, which equal stds let one forget."""
    offset = means - x[:, None]  # (n, k, d)
    log_joint = weights.log() - x.shape[1] * stds.log() - (offset**2).sum(2) / (2 * stds**2)
    responsibility = (log_joint - x.shape[1] / 2 * math.log(2 * math.pi)).softmax(1)
    return (responsibility[:, :, None] * offset / stds[:, None] ** 2).sum(1)


def tweedie(score, x, sigma):
    """D(x, sigma) = x + sigma^2 score(x)."""
    return x + sigma**2 * score(x)


def langevin_share(start, weight):
    """No walker crosses in any reasonable time, so the start decides and the weight does not matter."""
    return start


# 02_score_matching
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


# 04_processes
def velocity(x, x0, alpha, sigma, d_alpha, d_sigma):
    """d_alpha x0 + d_sigma e, with the noise e that x and x0 imply."""
    return d_alpha * x0 + d_sigma * (x - alpha * x0) / sigma


def uniform_time_density(level):
    """ln level = logit t, so the density is dt / d logit t = t (1 - t) at t = level / (1 + level): the logistic law."""
    return level / (1 + level) ** 2


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
    """The skip lets c_skip sigma_init z through; it is largest, sigma_data / 2, at sigma_init = sigma_data."""
    return sigma_init * sigma_data**2 / (sigma_init**2 + sigma_data**2)


def sid_loss(teacher_x0, fake_x0, x0, alpha):
    """Zhou 2024: (1 - alpha) |D_p - D_q|^2 + (D_p - D_q) . (D_q - x0)."""
    gap = teacher_x0 - fake_x0
    return (gap * ((1 - alpha) * gap + fake_x0 - x0)).flatten(1).sum(1)
