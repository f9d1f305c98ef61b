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
        chosen = self._choose(seed, epoch, index, rank, world)
        return [tensor[chosen.to(tensor.device)] for tensor in self.tensors]

    def _choose(self, seed: int, epoch: int, index: int, rank: int, world: int) -> Tensor:
        """Rows (batch,) of this rank in the `index`-th batch of an epoch."""
        start = (index * world + rank) * self.batch
        return self._permutation(seed, epoch)[start : start + self.batch]

    def _permutation(self, seed: int, epoch: int) -> Tensor:
        if not self.shuffle:
            seed, epoch = 0, 0
        if self._order is None or self._order[0] != (seed, epoch):
            generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
            order = torch.randperm(self.size, generator=generator) if self.shuffle else torch.arange(self.size)
            self._order = ((seed, epoch), order)
        return self._order[1]


class ClassStream(Stream):
    """Batches of whole classes: so many different classes, and so many images of each, drawn anew for every batch.

    An epoch has as many batches as that of a `Stream`, but no image is promised its turn in it (RKD's official code
    draws alike). A class that has fewer images than are asked for gives each of them before any of them again. A rank
    sees whole classes of the global batch, whose classes are all different.

    pytorch-metric-learning's MPerClassSampler draws an epoch's list from numpy's global generator, and has no place in
    it to go on at: here a batch follows from seed and position alone.

    Args:
        labels: (N,) int64, of the arrays' rows. per_class: images of one class in a batch, of which `batch` is a
            multiple.
    """

    def __init__(self, tensors: Sequence[Tensor], batch: int, labels: Tensor, per_class: int) -> None:
        super().__init__(tensors, batch)
        if batch % per_class:
            raise ValueError(f"a batch of {batch} does not hold {per_class} samples of every class in it")
        self.per_class = per_class
        labels = labels.cpu()
        self._members = [(labels == label).nonzero().flatten() for label in labels.unique()]

    def batches(self, world: int) -> int:
        """Global batches in one epoch.

        Raises:
            ValueError: there are fewer samples, or fewer classes, than one global batch needs.
        """
        wanted = self.batch * world // self.per_class
        if wanted > len(self._members):
            raise ValueError(
                f"a batch of {self.batch} with {self.per_class} samples of every class in it"
                + (f", in each of {world} processes," if world > 1 else "")
                + f" needs {wanted} classes, and there are {len(self._members)}"
            )
        return super().batches(world)

    def _choose(self, seed: int, epoch: int, index: int, rank: int, world: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(seed, epoch, index))
        ours = self.batch // self.per_class
        classes = torch.randperm(len(self._members), generator=generator)[: ours * world].tolist()
        rows = []
        for label in classes:
            members = self._members[label]
            turns = -(-self.per_class // len(members))
            order = torch.cat([torch.randperm(len(members), generator=generator) for _ in range(turns)])
            rows.append(members[order[: self.per_class]])
        return torch.cat(rows[rank * ours : (rank + 1) * ours])
