"""The task's own objective, and no teacher: how a teacher is trained, and the baseline of every method."""

from collections.abc import Mapping

from torch import Tensor

from stages.parameters.shared import Section
from stages.training import Context, Method, Run, Task


class Learner(Method):
    """One network, one optimiser, one loss."""

    def __init__(self, task: Task, parameters: Section, run: Run) -> None:
        super().__init__()
        self._task = task
        self.modules["student"] = task.student
        self.streams = task.streams()
        task.optimize(self, "student", task.student.parameters())

    def step(self, context: Context) -> Mapping[str, Tensor]:
        views = self._task.views(context)
        with context.run.autocast():
            output = self.modules["student"](views.student)
        loss = self._task.objective(output, views.target)
        context.update("student", {"task": loss})
        return {"loss/task": loss}
