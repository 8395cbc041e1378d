"""The arithmetic of PPO against numbers computed by hand and against slow loops."""

import math
import random

import pytest
import torch

from selfcorrect.train.ppo import losses


def ragged(seed: int, rows: int = 6, width: int = 7) -> tuple[torch.Tensor, ...]:
    """Random rewards, values and a mask whose rows end at different tokens."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    values = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    mask = (torch.arange(width) < lengths[:, None]).double()
    return rewards * mask, values, mask


def slow_advantages(rewards, values, gamma, lam):
    """One row without padding: the sum of discounted errors, as the paper writes it."""
    steps = len(rewards)
    next_values = [*values[1:], 0.0]
    errors = [rewards[t] + gamma * next_values[t] - values[t] for t in range(steps)]
    return [sum((gamma * lam) ** k * errors[t + k] for k in range(steps - t)) for t in range(steps)]


def test_advantages_of_one_row_by_hand():
    # gamma 0.5, lambda 0.5; errors: 1 + .5*4 - 2 = 1; 0 + .5*6 - 4 = -1; 2 + 0 - 6 = -4.
    # Advantages from the end: -4; -1 + .25*-4 = -2; 1 + .25*-2 = 0.5. Returns add the values.
    rewards = torch.tensor([[1.0, 0.0, 2.0, 9.0]])
    values = torch.tensor([[2.0, 4.0, 6.0, 7.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    advantages, targets = losses.advantages_and_returns(rewards, values, mask, 0.5, 0.5)
    assert advantages.tolist() == [[0.5, -2.0, -4.0, 0.0]]
    assert targets.tolist() == [[2.5, 2.0, 2.0, 0.0]]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_advantages_of_ragged_rows_equal_those_of_each_row_alone(seed, gamma, lam):
    rewards, values, mask = ragged(seed)
    advantages, targets = losses.advantages_and_returns(rewards, values, mask, gamma, lam)
    for row in range(len(mask)):
        n = int(mask[row].sum())
        slow = slow_advantages(rewards[row, :n].tolist(), values[row, :n].tolist(), gamma, lam)
        assert advantages[row, :n].tolist() == pytest.approx(slow, abs=1e-12)
        assert targets[row, :n].tolist() == pytest.approx(
            [a + v for a, v in zip(slow, values[row, :n].tolist(), strict=True)], abs=1e-12
        )
        assert not advantages[row, n:].any() and not targets[row, n:].any()


def test_advantages_skip_tokens_that_the_policy_did_not_sample():
    rewards, values, _ = ragged(3, rows=1, width=5)
    mask = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0]])
    advantages, _ = losses.advantages_and_returns(rewards * mask, values, mask, 0.9, 0.8)
    kept = [0, 2, 4]
    slow = slow_advantages(rewards[0, kept].tolist(), values[0, kept].tolist(), 0.9, 0.8)
    assert advantages[0, kept].tolist() == pytest.approx(slow, abs=1e-12)


def test_returns_are_future_rewards_if_lambda_and_gamma_are_one():
    rewards, values, mask = ragged(1)
    _, targets = losses.advantages_and_returns(rewards, values, mask, 1.0, 1.0)
    future = rewards.flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(targets, future)


def test_whitening_gives_mean_zero_and_variance_one_on_the_mask_only():
    x = torch.tensor([[1.0, 3.0, 100.0], [5.0, -50.0, 70.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    # mean of 1, 3, 5 is 3, population variance 8/3
    scale = 1 / math.sqrt(8 / 3)
    expected = torch.tensor([[-2 * scale, 0.0, 0.0], [2 * scale, 0.0, 0.0]])
    torch.testing.assert_close(losses.whiten(x, mask), expected)
    kept_mean = losses.whiten(x, mask, keep_mean=True)
    torch.testing.assert_close(kept_mean, (expected + 3) * mask)


def test_whitening_in_two_threads_equals_whitening_the_complete_batch():
    """Each half is whitened by a thread, and both threads add up every sum."""
    from threading import Barrier, Thread

    x, _, mask = ragged(7, rows=8)
    barrier, parts = Barrier(2), {}

    def reduce_on(rank):
        def reduce(sums):
            parts[rank] = sums
            barrier.wait()
            total = parts[0] + parts[1]
            barrier.wait()
            return total

        return reduce

    halves = {}

    def work(rank):
        rows = slice(4 * rank, 4 * rank + 4)
        halves[rank] = losses.whiten(x[rows], mask[rows], reduce_on(rank))

    threads = [Thread(target=work, args=(rank,)) for rank in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    torch.testing.assert_close(torch.cat([halves[0], halves[1]]), losses.whiten(x, mask))


def test_kl_estimators_by_hand():
    policy, reference = torch.tensor([0.0, -1.0]), torch.tensor([-1.0, 0.0])
    ratio = [1.0, -1.0]
    assert losses.kl_per_token(policy, reference, "k1").tolist() == ratio
    assert losses.kl_per_token(policy, reference, "k2").tolist() == [0.5, 0.5]
    k3 = losses.kl_per_token(policy, reference, "k3").tolist()
    assert k3 == pytest.approx([math.exp(-1.0), math.exp(1.0) - 2])
    with pytest.raises(ValueError, match="k4"):
        losses.kl_per_token(policy, reference, "k4")


def test_k1_and_k3_average_to_the_exact_kl():
    """Sampled from the policy, both are unbiased: their exact expectation is the KL itself."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    exact = float((p * (p / q).log()).sum())
    for estimator in ("k1", "k3"):
        estimate = losses.kl_per_token(p.log(), q.log(), estimator)
        assert float((p * estimate).sum()) == pytest.approx(exact, abs=1e-6)


