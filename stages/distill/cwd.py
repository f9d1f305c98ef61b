"""CWD: every channel of the student, as a distribution over positions, has to match the teacher's.

Source: Shu, Liu, Gao, Yan, Shen 2021, "Channel-wise Knowledge Distillation for Dense Prediction" (ICCV). On class
logits their code uses weight 3 with temperature 4; on features it puts a 1x1 convolution before, with weight 35 to 40
(GDD method card, section 3.7). The loss is `channel_divergence` in `stages/training/features.py`.
"""

from torch import Tensor, nn

from stages.parameters.segmentation import CWD
from stages.training import Align, Context, FeatureMethod, Run, Task, channel_divergence


class Learner(FeatureMethod):
    """The task's own objective + weight * channel-wise KL of class logits, or of aligned feature maps, summed."""

    def __init__(self, task: Task, parameters: CWD, run: Run) -> None:
        features = parameters.compare == "features"
        super().__init__(
            task,
            run,
            parameters.places,
            weight=parameters.weight if features else 0.0,
            logits=0.0 if features else parameters.weight,
            temperature=parameters.temperature,
        )

    def adapter(self, student: int, teacher: int) -> nn.Module:
        return Align(student, teacher)

    def compare(self, adapter: Align, student: Tensor, teacher: Tensor, context: Context) -> Tensor:
        return channel_divergence(adapter(student), teacher, self.temperature)
