"""More classes for a student that is there already: from their attributes alone, by the generator it was trained with.

Features of the new classes are synthesised as those of all unseen classes are, and the last layer is trained anew
(D3GZSL card 3.9, two-stage mode). Scaling, hidden layer and encoder stay as they are.
"""

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from models.zero_shot import MLP, Generator, build
from stages.generators.two_stage import refit
from stages.parameters.zero_shot import Extended
from stages.teach.zero_shot import ZeroShot
from stages.training import Companion, Context, Method, Run


class Learner(Method):
    """One step: the last layer."""

    def __init__(self, task: ZeroShot, parameters: Extended, run: Run) -> None:
        super().__init__()
        self._task, self._parameters = task, parameters
        old = cast(Generator, task.taught_by())
        generator = build({"network": old.built_from, "interface": task.interface}).to(task.attributes)
        generator.load_state_dict({**old.state_dict(), "attributes": task.attributes})
        self.modules = {"student": task.student, "generator": generator}
        self.streams = task.streams()

    @property
    def companions(self) -> Mapping[str, Companion]:
        generator = cast(Generator, self.modules["generator"])
        return {"generator": Companion(generator, generator.built_from, evaluated=False)}

    def step(self, context: Context) -> Mapping[str, Tensor]:
        task, parameters = self._task, self._parameters
        student = cast(MLP, self.modules["student"])
        random = context.generator("classifier")
        generator = cast(Generator, self.modules["generator"])
        refit(student, task.train, generator, task.others, parameters.classifier, parameters.training.betas, random)
        with torch.no_grad():
            logits = student.classifier(student.embedding(task.train.inputs))
            return {"loss/task": F.cross_entropy(logits, task.train.labels)}
