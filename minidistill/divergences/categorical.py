"""Distilling categorical distributions: classifiers' soft labels, policies, preferences, rankings.

The convention of `divergences` holds here too: p is the teacher (target, reference), q or pi the student, r = p / q
and D_f(p || q) = E_q f(p/q). Papers on policies write u = pi / p = 1 / r in its place, E_p f°(pi/p); their f° is
`FDivergence.flipped()`, f°(u) = u f(1/u), and the flip happens inside the functions below, never in the caller. So
"forward_kl" is KL(teacher || student) everywhere and "reverse_kl" KL(student || teacher).

Logits come in, nats and one loss a sample, (n,), come out. Nothing is detached unless a docstring says so: compute the
teacher's logits without gradient. In float32 ratios of e^{+-80} stay finite; rows that square them (pearson, neyman,
alpha outside [0, 1]) overflow to infinity beyond.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from minidistill import _validate
from minidistill.divergences.f_divergences import F, FDivergence

__all__ = [
    "balance_weights", "balanced_kl", "f_dpg_surrogate", "f_dpo_loss", "gradient_cosine", "log_partition",
    "logit_distillation", "logitwise_distillation", "margin_mse", "sinkhorn_distillation", "soft_label_plan",
]

# ------------------------------------------------- soft labels: logits (n, k) of student and teacher

def logit_distillation(
    logits_student: Tensor, logits_teacher: Tensor, divergence: str | FDivergence = "forward_kl",
    temperature: float = 1.0, *, times_t_squared: bool = True,
) -> Tensor:
    """T^2 D_f(softmax(teacher / T) || softmax(student / T)), (n,), for logits (n, k).

    `divergence` is a name in `divergences.F` or any FDivergence; "forward_kl" is classical distillation (Hinton 2015).
    The factor T^2 keeps the gradient's size as T grows; `times_t_squared=False` leaves the divergence itself, in nats.
    """
    _logits(logits_student, logits_teacher)
    _validate.positive("temperature", temperature)
    value = _row(divergence).categorical(logits_teacher / temperature, logits_student / temperature)
    return temperature**2 * value if times_t_squared else value


def logitwise_distillation(
    logits_student: Tensor, logits_teacher: Tensor, divergence: str | FDivergence = "forward_kl",
    temperature: float = 1.0, *, times_t_squared: bool = True,
) -> Tensor:
    """Sum over classes of D_f between Bernoulli(sigmoid(logit / T)), times T^2, (n,): distillation at the logit level.

    Unlike softmax it sees a constant added to all logits. It is the loss of dual-head distillation's second head
    (Yang 2024, DHKD, up to its form of the binary KL): this gradient may oppose cross-entropy's in a shared head.
    """
    _logits(logits_student, logits_teacher)
    pairs = (torch.stack([l, torch.zeros_like(l)], -1).flatten(0, 1) for l in (logits_student, logits_teacher))
    student, teacher = pairs  # (n k, 2): a softmax over (l, 0) is sigmoid(l)
    value = logit_distillation(student, teacher, divergence, temperature, times_t_squared=times_t_squared)
    return value.reshape(logits_student.shape).sum(1)


def balance_weights(logits_student: Tensor, logits_teacher: Tensor, favour: float = 0.75) -> Tensor:
    """The weight (n,) of forward KL in `balanced_kl`, without gradient: `favour` where the student's entropy is below
    the teacher's (over-confident: forward KL spreads it), 1 - favour where it is above, 1/2 where they are equal."""
    _logits(logits_student, logits_teacher)
    favour = _validate.number("favour", favour, 0.5, 1)
    gap = _entropy(logits_teacher.detach()) - _entropy(logits_student.detach())
    return 0.5 + (favour - 0.5) * gap.sign()


def balanced_kl(
    logits_student: Tensor, logits_teacher: Tensor, favour: float = 0.75, temperature: float = 1.0
) -> Tensor:
    """T^2 [w KL(teacher || student) + (1 - w) KL(student || teacher)], (n,), w per sample from the entropy gap.

    After BD-KD (Amara 2022), which weighs the two per sample by that gap; the values and the side to favour are our
    choice (`balance_weights`). favour = 1/2 is half of Jeffreys. Entropies are compared at the same temperature.
    """
    _validate.positive("temperature", temperature)
    w = balance_weights(logits_student / temperature, logits_teacher / temperature, favour)
    forward = logit_distillation(logits_student, logits_teacher, "forward_kl", temperature)
    return w * forward + (1 - w) * logit_distillation(logits_student, logits_teacher, "reverse_kl", temperature)


