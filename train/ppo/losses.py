"""The arithmetic of PPO as small pure functions on padded batches: KL, GAE, whitening, value loss.

Shapes are (rows, tokens) of completions; `mask` is 1 on tokens that the policy sampled, else 0.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]


def alone(sums: Tensor) -> Tensor:
    """Sum over processes where there is only this one."""
    return sums


def kl_per_token(policy: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """Estimate KL(policy || reference) at each token sampled from the policy (Schulman 2020).

    `policy` and `reference` are log-probabilities, nats. k1 is unbiased and may be negative, k2 has
    little variance and is biased, k3 is unbiased and never negative.
    """
    ratio = policy - reference
    if estimator == "k1":
        return ratio
    if estimator == "k2":
        return 0.5 * ratio.square()
    if estimator == "k3":
        return torch.exp(-ratio) - 1 + ratio
    raise ValueError(f"no KL estimator {estimator!r}")


def adapted_coefficient(
    coefficient: float, kl: float, target: float, episodes: int, horizon: int
) -> float:
    """The KL coefficient after a rollout batch (Ziegler et al. 2019, section 2.2)."""
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
    """Normalise the reward model's score (rows,), clip it, and charge rows that did not end."""
    score = (score - shift) / scale
    if clip is not None:
        score = score.clamp(-clip, clip)
    if penalty is not None:
        score = score - penalty * (~ended).to(score.dtype)
    return score


def last_token(mask: Tensor) -> Tensor:
    """Index (rows,) of each row's last sampled token; 0 for a row without one."""
    positions = torch.arange(mask.size(1), device=mask.device)
    return (positions * (mask > 0)).amax(dim=1)


def advantages_and_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) and returns = A + V.

    An episode ends with its row's last masked-in token: nothing is bootstrapped behind it. Tokens
    masked out are passed over, as if the next sampled token followed directly.
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


def masked_mean(x: Tensor, mask: Tensor, reduce: Reduce = alone) -> Tensor:
    """Mean of `x` where `mask` is 1, over all processes; 0 where nothing is masked in."""
    total, count = reduce(torch.stack([(x * mask).sum(), mask.sum().to(x.dtype)]))
    return total / count.clamp(min=1)


def masked_variance(x: Tensor, mask: Tensor, reduce: Reduce = alone) -> Tensor:
    """Population variance of `x` where `mask` is 1, over all processes."""
    return masked_mean((x - masked_mean(x, mask, reduce)).square(), mask, reduce)


def whiten(x: Tensor, mask: Tensor, reduce: Reduce = alone, keep_mean: bool = False) -> Tensor:
    """`x` with unit variance, and mean 0 unless `keep_mean`, over all processes; 0 off the mask."""
    mean = masked_mean(x, mask, reduce)
    scaled = (x - mean) * torch.rsqrt(masked_variance(x, mask, reduce) + 1e-8)
    return (scaled + mean if keep_mean else scaled) * mask


def explained_variance(
    values: Tensor, returns: Tensor, mask: Tensor, reduce: Reduce = alone
) -> float | None:
    """1 - Var(returns - values) / Var(returns); None where the returns do not vary."""
    spread = masked_variance(returns, mask, reduce).item()
    if spread == 0:
        return None
    return 1 - masked_variance(returns - values, mask, reduce).item() / spread


def value_errors(
    values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float | None
) -> tuple[Tensor, Tensor]:
    """Half the squared error per token, and where clipping made it the larger one (1 or 0).

    With a `cliprange` the error is the worse of the new value's and that of the new value kept
    within `cliprange` of the old one, so that a value cannot profit from moving further.
    """
    error = 0.5 * (values - returns).square()
    if cliprange is None:
        return error, torch.zeros_like(error)
    near = old_values + (values - old_values).clamp(-cliprange, cliprange)
    clipped_error = 0.5 * (near - returns).square()
    return torch.maximum(error, clipped_error), (clipped_error > error).to(error.dtype)
