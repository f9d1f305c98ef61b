"""KD: a student learns the teacher's softened class probabilities.

Source: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", section 2. For maps of logits the
same equation holds at every position and is averaged over positions, as in the pixel-wise baseline of the segmentation
literature (GDD method card, section 3.7).
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.parameters.shared import KD
from stages.training import Context, Method, Run, Task, widen


def soft_target_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """temperature^2 * KL(p || q), with p = softmax(teacher / temperature) and q = softmax(student / temperature).

    Shapes: logits (N, classes, ...), both alike: classes on dimension 1, then any number of positions.
    Reduction: sum over classes, mean over N and all positions; a scalar. The factor temperature^2 keeps the size of the
    gradient, temperature * (q - p) / (N * positions), roughly independent of the temperature (section 2).
    Computed and returned in float32, or in float64 if either input is, also under autocast; the gradient has the
    student's dtype and none reaches the teacher. From log-probabilities, so that logits in the hundreds stay finite.
    Raises: ValueError if the shapes differ, lack the class dimension or are empty, or if the temperature is not a
    positive finite number.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite ({temperature}) · values from 1 to 10 are usual")
    shapes = f"(student {tuple(student.shape)}, teacher {tuple(teacher.shape)})"
    if student.shape != teacher.shape:
        raise ValueError(f"logits differ in shape {shapes} · give both networks the same input and the same classes")
    if student.dim() < 2 or student.numel() == 0:
        raise ValueError(f"logits must be a non-empty (N, classes, ...) array {shapes} · leave empty batches out")
    student, teacher = widen(student, teacher)
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)
    return temperature**2 * divergence.mean()


class Learner(Method):
    """(1 - alpha) * the task's own objective + alpha * soft targets of a frozen teacher."""

    frozen = frozenset({"teacher"})

    def __init__(self, task: Task, parameters: KD, run: Run) -> None:
        super().__init__()
        self._task, self._parameters = task, parameters
        self.modules = {"student": task.student, "teacher": task.taught_by()}
        self.streams = task.streams()
        task.optimize(self, "student", task.student.parameters())

    def step(self, context: Context) -> Mapping[str, Tensor]:
        views = self._task.views(context)
        with torch.no_grad(), context.run.autocast():
            teacher = self._task.logits(self.modules["teacher"](views.teacher))
        with context.run.autocast():
            output = self.modules["student"](views.student)
        alpha = self._parameters.alpha
        task = self._task.objective(output, views.target)
        soft = soft_target_loss(self._task.logits(output), teacher, self._parameters.temperature)
        context.update("student", {"task": (1 - alpha) * task, "soft": alpha * soft})
        return {"loss/task": task, "loss/soft": soft}
