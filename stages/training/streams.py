"""Batches out of arrays in memory: a permutation per epoch, and one integer as the whole state."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from anything that can be written down; another part gives an unrelated seed."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class Stream:
    """An endless sequence of batches over aligned arrays.

    With several processes, rank r sees the r-th part of each global batch: together they see what one process with
    a batch of `world * batch` would see. Samples that do not fill a global batch wait for the next epoch's
    permutation.

    Attributes:
        position: number of batches drawn so far; setting it seeks.
    """

    def __init__(self, tensors: Sequence[Tensor], batch: int, *, shuffle: bool = True) -> None:
        sizes = {len(tensor) for tensor in tensors}
        if len(sizes) != 1:
            raise ValueError(f"the arrays of a stream need the same length, got {sorted(sizes)}")
        self.tensors = list(tensors)
        self.size = sizes.pop()
        self.batch = batch
        self.shuffle = shuffle
        self.position = 0
        self._order: tuple[tuple[int, int], Tensor] | None = None

    def batches(self, world: int) -> int:
        """Global batches in one epoch.

        Raises:
            ValueError: there are fewer samples than one global batch needs.
        """
        count = self.size // (self.batch * world)
        if count == 0:
            raise ValueError(
                f"{self.size} samples do not fill a batch of {self.batch}"
                + (f" in each of {world} processes" if world > 1 else "")
            )
        return count

    def draw(self, seed: int, rank: int, world: int) -> list[Tensor]:
        """The next batch of this rank: one tensor per array, first dimension `batch`."""
        epoch, index = divmod(self.position, self.batches(world))
        self.position += 1
        start = (index * world + rank) * self.batch
        chosen = self._permutation(seed, epoch)[start : start + self.batch]
        return [tensor[chosen.to(tensor.device)] for tensor in self.tensors]

    def _permutation(self, seed: int, epoch: int) -> Tensor:
        if not self.shuffle:
            seed, epoch = 0, 0
        if self._order is None or self._order[0] != (seed, epoch):
            generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
            order = torch.randperm(self.size, generator=generator) if self.shuffle else torch.arange(self.size)
            self._order = ((seed, epoch), order)
        return self._order[1]
