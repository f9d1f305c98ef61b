"""ESZSL: a bilinear map between features and attributes, by two ridge regressions in closed form.

Source: Romera-Paredes, Torr 2015, "An embarrassingly simple approach to zero-shot learning", section 3.1.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from models.zero_shot import MLP
from stages.parameters.zero_shot import ESZSL
from stages.teach.zero_shot import ZeroShot
from stages.training import Context, Method, Run


def solve(
    features: Tensor, labels: Tensor, attributes: Tensor, seen: Tensor, feature_penalty: float, attribute_penalty: float
) -> Tensor:
    """V = (X'X + g I)^-1 X'Y A (A'A + l I)^-1, of which class c gets the score x' V a_c.

    Y is +1 where a sample is of a class and -1 elsewhere. Computed in float64.

    Args:
        features: X, (N, D). labels: (N,) among all classes. attributes: of all classes, (n, K). seen: (n_s,) classes.
        feature_penalty, attribute_penalty: g and l; the paper's third penalty is their product.

    Returns:
        (D, K) float64.
    """
    x, a = features.double(), attributes[seen].double()
    y = torch.where(labels[:, None] == seen, 1.0, -1.0).to(x)
    left = x.T @ x + feature_penalty * torch.eye(x.shape[1]).to(x)
    right = a.T @ a + attribute_penalty * torch.eye(a.shape[1]).to(a)
    return torch.linalg.solve(right, torch.linalg.solve(left, x.T @ y @ a), left=False)


class Learner(Method):
    """One step, and no optimiser."""

    def __init__(self, task: ZeroShot, parameters: ESZSL, run: Run) -> None:
        super().__init__()
        self._task, self._parameters = task, parameters
        self.modules["student"] = task.student
        self.streams = task.streams()

    @torch.no_grad()
    def step(self, context: Context) -> Mapping[str, Tensor]:
        task, parameters = self._task, self._parameters
        features, labels = task.train
        found = solve(
            features,
            labels,
            task.attributes,
            task.seen,
            parameters.feature_penalty,
            parameters.attribute_penalty,
        )
        layer = cast(MLP, task.student).classifier
        layer.weight.copy_(task.attributes.double() @ found.T)
        layer.bias.zero_()
        wanted = torch.where(labels[:, None] == task.seen, 1.0, -1.0)
        scores = layer(features)[:, task.seen]
        return {"loss/task": (scores - wanted).square().mean()}