def sinkhorn_distillation(
    logits_student: Tensor, logits_teacher: Tensor, temperature: float = 2.0, epsilon: float = 0.1,
    iterations: int = 20, *, debiased: bool = False,
) -> Tensor:
    """n sum_j P_ij C_ij, (n,), C_ij = |softmax(student_i / T) - softmax(teacher_j / T)|_1 (Cui 2024, SinKD).

    Its mean is <P, C>, in [0, 2], with P the entropic transport plan of strength epsilon over the batch and marginals
    1/n (SinKD's are 1, so that its loss grows with the batch). The gradient runs through the iterations; no factor T^2.
    `debiased` gives OT(s, t) - OT(s, s) / 2 - OT(t, t) / 2 with the entropy in OT: zero for equal batches.
    The batches are compared as sets: which sample has which label is not seen, so add a pairwise loss.
    """
    _logits(logits_student, logits_teacher)
    _validate.positive("temperature", temperature)
    _validate.positive("epsilon", epsilon)
    _validate.whole("iterations", iterations)
    logits_student, logits_teacher = _validate.precise(logits_student, logits_teacher)
    s, t = (logits_student / temperature).softmax(-1), (logits_teacher / temperature).softmax(-1)
    if not debiased:
        return _transport(s, t, epsilon, iterations, 0.0)
    cross, own_s, own_t = (_transport(a, b, epsilon, iterations, epsilon) for a, b in ((s, t), (s, s), (t, t)))
    return cross - own_s / 2 - own_t / 2


def soft_label_plan(s: Tensor, t: Tensor, epsilon: float, iterations: int) -> tuple[Tensor, Tensor]:
    """The L1 cost and the log of the entropic plan, both (n, m), between rows of s (n, k) and t (m, k) of equal mass.

    Sinkhorn in the log domain, float32 at least: columns sum to 1/m exactly, rows to 1/n as closely as the iterations
    are many."""
    epsilon, iterations = _validate.positive("epsilon", epsilon), _validate.whole("iterations", iterations)
    s, t = _validate.pair(s, t, names=("s", "t"))
    cost = torch.cdist(s, t, p=1)
    log_k = -cost / epsilon
    log_v = log_k.new_zeros(len(t))
    for _ in range(iterations):
        log_u = -math.log(len(s)) - (log_k + log_v).logsumexp(1)
        log_v = -math.log(len(t)) - (log_k + log_u[:, None]).logsumexp(0)
    return cost, log_u[:, None] + log_k + log_v


def _transport(s: Tensor, t: Tensor, epsilon: float, iterations: int, entropy: float) -> Tensor:
    """n sum_j P_ij (C_ij + entropy log P_ij), (n,): KL(P | a b') up to a constant, which cancels when debiased."""
    cost, log_plan = soft_label_plan(s, t, epsilon, iterations)
    return len(s) * (log_plan.exp() * (cost + entropy * log_plan)).sum(1)


# ------------------------------------------------- policies: log-probabilities (n,) of sampled x

def log_partition(log_pi: Tensor, log_p: Tensor) -> Tensor:
    """log Z estimated from n samples of pi, a scalar without gradient: Z = E_pi[p / pi] for unnormalised p.

    log_pi, log_p (n,). The estimate of Z is unbiased; its logarithm and 1 / Z are off by O(1 / n)."""
    _same(log_pi=log_pi, log_p=log_p)
    return ((log_p - log_pi).logsumexp(0) - math.log(len(log_p))).detach()


def f_dpg_surrogate(
    log_pi: Tensor, log_p: Tensor, divergence: str | FDivergence = "reverse_kl", *,
    log_z: float | Tensor | None = 0.0, baseline: float | Tensor | str = 0.0,
) -> Tensor:
    """(f°'(pi/p) - baseline) log pi at samples x ~ pi, (n,), coefficient without gradient (Go 2023, f-DPG).

    Its gradient is the score-function estimate of that of D_f(p || pi) = E_p f°(pi/p), f° = flipped f; its value means
    nothing. "reverse_kl", KL(pi || p), is RLHF with p = reference exp(reward / beta) / Z; "forward_kl" is GDC / DPG.
    log_pi, log_p (n,), unnormalised by `log_z`: p / Z is meant, and None takes Z from these samples (`log_partition`).
    baseline: a number, (n,) numbers independent of x_i, or "leave_one_out", the mean coefficient of the other samples.
    """
    _same(log_pi=log_pi, log_p=log_p)
    if isinstance(baseline, str) and baseline != "leave_one_out":
        raise ValueError(_validate.closest("baseline", baseline, ["leave_one_out"]))
    if isinstance(baseline, str) and len(log_pi) < 2:
        raise ValueError("baseline='leave_one_out' with 1 sample; wanted at least 2")
    with torch.no_grad():
        log_p = log_p - (log_partition(log_pi, log_p) if log_z is None else log_z)
        coefficient = _row(divergence).flipped().slope(log_pi - log_p)
        if isinstance(baseline, str):
            baseline = (coefficient.sum() - coefficient) / (len(coefficient) - 1)
    return (coefficient - baseline) * log_pi


