"""EM: a mixture of experts by the likelihood of demonstrations, gate and experts by turns; no teacher.

Source: the official code of VDD, where it is the baseline EM-GPT (VDD card 3.8).
"""

from collections.abc import Mapping

from torch import Tensor

from models.policy import Output, log_components
from stages.experts import ByTurns, data_responsibilities, over_experts
from stages.parameters.policy import EM
from stages.teach.policy import Policy
from stages.training import Context, Run


def expert_loss(output: Output, actions: Tensor, reduction: str = "sum") -> Tensor:
    """- sum_k r_k log N(a; mu_k, Sigma_k), r the responsibilities of these experts without gradient (card 3.8).

    Shapes: scaled actions (..., A), a scalar. Reduction: mean over everything but experts, over these `sum` or `mean`.
    With `sum` its gradient in the experts is that of the negative log-likelihood of the mixture.
    """
    weighted = data_responsibilities(output, actions) * log_components(output, actions)
    return -over_experts(weighted, reduction).mean()


class Learner(ByTurns):
    """The gate's updates, then the experts'."""

    def __init__(self, task: Policy, parameters: EM, run: Run) -> None:
        super().__init__(task, parameters)
        self._task, self._parameters = task, parameters

    def step(self, context: Context) -> Mapping[str, Tensor]:
        found = self._learn_gate(context)
        for _ in range(self._parameters.expert_steps):
            views = self._task.views(context)
            with context.run.autocast():
                output = self.modules["student"](views.student)
            loss = expert_loss(output, views.target, self._parameters.reduction)
            context.update("experts", {"experts": loss})
        return {"loss/experts": loss, **found}
