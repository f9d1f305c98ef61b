"""torchvision, also where torch is a CPU build beside PyPI's torchvision.

There its compiled extension does not load, and the import fails for want of two operators that no network of this
project uses. transformers imports torchvision too, and fails with it.
"""

import importlib
import sys
from typing import Any

import torch


def import_torchvision() -> None:
    """Import torchvision; the missing operators are declared where it has to be.

    Only there: on a matching pair the extension would declare them a second time, and the process would abort.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for loaded in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[loaded]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)
        importlib.import_module("torchvision")


_LIBRARIES: list[Any] = []  # an operator is gone as soon as its library is collected
