"""The arithmetic of PPO as pure functions on padded batches: losses, KL, advantages, whitening.

Tensors have shape (rows, tokens), the tokens of completions; `mask` is 1.0 on tokens that the
policy sampled, else 0.0.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]


def clipped_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    epsilon_low: float,
    epsilon_high: float,
    max_ratio: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the clipped surrogate loss per token, and where it is clipped: below 1, and above.

    With the ratio r = pi(token) / pi_old(token), the loss is
    -min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A) (Schulman et al. 2017, eq. 7): a token
    whose probability has moved far in the direction of its advantage gets no gradient. `max_ratio`
    bounds r itself, which limits the loss of tokens with a negative advantage too.
    """
    ratio = torch.exp(log_probs - old_log_probs)
    clipped_ratio = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    if max_ratio is not None:
        ratio = ratio.clamp(max=max_ratio)
    loss = -torch.minimum(ratio * advantages, clipped_ratio * advantages)
    is_clipped_low = (ratio < 1 - epsilon_low) & (advantages < 0)
    is_clipped_high = (ratio > 1 + epsilon_high) & (advantages > 0)
    return loss * mask, is_clipped_low * mask, is_clipped_high * mask


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange: float | None
) -> tuple[Tensor, Tensor]:
    """Return half the squared error per token, and where it is clipped.

    With a `cliprange`, the error is the larger one of the new value and of the new value kept
    within `cliprange` of the old one: a value that has moved far towards its return gets no
    gradient.
    """
    error = 0.5 * (values - returns).square()
    if cliprange is None:
        return error * mask, torch.zeros_like(error)
    clipped_values = old_values + (values - old_values).clamp(-cliprange, cliprange)
    clipped_error = 0.5 * (clipped_values - returns).square()
    return torch.maximum(error, clipped_error) * mask, (clipped_error > error) * mask


def kl_per_token(policy: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """Estimate KL(policy || reference) at each token sampled from the policy (Schulman 2020).

    `policy` and `reference` are log-probabilities in nats. k1 is unbiased and may be negative, k2
    has little variance and is biased, k3 is unbiased and never negative.
    """
    log_ratio = policy - reference
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    if estimator == "k3":
        return torch.exp(-log_ratio) - 1 + log_ratio
    raise ValueError(f"no KL estimator {estimator!r}")


def adapted_coefficient(
    coefficient: float, kl: float, target: float, episodes: int, horizon: int
) -> float:
    """Return the KL coefficient after a rollout batch (Ziegler et al. 2019, section 2.2)."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * episodes / horizon)


def shaped_score(
    score: Tensor,
    ended: Tensor,
    shift: float,
    scale: float,
    clip: float | None,
    penalty: float | None,
) -> Tensor:
    """Normalise and clip the scores (rows,), then subtract `penalty` from rows that did not end."""
    score = (score - shift) / scale
    if clip is not None:
        score = score.clamp(-clip, clip)
    if penalty is not None:
        score = score - penalty * (~ended).to(score.dtype)
    return score


def last_sampled(mask: Tensor) -> Tensor:
    """Return the index (rows,) of each row's last sampled token; 0 for a row without one."""
    positions = torch.arange(mask.size(1), device=mask.device)
    return (positions * (mask > 0)).amax(dim=1)


def advantages_and_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Return generalised advantages A (Schulman et al. 2016, eq. 16) and returns A + V.

    An episode ends with its row's last sampled token: nothing is bootstrapped after it. Tokens off
    the mask are skipped, as if the next sampled token followed directly.
    """
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(running)
    for t in reversed(range(values.size(1))):
        sampled = mask[:, t] > 0
        error = rewards[:, t] + gamma * next_value - values[:, t]
        running = torch.where(sampled, error + gamma * lam * running, running)
        next_value = torch.where(sampled, values[:, t], next_value)
        advantages[:, t] = torch.where(sampled, running, 0.0)
    return advantages, (advantages + values) * mask


def same(sums: Tensor) -> Tensor:
    """Return the sums of this process, which are those of all if there is no other."""
    return sums


def masked_mean(x: Tensor, mask: Tensor, reduce: Reduce = same) -> Tensor:
    """Return the mean of `x` on the mask, over all processes; 0 if the mask is empty."""
    total, count = reduce(torch.stack([(x * mask).sum(), mask.sum().to(x.dtype)]))
    return total / count.clamp(min=1)


def masked_variance(x: Tensor, mask: Tensor, reduce: Reduce = same) -> Tensor:
    """Return the population variance of `x` on the mask, over all processes."""
    return masked_mean((x - masked_mean(x, mask, reduce)).square(), mask, reduce)


def whiten(x: Tensor, mask: Tensor, reduce: Reduce = same, keep_mean: bool = False) -> Tensor:
    """Scale `x` to variance 1, and shift it to mean 0 unless `keep_mean`; return 0 off the mask."""
    mean = masked_mean(x, mask, reduce)
    scaled = (x - mean) * torch.rsqrt(masked_variance(x, mask, reduce) + 1e-8)
    return (scaled + mean if keep_mean else scaled) * mask


def explained_variance(
    values: Tensor, returns: Tensor, mask: Tensor, reduce: Reduce = same
) -> float | None:
    """Return 1 - Var(returns - values) / Var(returns); None if the returns do not vary."""
    spread = masked_variance(returns, mask, reduce).item()
    if spread == 0:
        return None
    return 1 - masked_variance(returns - values, mask, reduce).item() / spread
