"""Mixtures of experts that learn experts and gate by turns: what VDD and EM have in common.

"Card" is the VDD method card. Experts learn from windows of the stream "train", the gate from those of "gate", each
with an optimiser of its own; the gate never trains the trunk.
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from models.policy import Mixture, Output, log_components
from stages.parameters.policy import Alternating
from stages.teach.policy import Policy
from stages.training import Context, Method


def data_responsibilities(output: Output, actions: Tensor) -> Tensor:
    """r_k = softmax_k(log pi_k + log N(a; mu_k, Sigma_k)) of demonstrated actions (card 3.4), without gradient.

    Shapes: scaled actions (..., A) to (..., K).
    """
    with torch.no_grad():
        return (output.log_gate + log_components(output, actions)).softmax(-1)


def gate_loss(log_gate: Tensor, responsibility: Tensor, reduction: str = "sum") -> Tensor:
    """Cross-entropy of the gate towards responsibilities, - sum_k r_k log pi_k (card 3.4); (..., K) both, a scalar.

    Reduction: mean over everything but experts, over these `sum` or `mean` (card 4, row 4). Its gradient with respect
    to the logits is (pi - r) / N for `sum`, and none reaches the responsibilities.

    Raises:
        ValueError: the shapes differ.
    """
    if log_gate.shape != responsibility.shape:
        raise ValueError(f"gate {tuple(log_gate.shape)} and responsibilities {tuple(responsibility.shape)} differ")
    return -over_experts(responsibility.detach() * log_gate, reduction).mean()


def over_experts(values: Tensor, reduction: str) -> Tensor:
    """(..., K) to (...).

    Raises:
        ValueError: another reduction than `sum` and `mean`.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"unknown reduction over experts ({reduction!r}) · use sum or mean")
    return values.sum(-1) if reduction == "sum" else values.mean(-1)


class ByTurns(Method):
    """Optimisers "experts" (trunk, means, covariances) and "gate", where there is one to learn (card 3.6)."""

    def __init__(self, task: Policy, parameters: Alternating) -> None:
        super().__init__()
        self._policy, self._turns = task, parameters
        student = self._mixture = cast(Mixture, task.student)
        self.modules = {"student": student}
        self.streams = task.streams()
        self._optimize("experts", student.expert_parameters(), parameters.expert_steps)
        if student.gate is not None:
            self._optimize("gate", student.gate_parameters(), parameters.gate_steps)

    def _optimize(self, name: str, parameters: Iterable[Tensor], updates: int) -> None:
        """`updates` in an iteration; over how many the rate falls is a setting (card 4, row 5)."""
        self._policy.optimize(self, name, parameters)
        updates = updates if self._turns.lr_total == "updates" else 1
        self.schedules[name] = self._policy.schedule(updates * self._policy.steps)

    def _learn_gate(self, context: Context) -> dict[str, Tensor]:
        """Updates of the gate towards the experts' responsibilities, each with a batch of its own."""
        found = {}
        for _ in range(self._turns.gate_steps if "gate" in self.optimizers else 0):
            views = self._policy.views(context, "gate")
            with context.run.autocast():
                with torch.no_grad():
                    features = self._mixture.features(views.student)
                    experts = self._mixture.experts(features)
                log_gate = self._mixture.log_gate(features)
            responsibility = data_responsibilities(Output(*experts, log_gate), views.target)
            loss = gate_loss(log_gate, responsibility, self._turns.reduction)
            context.update("gate", {"gate": loss})
            found = {"loss/gate": loss}
        return found