def test_kl_controller_by_hand():
    # error clipped to 0.2, 100 of 1000 episodes: 0.1 * (1 + 0.2 * 0.1)
    assert losses.adapted_coefficient(0.1, 12.0, 6.0, 100, 1000) == pytest.approx(0.102)
    assert losses.adapted_coefficient(0.1, 0.0, 6.0, 100, 1000) == pytest.approx(0.098)
    assert losses.adapted_coefficient(0.1, 6.6, 6.0, 100, 1000) == pytest.approx(0.101)


def test_score_is_normalised_then_clipped_then_penalised():
    score, ended = torch.tensor([5.0, 1.0, -9.0]), torch.tensor([True, False, False])
    shaped = losses.shaped_score(score, ended, shift=1.0, scale=2.0, clip=1.5, penalty=1.0)
    assert shaped.tolist() == [1.5, -1.0, -2.5]
    plain = losses.shaped_score(score, ended, shift=0.0, scale=1.0, clip=None, penalty=None)
    assert plain.tolist() == score.tolist()


def test_last_sampled_token():
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    assert losses.last_sampled(mask).tolist() == [1, 2, 0]


def test_explained_variance_by_hand_and_none_without_variance():
    targets, mask = torch.tensor([[0.0, 2.0, 4.0, 9.0]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    # Var(targets) = 8/3; residuals 0, 1, 2 with variance 2/3: 1 - 1/4
    values = torch.tensor([[0.0, 1.0, 2.0, -7.0]])
    assert losses.explained_variance(values, targets, mask) == pytest.approx(0.75)
    assert losses.explained_variance(values, torch.ones(1, 4), mask) is None


# ---- the clipped losses ------------------------------------------------------------------------


def test_clipped_policy_loss_by_hand():
    # Ratios 1.5, 0.5, 1.5, 0.5 and 1.1 with bounds 0.8 and 1.2, each with advantage A:
    # A = 2: -min(3, 2.4). A = -1: -min(-0.5, -0.8). A = -1: -min(-1.5, -1.2), as it has moved the
    # wrong way. A = 1: -min(0.5, 0.8), likewise. A = 4: -4.4, inside the bounds. Then off the mask.
    old = torch.tensor([[-1.0, -2.0, -3.0, -0.5, -1.0, -1.0]])
    ratios = torch.tensor([[1.5, 0.5, 1.5, 0.5, 1.1, 3.0]])
    advantages = torch.tensor([[2.0, -1.0, -1.0, 1.0, 4.0, 9.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 0.0]])
    batch = (old + ratios.log(), old, advantages, mask)
    loss, low, high = losses.clipped_policy_loss(*batch, 0.2, 0.2)
    expected = torch.tensor([[-2.4, 0.8, 1.5, -0.5, -4.4, 0.0]])
    torch.testing.assert_close(loss, expected)
    assert low.tolist() == [[0, 1, 0, 0, 0, 0]] and high.tolist() == [[1, 0, 0, 0, 0, 0]]
    # A low bound of 0.4 and a high one of 1.6 clip nothing; a largest ratio of 1.3 bounds the loss
    # of the third token, and of the first one, whose 1.3 is then still above 1.2.
    loss, low, high = losses.clipped_policy_loss(*batch, 0.6, 0.6)
    torch.testing.assert_close(loss, -ratios * advantages * mask)
    assert not low.any() and not high.any()
    loss, _, high = losses.clipped_policy_loss(*batch, 0.2, 0.2, max_ratio=1.3)
    torch.testing.assert_close(loss, torch.tensor([[-2.4, 0.8, 1.3, -0.5, -4.4, 0.0]]))
    assert high.tolist() == [[1, 0, 0, 0, 0, 0]]


def test_clip_bounds_differ_below_and_above():
    ratios, advantages = torch.tensor([[0.8, 1.25]]), torch.tensor([[-1.0, 1.0]])
    batch = (ratios.log(), torch.zeros(1, 2), advantages, torch.ones(1, 2))
    _, low, high = losses.clipped_policy_loss(*batch, 0.1, 0.3)
    assert low.tolist() == [[1, 0]] and high.tolist() == [[0, 0]]
    _, low, high = losses.clipped_policy_loss(*batch, 0.3, 0.1)
    assert low.tolist() == [[0, 0]] and high.tolist() == [[0, 1]]


def test_clipped_token_gets_no_policy_gradient():
    log_probs = torch.log(torch.tensor([[1.5, 0.5, 1.5, 1.1]])).requires_grad_()
    advantages = torch.tensor([[1.0, -1.0, -1.0, 1.0]])
    loss, _, _ = losses.clipped_policy_loss(
        log_probs, torch.zeros(1, 4), advantages, torch.ones(1, 4), 0.2, 0.2
    )
    loss.sum().backward()  # the gradient is -ratio * advantage where it is not clipped
    torch.testing.assert_close(log_probs.grad, torch.tensor([[0.0, 0.0, 1.5, -1.1]]))


def slow_value_loss(value, old, target, cliprange):
    near = min(max(value, old - cliprange), old + cliprange)
    plain, clipped = 0.5 * (value - target) ** 2, 0.5 * (near - target) ** 2
    return max(plain, clipped), float(clipped > plain)


def test_clipped_value_loss_against_a_loop():
    rng = random.Random(0)
    rows = torch.tensor([[rng.uniform(-1, 1) for _ in range(3)] for _ in range(200)])
    value, old, target = rows.T
    mask = torch.ones(200)
    loss, clipped = losses.clipped_value_loss(value, old, target, mask, 0.2)
    expected = [slow_value_loss(*row, 0.2) for row in rows.tolist()]
    assert loss.tolist() == pytest.approx([each for each, _ in expected], abs=1e-6)
    assert clipped.tolist() == [each for _, each in expected]
    assert 0 < clipped.mean() < 1
    plain, none = losses.clipped_value_loss(value, old, target, mask, None)
    torch.testing.assert_close(plain, 0.5 * (value - target) ** 2)
    assert not none.any()
    half = (torch.arange(200) < 100).float()
    masked, masked_clipped = losses.clipped_value_loss(value, old, target, half, 0.2)
    assert torch.equal(masked, loss * half) and torch.equal(masked_clipped, clipped * half)


def test_clipped_value_gets_no_gradient():
    value = torch.tensor([0.5], requires_grad=True)
    loss, clipped = losses.clipped_value_loss(
        value, torch.tensor([0.0]), torch.tensor([1.0]), torch.ones(1), 0.2
    )
    loss.sum().backward()
    assert value.grad.tolist() == [0.0] and clipped.tolist() == [1.0]
