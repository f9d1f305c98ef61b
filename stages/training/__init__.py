"""The training loop, once, and what a method has to offer to be driven by it.

`Method` (method.py) is the interface; its docstring says how each of the five methods uses it. `train` (loop.py)
drives it: checkpoints, exact resumption, records, progress. `Run` (run.py) is the only code that knows Fabric.
`FeatureMethod` (features.py) is what methods have in common that compare feature maps of two networks, `AdamW` and
`peek` (optimizers.py) are for methods that look one update ahead.
"""

from stages.training.features import Align, FeatureMethod, Generator, channel_divergence, widen
from stages.training.loop import Stopped, train
from stages.training.method import Companion, Context, Method, evaluating
from stages.training.optimizers import AdamW, peek
from stages.training.run import Run
from stages.training.streams import ClassStream, Stream, derive_seed
from stages.training.task import Task, Views

__all__ = [
    "AdamW",
    "Align",
    "ClassStream",
    "Companion",
    "Context",
    "FeatureMethod",
    "Generator",
    "Method",
    "Run",
    "Stopped",
    "Stream",
    "Task",
    "Views",
    "channel_divergence",
    "derive_seed",
    "evaluating",
    "peek",
    "train",
    "widen",
]