def f_dpo_loss(
    log_pi_w: Tensor, log_pi_l: Tensor, log_ref_w: Tensor, log_ref_l: Tensor,
    divergence: str | FDivergence = "reverse_kl", beta: float = 0.1,
) -> Tensor:
    """-log sigmoid(beta [f°'(pi_w / ref_w) - f°'(pi_l / ref_l)]), (n,), w preferred to l (Wang 2023, f-DPO).

    The best policy for reward - beta D_f(ref || pi) has reward = beta f°'(pi / ref) + constant, f° = flipped f.
    "reverse_kl", f°' = log u + 1, is DPO; "forward_kl" -1/u; alpha_divergence(a) (1 - u^-a) / a. Ours of
    "jensen_shannon" is log(2u / (1 + u)) / 2, half the paper's: double beta for theirs. neyman, le_cam and negative a
    have a finite f°'(0), so a poor answer's best probability may be 0, where the loss does not reach the optimum.
    """
    _same(log_pi_w=log_pi_w, log_pi_l=log_pi_l, log_ref_w=log_ref_w, log_ref_l=log_ref_l)
    _validate.positive("beta", beta)
    link = _row(divergence).flipped().slope
    return -logsigmoid(beta * (link(log_pi_w - log_ref_w) - link(log_pi_l - log_ref_l)))


# ------------------------------------------------- rankings, and two losses at odds

def margin_mse(student_pos: Tensor, student_neg: Tensor, teacher_pos: Tensor, teacher_neg: Tensor) -> Tensor:
    """((student_pos - student_neg) - (teacher_pos - teacher_neg))^2, (n,), for scores (n,) (Hofstaetter 2020).

    Margins are matched, not scores: a constant added to all of a query's teacher scores changes nothing."""
    _same(student_pos=student_pos, student_neg=student_neg, teacher_pos=teacher_pos, teacher_neg=teacher_neg)
    return (student_pos - student_neg - teacher_pos + teacher_neg).square()


def gradient_cosine(loss_a: Tensor, loss_b: Tensor, parameters: Sequence[Tensor]) -> float:
    """Cosine between the gradients of two scalar losses with respect to the same parameters: negative where they
    conflict, as Yang 2024 (DHKD) finds for cross-entropy and logit-level distillation in a shared head."""
    a, b = (
        torch.cat([g.flatten() for g in torch.autograd.grad(
            loss, list(parameters), retain_graph=True, materialize_grads=True)])
        for loss in (loss_a, loss_b)
    )
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def _row(divergence: str | FDivergence) -> FDivergence:
    return divergence if isinstance(divergence, FDivergence) else _validate.choose("divergence", divergence, F)


def _entropy(logits: Tensor) -> Tensor:
    """In nats, (..., k) -> (...)."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def _logits(student: Tensor, teacher: Tensor) -> None:
    for name, logits in (("logits_student", student), ("logits_teacher", teacher)):
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            kind = f"a tensor of {logits.dtype}" if isinstance(logits, Tensor) else type(logits).__name__
            raise TypeError(f"{name} is {kind}; wanted a floating point tensor of shape (n, k)")
        if logits.ndim != 2 or logits.shape[1] < 2 or logits.shape != student.shape:
            wanted = "(n, k), k >= 2" if logits is student or student.ndim != 2 else f"{tuple(student.shape)}"
            raise ValueError(f"{name} has shape {tuple(logits.shape)}; wanted {wanted}")
        if logits.device.type == "cpu":  # an accelerator would have to be waited for
            _validate.finite(name, logits)


def _same(**tensors: Tensor) -> None:
    """Raise unless all are floating tensors of one shape (n,)."""
    n = len(next(iter(tensors.values())))
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.shape != (n,):
            what = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} is {what}; wanted a floating point tensor of shape ({n},), one entry a sample")
