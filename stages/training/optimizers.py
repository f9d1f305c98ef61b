"""AdamW as LGTM's official code has it, and what one update of an optimiser would make of its parameters."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer


class AdamW(Optimizer):
    """AdamW in the form of transformers 4.17 (LGTM card 3.5).

    m and v are the usual moving averages of the gradient and its square; at the t-th update of a parameter

        p <- p - lr * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps), and then p <- p - lr * weight_decay * p.

    torch.optim.AdamW has `eps` beside the corrected sqrt(v / (1 - b2^t)), and decays before the step. Its fused kernel
    is used here, with `eps / sqrt(1 - b2^t)`, which is the same; one pass over memory takes a tenth of the time of
    separate operations.

    Args:
        params, lr, betas, eps, weight_decay: as in torch.optim.AdamW; the defaults are those of the official code.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 5e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; the others, and their moments, are left alone.

        Raises:
            TypeError: a closure is given, which this optimiser has no use for.
        """
        if closure is not None:
            raise TypeError("AdamW takes no closure · compute the gradients, then call step()")
        for group in self.param_groups:
            # Parameters that had no gradient for a while have made fewer updates than others.
            alike: dict[int, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state.update(step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
                    state["step"] += 1
                    alike.setdefault(state["step"], []).append(parameter)
            for count, parameters in alike.items():
                gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
                means, squares = ([self.state[p][name] for p in parameters] for name in ("mean", "square"))
                _advance(group, group["lr"], count, parameters, gradients, means, squares)

    @torch.no_grad()
    def peek(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], rate: float) -> list[Tensor]:
        """See the function of this name: bit for bit what `step` would make of them."""
        found = []
        for parameter, gradient, group in zip(parameters, gradients, _groups(self, parameters), strict=True):
            peeked = parameter.detach()
            if gradient is not None:
                state = self.state.get(parameter)
                # One parameter at a time: what is copied of the state is gone before the next one's is.
                mean, square = (
                    state[name].clone() if state else torch.zeros_like(peeked) for name in ("mean", "square")
                )
                peeked = peeked.clone()
                _advance(group, rate, state["step"] + 1 if state else 1, [peeked], [gradient], [mean], [square])
            found.append(peeked)
        return found


def _advance(
    group: dict[str, Any],
    rate: float,
    count: int,
    parameters: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
) -> None:
    """The `count`-th update, of everything in place."""
    beta1, beta2 = group["betas"]
    # The kernel goes through memory as it lies.
    gradients = [
        g if g.stride() == p.stride() else torch.empty_like(p).copy_(g)
        for g, p in zip(gradients, parameters, strict=True)
    ]
    counts = [torch.tensor(float(count), device=parameters[0].device)] * len(parameters)
    torch._fused_adamw_(
        parameters,
        gradients,
        means,
        squares,
        [],
        counts,
        lr=rate,
        beta1=beta1,
        beta2=beta2,
        weight_decay=0.0,
        eps=group["eps"] / (1 - beta2**count) ** 0.5,
        amsgrad=False,
        maximize=False,
    )
    if group["weight_decay"]:
        torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])


def peek(
    optimizer: Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], rate: float
) -> list[Tensor]:
    """What one update of an optimiser would make of its parameters: the virtual step of LGTM (card 3.4, step 3).

    Neither the parameters, nor their `.grad`, nor the optimiser's state or learning rate change, and no copy of the
    state is kept.

    Args:
        optimizer: an `AdamW` of this module, or torch's SGD.
        parameters: some of the optimiser's own. gradients: one each, of its shape; None leaves the parameter alone.
        rate: the learning rate of that update.

    Returns:
        new tensors without a graph, in the order of the parameters. One without a gradient is the parameter itself.

    Raises:
        TypeError: another optimiser. KeyError: a parameter that is not the optimiser's.
    """
    if isinstance(optimizer, AdamW):
        return optimizer.peek(parameters, gradients, rate)
    if type(optimizer) is SGD:
        each = zip(parameters, gradients, _groups(optimizer, parameters), strict=True)
        return [p.detach() if g is None else _descend(optimizer, group, p, g, rate) for p, g, group in each]
    raise TypeError(f"{type(optimizer).__name__} cannot be peeked at · use stages.training.AdamW or torch.optim.SGD")


@torch.no_grad()
def _descend(optimizer: SGD, group: dict[str, Any], parameter: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """The update of torch's SGD, in its order of operations."""
    if group["maximize"]:
        gradient = -gradient
    if group["weight_decay"]:
        gradient = gradient.add(parameter, alpha=group["weight_decay"])
    if group["momentum"]:
        before = optimizer.state.get(parameter, {}).get("momentum_buffer")
        moved = gradient
        if before is not None:
            moved = before.mul(group["momentum"]).add_(gradient, alpha=1 - group["dampening"])
        gradient = gradient.add(moved, alpha=group["momentum"]) if group["nesterov"] else moved
    return parameter.add(gradient, alpha=-rate)


def _groups(optimizer: Optimizer, parameters: Sequence[Tensor]) -> list[dict[str, Any]]:
    """The group of each parameter."""
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    return [groups[id(parameter)] for parameter in parameters]
