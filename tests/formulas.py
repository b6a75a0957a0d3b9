"""The losses as the papers write them, in float64, one number a pair: the twins of TRL's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def log_sigmoid(x: Array) -> Array:
    return -np.logaddexp(0.0, -x)


def sigmoid(x: Array) -> Array:
    return np.exp(log_sigmoid(x))


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Log-probabilities of answers, [2, B]: the chosen, then the rejected."""

    policy: Array
    reference: Array
    tokens: Array
    beta: float = 0.1
    smoothing: float = 0.0
    tau: float = 0.05
    token_cost: float = 0.0
    derivative: Callable[[Array], Array] = lambda log_ratios: log_ratios
    """Of the f-divergence, as a function of the log-ratio."""

    @property
    def rewards(self) -> Array:
        """[2, B]"""
        return self.beta * (self.policy - self.reference)

    @property
    def scores(self) -> Array:
        return self.derivative(self.policy - self.reference)

    @property
    def margin(self) -> Array:
        """[B]"""
        longer = self.tokens[0] - self.tokens[1]
        return self.beta * (self.scores[0] - self.scores[1]) + self.token_cost * longer

    @property
    def margin_per_token(self) -> Array:
        chosen, rejected = self.scores / self.tokens
        return chosen - rejected


def exo_pair(pairs: Pairs) -> Array:
    right, wrong = log_sigmoid(pairs.margin), log_sigmoid(-pairs.margin)
    return np.exp(right) * (right - np.log(1 - pairs.smoothing)) + np.exp(wrong) * (
        wrong - np.log(pairs.smoothing)
    )


def nca_pair(pairs: Pairs) -> Array:
    chosen, rejected = pairs.rewards
    return -log_sigmoid(chosen) - (log_sigmoid(-chosen) + log_sigmoid(-rejected)) / 2


def robust(pairs: Pairs) -> Array:
    flipped = pairs.smoothing
    right, wrong = -log_sigmoid(pairs.margin), -log_sigmoid(-pairs.margin)
    return ((1 - flipped) * right - flipped * wrong) / (1 - 2 * flipped)


def smoothed(margin: Array, smoothing: float) -> Array:
    return -(1 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin)


def aot(pairs: Pairs) -> Array:
    policy, reference = (np.sort(each[0] - each[1]) for each in (pairs.policy, pairs.reference))
    return smoothed(pairs.beta * (policy - reference), pairs.smoothing)


def aot_unpaired(pairs: Pairs) -> Array:
    chosen, rejected = np.sort(pairs.rewards, axis=1)
    return smoothed(chosen - rejected, pairs.smoothing)


def discopop(pairs: Pairs) -> Array:
    mixed = sigmoid(pairs.margin / pairs.tau)
    return -(1 - mixed) * log_sigmoid(pairs.margin) + mixed * np.exp(-pairs.margin)


LOSSES: dict[str, Callable[[Pairs], Array]] = {
    "sigmoid": lambda pairs: -log_sigmoid(pairs.margin),
    "hinge": lambda pairs: np.maximum(0, 1 - pairs.margin),
    "ipo": lambda pairs: (pairs.margin_per_token - 1 / (2 * pairs.beta)) ** 2,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": lambda pairs: -log_sigmoid(pairs.rewards[0]) - log_sigmoid(-pairs.rewards[1]),
    "sppo_hard": lambda pairs: (
        ((pairs.rewards[0] - 0.5) ** 2 + (pairs.rewards[1] + 0.5) ** 2) / pairs.beta**2
    ),
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": lambda pairs: sigmoid(-pairs.rewards[0]) + sigmoid(pairs.rewards[1]),
    "apo_down": lambda pairs: sigmoid(pairs.rewards[0]) + sigmoid(-pairs.margin),
    "discopop": discopop,
    "sigmoid_norm": lambda pairs: -log_sigmoid(pairs.beta * pairs.margin_per_token),
}

DIVERGENCES: dict[str, Callable[[Array], Array]] = {
    "reverse_kl": lambda log_ratios: log_ratios,
    "forward_kl": lambda log_ratios: 1 - np.exp(-log_ratios),
    "js_divergence": lambda log_ratios: np.log(2) + log_sigmoid(log_ratios),
    # At alpha 0.5.
    "alpha_divergence": lambda log_ratios: 2 - 2 * np.exp(-log_ratios / 2),
}
"""f' of each, up to a constant that is the same for both answers."""


def at_start(name: str, *, beta: float, smoothing: float = 0.0) -> float:
    """The loss of a pair where policy and reference are one."""
    same = np.full((2, 1), -3.0)
    pairs = Pairs(
        policy=same, reference=same, tokens=np.ones((2, 1)), beta=beta, smoothing=smoothing
    )
    return float(LOSSES[name](pairs)[0])


def kto(
    rewards: Array, wanted: NDArray[np.bool_], reference_point: float, weights: tuple[float, float]
) -> Array:
    """rewards and reference point: log-ratios times beta. weights: of wanted and unwanted."""
    gain = np.where(wanted, rewards - reference_point, reference_point - rewards)
    return np.where(wanted, *weights) * (1 - sigmoid(gain))
