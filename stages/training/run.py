"""Device, precision and processes: Lightning Fabric, bare. Nothing else imports it.

Modules and optimisers are never wrapped. A wrapper keeps the weights of a functional call, lets `autograd.grad` pass
unsynchronised, and refuses several backward passes; a plain module beside one all-reduce of the gradients does none
of that.
"""

import ctypes
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

import torch
from torch import Tensor, nn

from data.errors import UserError
from stages.parameters.shared import Training

# mallopt's names for two limits (malloc.h), and the highest values that glibc takes on 64 bits.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_TRIM, LARGEST_MMAP = 2**31 - 1, 2**25


def keep_memory() -> bool:
    """Let the allocator keep the memory of freed tensors for the next ones, up to 32 MiB each; False without glibc.

    It would give every larger block back, and take as much again from the system in the next step, page by page: with
    networks as small as students are that costs up to a fifth of a step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP) and mallopt(M_TRIM_THRESHOLD, LARGEST_TRIM))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class Run:
    """Where a model trains: one process of one or several.

    With several devices the command is started again once per device; everything before this constructor runs in
    each of them.

    Attributes:
        device, dtype: of the model and its inputs. rank, world: this process among all.
    """

    def __init__(self, settings: Training) -> None:
        # Fabric takes a second to import and pulls in much else; whoever only evaluates does not need it.
        from lightning_fabric import Fabric

        torch.set_num_threads(settings.threads)
        keep_memory()
        # cuBLAS reads this when it starts; without it deterministic algorithms are refused on CUDA.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=settings.accelerator != "cpu")
        try:
            self._fabric = Fabric(
                accelerator=settings.accelerator,
                devices=settings.devices,
                strategy="ddp" if settings.devices > 1 else "auto",
                precision=settings.precision,
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"training.accelerator = {settings.accelerator}, devices = {settings.devices}, precision = "
                f"{settings.precision}: this machine cannot ({error})"
            ) from None
        self._fabric.launch()
        # Launching several processes shares out the cores; the number of threads is a parameter, not a guess.
        torch.set_num_threads(settings.threads)
        self.device: torch.device = self._fabric.device
        self.rank: int = self._fabric.global_rank
        self.world: int = self._fabric.world_size
        self.dtype = torch.float64 if settings.precision == "64-true" else torch.float32

    @property
    def environment(self) -> dict[str, Any]:
        """What, besides parameters, data and code, the bits of a result depend on."""
        return {
            "torch": torch.__version__,
            "numba": _version("numba"),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type,
            "processor": torch.backends.cpu.get_cpu_capability(),
            "world": self.world,
        }

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of ONE forward pass; its cast cache would keep old weights over an optimiser's step."""
        context: AbstractContextManager[Any] = self._fabric.autocast()
        return context

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its mean over all processes, in one all-reduce."""
        if self.world == 1 or not tensors:
            return
        flat = self._reduce(torch.cat([tensor.reshape(-1) for tensor in tensors]), "mean")
        offset = 0
        for tensor in tensors:
            tensor.copy_(flat[offset : offset + tensor.numel()].view_as(tensor))
            offset += tensor.numel()

    def gather(self, tensor: Tensor) -> Tensor:
        """(B, ...) of every process, stacked to (world * B, ...) in the order of ranks; gradients flow back."""
        if self.world == 1:
            return tensor
        return cast(Tensor, self._fabric.all_gather(tensor, sync_grads=True)).flatten(0, 1)

    def any(self, *flags: bool) -> list[bool]:
        """For every flag, whether it is set in at least one process."""
        if self.world == 1:
            return list(flags)
        total = self._reduce(torch.tensor(flags, dtype=torch.float32, device=self.device), "sum")
        return [bool(count > 0) for count in total.tolist()]

    def _reduce(self, tensor: Tensor, operation: str) -> Tensor:
        return cast(Tensor, self._fabric.all_reduce(tensor, reduce_op=operation))

    def barrier(self) -> None:
        """Wait for all processes."""
        self._fabric.barrier()

    def share_buffers(self, modules: Sequence[nn.Module]) -> None:
        """Average floating-point buffers (BatchNorm's statistics), which no gradient keeps equal between processes.

        Buffers that are not saved are constants, and rounding would change them.
        """
        if self.world > 1:
            saved = [module.state_dict(keep_vars=True) for module in modules]
            kept = [{id(value) for value in state.values()} for state in saved]
            buffers = [b for module, ids in zip(modules, kept, strict=True) for b in module.buffers() if id(b) in ids]
            self.mean_([buffer for buffer in buffers if buffer.is_floating_point()])
