"""What the scripts here have in common: times of calls, and whether two ways of computing agree."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

SHORT = 0.02  # seconds; what takes less is called several times in a row


def seconds(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    """Of one call; the mean over several in a row where one is short."""
    begun = clock()
    call()
    first = clock() - begun
    if first > SHORT:
        return first
    count = int(SHORT / max(first, 1e-6)) + 1
    begun = clock()
    for _ in range(count):
        call()
    return (clock() - begun) / count


def agree(calls: Mapping[str, Callable[[], Sequence[Tensor]]], relative: float) -> None:
    """Refuse to compare what does not compute the same; each value within a share of its largest number."""
    expected = calls["ours"]()
    for name in list(calls)[1:]:
        for found, wanted in zip(calls[name](), expected, strict=True):
            off = (found - wanted).abs().max().item()
            assert off <= relative * wanted.abs().max().item(), f"{name} differs by {off:.2g}"
