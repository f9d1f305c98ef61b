"""Which sample is trained on, and which is held back for what."""

from collections.abc import Mapping

import numpy as np

from data.errors import UserError

TRAIN = "train"


def split(labels: np.ndarray, wanted: Mapping[str, int], seed: int) -> np.ndarray:
    """A fixed, stratified split: (N,) names, every class in proportion, totals exact; TRAIN is what is left.

    Args:
        labels: (N,) integers. wanted: number of samples by name, drawn in this order.

    Raises:
        UserError: more samples are held back than there are, or a class is left without a training sample.
    """
    total, together = len(labels), " + ".join(f"split.{name}" for name in wanted)
    number = sum(wanted.values())
    if number >= total:
        raise UserError(f"{together} = {number}, but there are only {total} samples · lower them, or take more samples")
    result = np.full(total, TRAIN, dtype=object)
    generator = np.random.default_rng(seed)
    order = generator.permutation(total)
    for name, amount in wanted.items():
        free = order[result[order] == TRAIN]
        values, counts = np.unique(labels[free], return_counts=True)
        take, remainder = np.divmod(amount * counts, counts.sum())
        # The largest remainders get what rounding down left over; ties go to the lower label.
        take[np.argsort(-remainder, kind="stable")[: amount - take.sum()]] += 1
        for value, some in zip(values, take, strict=True):
            result[free[labels[free] == value][:some]] = name
    if lost := sorted(set(labels) - set(labels[result == TRAIN])):
        raise UserError(
            f"labels {[int(label) for label in lost]} have no sample left for training: too few samples for "
            f"{together} ({', '.join(map(str, wanted.values()))}) · lower them, or add samples"
        )
    return result
