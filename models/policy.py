"""Networks for policies: diffusion policies as teachers, a mixture of Gaussian experts as student (VDD card 3.3, 3.5).

All take raw observations (B, G + T, O): `goals` G that say what is wanted, none in most tasks, then T successive ones,
the newest last. T is at most the window, and less where an episode has just begun. They give raw actions; inside, and
in every loss, observations and actions are scaled to mean 0 and standard deviation 1.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SPREAD = 0.02  # of initial positions
BETWEEN = 100  # units of the layer between a transformer and what reads it
GOAL_MARGIN = 1.1  # how far actions of tasks with goals may lie outside the data's bounds
LARGEST_DRAW = 1 - 1e-6  # below the sum of probabilities, however that is rounded
Denoise = Callable[[Tensor, int], Tensor]


class Output(NamedTuple):
    """What a student says of every step, in scaled actions. `...` is (B, T) of a batch of windows.

    Attributes:
        mean: (..., K, A).
        factor: (..., K, A, A) lower Cholesky factors of the covariances, their diagonal positive; or (..., K, A), the
            diagonal alone, where covariances are diagonal.
        log_gate: (..., K), normalised.
    """

    mean: Tensor
    factor: Tensor
    log_gate: Tensor


class Decision(NamedTuple):
    """What a student does.

    Attributes:
        action: (B, A) raw. expert: (B,) int64, whose mean it is. probability: (B, K) of every expert, sums to 1.
    """

    action: Tensor
    expert: Tensor
    probability: Tensor


class Scaling(nn.Module):
    """(x - mean) / std, of observations and of actions. The numbers stand in the description, not among the weights.

    Args:
        goals: whether there are; then actions may lie further out.

    Attributes:
        low, high: (A,) the scaled actions' bounds: those of the data, or a tenth beyond (VDD card 3.7).
    """

    observation_mean: Tensor
    observation_std: Tensor
    action_mean: Tensor
    action_std: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, scaling: Mapping[str, Mapping[str, Sequence[float]]], goals: bool) -> None:
        super().__init__()
        for name in ("observation", "action"):
            std = torch.tensor(scaling[name]["std"])
            self.register_buffer(f"{name}_mean", torch.tensor(scaling[name]["mean"]), persistent=False)
            # What never changes stays as it is.
            self.register_buffer(f"{name}_std", torch.where(std > 0, std, 1.0), persistent=False)
        for name in ("low", "high"):
            bound = self.actions(torch.tensor(scaling["action"][name])) * (GOAL_MARGIN if goals else 1)
            self.register_buffer(name, bound, persistent=False)

    def observations(self, raw: Tensor) -> Tensor:
        """(..., O)."""
        return (raw - self.observation_mean) / self.observation_std

    def actions(self, raw: Tensor) -> Tensor:
        """(..., A)."""
        return (raw - self.action_mean) / self.action_std

    def clip(self, actions: Tensor) -> Tensor:
        """(..., A) scaled."""
        return actions.clamp(self.low, self.high)

    def raw(self, actions: Tensor) -> Tensor:
        """(..., A) scaled to raw."""
        return actions * self.action_std + self.action_mean


class Perceptron(nn.Module):
    """Linear layers with an activation between them (VDD card 3.5).

    Plain: `layers` times linear and activation, then a linear layer. Residual: a linear layer, then `layers` / 2 blocks
    x + W2 act(W1 act(x)), then a linear layer.

    Args:
        outputs: None leaves the last layer out.
        activation: "mish"; "prelu", which the official code takes instead (card 4.6); or "silu".
    """

    def __init__(
        self,
        inputs: int,
        outputs: int | None,
        width: int,
        layers: int,
        residual: bool = False,
        activation: str = "mish",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [inputs] + [width] * (layers + residual)
        self.layers = nn.ModuleList(map(nn.Linear, widths[:-1], widths[1:]))
        kind = {"mish": nn.Mish, "prelu": nn.PReLU, "silu": nn.SiLU}[activation]
        self.activations = nn.ModuleList(kind() for _ in range(layers))
        self.dropout = nn.Dropout(dropout)
        self.last = None if outputs is None else nn.Linear(widths[-1], outputs)
        self.residual = residual
        self.features = widths[-1]

    def hidden(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., features): all but the last layer."""
        return self.after_first(self.layers[0](x)) if self.layers else x

    def after_first(self, x: Tensor) -> Tensor:
        """(..., width), what the first linear layer gives, to (..., features)."""
        if self.residual:
            for block in range(0, len(self.activations), 2):
                first, second = self.activations[block : block + 2]
                inner = self.dropout(second(self.layers[block + 1](first(x))))
                x = x + self.layers[block + 2](inner)
            return x
        x = self.dropout(self.activations[0](x))
        for layer, activation in zip(self.layers[1:], self.activations[1:], strict=True):
            x = self.dropout(activation(layer(x)))
        return x

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs), or (..., features) without a last layer."""
        x = self.hidden(x)
        return x if self.last is None else self.last(x)


class Layer(nn.Module):
    """A layer of a pre-norm transformer that is asked only for the tokens that are read afterwards."""

    def __init__(self, width: int, heads: int, attention_dropout: float, dropout: float) -> None:
        super().__init__()
        self.heads, self.scale, self.attention_dropout = heads, (width // heads) ** -0.5, attention_dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.memory = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor, read: slice = slice(None)) -> Tensor:
        """(B, L, width) and an additive mask (L, L) to (B, read tokens, width)."""
        normed = self.norm1(x)
        key, value = map(self._split, self.memory(normed).chunk(2, -1))
        query = self._split(self.query(normed[:, read]))
        dropout = self.attention_dropout if self.training else 0.0
        found = F.scaled_dot_product_attention(
            query, key, value, mask[read].to(query.dtype), dropout_p=dropout, scale=self.scale
        )
        x = x[:, read] + self.dropout(self.project(found.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp(self.norm2(x)))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Transformer(nn.Module):
    """Observations, and of a teacher the noise level and noisy actions, as tokens that see themselves and earlier ones.

    A student's tokens are [goals, s1, s2, ...], read at s1, s2, ...; a teacher's [level, goals, s1, a1, s2, a2, ...],
    read at a1, a2, ... (VDD card 3.5 and 5). Goals and observations share one embedding; s and a of a step share their
    learned position.

    Args:
        outputs: per step. level: from (M,) noise levels to (M, width); None for a student, which takes no actions.
        init_std: of the weights; None: as torch has it, by the width of what goes in.
    """

    mask: Tensor

    def __init__(
        self,
        observations: int,
        actions: int,
        outputs: int,
        window: int,
        goals: int,
        level: nn.Module | None,
        *,
        layers: int,
        heads: int,
        width: int,
        attention_dropout: float,
        dropout: float,
        init_std: float | None,
    ) -> None:
        super().__init__()
        self.goals, self.features = goals, outputs
        self.observe = nn.Linear(observations, width)
        self.positions = nn.Parameter(SPREAD * torch.randn(goals + window, width))
        self.act = None if level is None else nn.Linear(actions, width)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(width, heads, attention_dropout, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Sequential(nn.Linear(width, BETWEEN), nn.SiLU(), nn.Linear(BETWEEN, outputs))
        tokens = goals + window if level is None else 1 + goals + 2 * window
        self.register_buffer("mask", torch.full((tokens, tokens), -math.inf).triu(1), persistent=False)
        if init_std is not None:
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, 0, init_std)
                    nn.init.zeros_(module.bias)
        self.level = level

    def forward(
        self, observations: Tensor, actions: Tensor | None = None, level: Tensor | None = None, last: bool = False
    ) -> Tensor:
        """(B, G + T, O), and of a teacher (M, T, A) and (M,) or (1,), to (B or M, T, outputs).

        M is a multiple of B: the first M / B actions belong to the first observations, and so on.

        Args:
            last: give the last step only, (B or M, 1, outputs).
        """
        length = observations.shape[1]
        tokens = self.observe(observations) + self.positions[:length]
        first, stride = self.goals, 1
        if actions is not None and self.act is not None and self.level is not None:
            tokens = spread(tokens, actions)
            noisy = self.act(actions) + self.positions[self.goals : length]
            pairs = torch.stack([tokens[:, self.goals :], noisy], 2).flatten(1, 2)
            levels = self.level(level)[:, None].expand(tokens.shape[0], -1, -1)
            tokens = torch.cat([levels, tokens[:, : self.goals], pairs], 1)
            first, stride = self.goals + 2, 2
        x = self.dropout(tokens)
        mask = self.mask[: tokens.shape[1], : tokens.shape[1]]
        for layer in self.layers[:-1]:
            x = layer(x, mask)
        x = self.layers[-1](x, mask, slice(-1, None) if last else slice(first, None, stride))
        return cast(Tensor, self.output(self.norm(x)))


class History(nn.Module):
    """A perceptron that sees, at every step, goals and all observations of the window up to that step in one row: the
    latest, and the changes that led to it, in standard deviations of such changes.

    Observations of one window are nearly the same, and what a policy has to know of them is how they differ: with
    changes on the scale of observations, it would learn that last. Before the window begins nothing changes. Of actions
    it sees that of the step alone. Arguments, `forward` and attributes are those of `Transformer`; a student's features
    are its last hidden layer.

    Args:
        change: (O,) standard deviation of a change of scaled observations from step to step.
        frequencies: sines and cosines of the latest observation, times each, are seen too (Tancik et al., NeurIPS
            2020): a perceptron alone learns slowly what turns on small differences of place.
    """

    change: Tensor
    frequencies: Tensor

    def __init__(
        self,
        observations: int,
        actions: int,
        outputs: int | None,
        window: int,
        goals: int,
        level: nn.Module | None,
        *,
        change: Tensor,
        frequencies: Sequence[float] = (),
        **perceptron: Any,
    ) -> None:
        super().__init__()
        self.goals, self.window = goals, window
        self.register_buffer("change", change, persistent=False)
        self.register_buffer("frequencies", torch.tensor(frequencies), persistent=False)
        inputs = (goals + window + 2 * len(frequencies)) * observations
        self.network = Perceptron(inputs, outputs, **perceptron)
        self.features = self.network.features
        self.act = None if level is None else nn.Linear(actions, self.features, bias=False)
        self.level = level

    def forward(
        self, observations: Tensor, actions: Tensor | None = None, level: Tensor | None = None, last: bool = False
    ) -> Tensor:
        """See `Transformer.forward`. What observations alone decide is computed once for all their actions.

        Args:
            last: or with actions (M, 1, A), which are those of the last step.
        """
        last = last or (actions is not None and actions.shape[1] == 1)
        seen = self._rows(observations, last)
        if actions is None or self.act is None or self.level is None:
            return cast(Tensor, self.network(seen))
        noisy = self.act(actions[:, -1:] if last else actions) + self.level(level)[:, None]
        hidden = self.network.after_first(spread(self.network.layers[0](seen), noisy) + noisy)
        return cast(Tensor, cast(nn.Linear, self.network.last)(hidden))

    def _rows(self, observations: Tensor, last: bool) -> Tensor:
        """(B, G + T, O) to (B, T or 1, (G + window) O)."""
        goals, states = observations[:, : self.goals], observations[:, self.goals :]
        padded = torch.cat([states[:, :1].expand(-1, self.window - 1, -1), states], 1)
        changes = (padded[:, 1:] - padded[:, :-1]) / self.change
        if last:
            rows = torch.cat([states[:, -1:], changes[:, None, changes.shape[1] - self.window + 1 :].flatten(2)], 2)
        elif self.window == 1:
            rows = states
        else:
            rows = torch.cat([states, changes.unfold(1, self.window - 1, 1).transpose(2, 3).flatten(2)], 2)
        if len(self.frequencies):
            angles = (rows[..., None, : states.shape[2]] * self.frequencies[:, None]).flatten(2)
            rows = torch.cat([rows, angles.sin(), angles.cos()], 2)
        if not self.goals:
            return rows
        return torch.cat([goals.flatten(1)[:, None].expand(-1, rows.shape[1], -1), rows], 2)


def spread(x: Tensor, actions: Tensor) -> Tensor:
    """(B, ...) to (M, ...), each row as often as (M, ...) actions ask for, one after the other."""
    count = actions.shape[0] // x.shape[0]
    return x if count == 1 else x.repeat_interleave(count, 0)


class LogSigma(nn.Module):
    """(M,) levels sigma to (M, width), from log(sigma) / 4."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(1, width), nn.Mish(), nn.Linear(width, width))

    def forward(self, sigma: Tensor) -> Tensor:
        return cast(Tensor, self.network(sigma.log()[:, None] / 4))


class Diffusion(nn.Module, ABC):
    """A teacher: a network that is told a noise level, noisy actions of a window, and its observations.

    Attributes:
        steps: calls of the network per action, where nothing else is asked for.
        goals: observations that come before those of the window.
    """

    def __init__(self, interface: Mapping[str, Any], network: Mapping[str, Any], level: type[nn.Module] | int) -> None:
        super().__init__()
        self.scaling = Scaling(interface["scaling"], network["goals"] > 0)
        self.actions, self.goals, self.steps = interface["actions"], network["goals"], network["steps"]
        width = network["backbone"]["width"]
        embedding = nn.Embedding(level, width) if isinstance(level, int) else level(width)
        self.network = _backbone(interface, network, interface["actions"], embedding)

    def forward(self, noisy: Tensor, observations: Tensor, level: Tensor) -> Tensor:
        """What the network itself gives, (M, T, A), for scaled actions (M, T, A), raw observations (B, G + T, O) with M
        a multiple of B (the first M / B actions belong to the first observations, and so on), and levels (M,) or (1,).
        """
        return cast(Tensor, self.network(self.scaling.observations(observations), noisy, level))

    @property
    @abstractmethod
    def levels(self) -> tuple[float, float]:
        """The lowest and the highest noise level that it was trained with."""

    @abstractmethod
    def level_at(self, uniform: Tensor) -> Tensor:
        """Levels as training draws them, (M,), from numbers in [0, 1), (M,)."""

    @abstractmethod
    def corrupt(self, actions: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """Scaled actions (M, T, A) with noise (M, T, A) of standard deviation 1 at levels (M,)."""

    @abstractmethod
    def target(self, actions: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """What the network learns to give for `corrupt` of the same, (M, T, A)."""

    @abstractmethod
    def denoise(self, noisy: Tensor, observations: Tensor, level: Tensor) -> Tensor:
        """The expected scaled actions (M, T, A) behind noisy ones; arguments as in `forward`."""

    @abstractmethod
    def score(self, actions: Tensor, observations: Tensor, level: Tensor) -> Tensor:
        """Gradient of the log-density of scaled actions (M, T, A) at levels (M,); arguments as in `forward`."""

    @abstractmethod
    def sample(self, observations: Tensor, noise: Tensor) -> Tensor:
        """Scaled actions (B, T, A) for raw observations (B, G + T, O), in as many calls as `noise` (calls, B, T, A) of
        standard deviation 1 has.
        """

    def loss(self, actions: Tensor, observations: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """Mean squared error of what the network gives, over everything; a scalar in float32, or wider."""
        found = self(self.corrupt(actions, noise, level), observations, level)
        target = self.target(actions, noise, level)
        return F.mse_loss(found.to(target.dtype), target)

    def draw(self, observations: Tensor, generator: torch.Generator | None = None, steps: int | None = None) -> Tensor:
        """Noise for `sample`: (steps, B, T, A)."""
        shape = (steps or self.steps, observations.shape[0], observations.shape[1] - self.goals, self.actions)
        return torch.randn(shape, generator=generator, device=observations.device, dtype=observations.dtype)

    def act(self, observations: Tensor, generator: torch.Generator | None = None, steps: int | None = None) -> Tensor:
        """A raw action (B, A) for each (G + T, O) raw observations, drawn in `steps` calls of the network.

        Raises:
            ValueError: it cannot be run with so many.
        """
        return self.decide(observations, self.draw(observations, generator, steps))

    def decide(self, observations: Tensor, noise: Tensor) -> Tensor:
        """`act`, with the noise as an input, (steps, B, T, A)."""
        if isinstance(self.network, History):  # the last action is decided without those before it
            noise = noise[:, :, -1:]
        return self.scaling.raw(self.sample(observations, noise)[:, -1])


class DDPM(Diffusion):
    """Predicts noise; D3IL's cosine schedule; actions are clipped at every step (VDD card 3.3 and 5).

    Attributes:
        kept: (T,) the share of variance that is the actions' own after each step, alpha-bar, from 1 down to about 0.
    """

    kept: Tensor

    def __init__(self, interface: Mapping[str, Any], network: Mapping[str, Any]) -> None:
        super().__init__(interface, network, network["steps"])
        self._kept = cosine_schedule(self.steps)[1].tolist()
        self.register_buffer("kept", torch.tensor(self._kept), persistent=False)

    @property
    def levels(self) -> tuple[int, int]:
        """Steps of the schedule, from 0."""
        return 0, self.steps - 1

    def level_at(self, uniform: Tensor) -> Tensor:
        """(M,) int64, each step of the schedule alike."""
        return (uniform * self.steps).long()

    def _weights(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Of actions and of noise, (M, 1, 1)."""
        kept = self.kept[level].view(-1, 1, 1)
        return kept.sqrt(), (1 - kept).sqrt()

    def corrupt(self, actions: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        own, others = self._weights(level)
        return own * actions + others * noise

    def target(self, actions: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        return noise

    def denoise(self, noisy: Tensor, observations: Tensor, level: Tensor) -> Tensor:
        """Clipped to the bounds of the data."""
        own, others = self._weights(level)
        return self.scaling.clip((noisy - others * self(noisy, observations, level)) / own)

    def score(self, actions: Tensor, observations: Tensor, level: Tensor) -> Tensor:
        """Of actions that are taken for noisy ones of that step (VDD card 3.3, `raw`)."""
        return -self(actions, observations, level) / self._weights(level)[1]

    def sample(self, observations: Tensor, noise: Tensor) -> Tensor:
        """Ancestral sampling; fewer calls than the schedule has steps skip some of them, evenly.

        Raises:
            ValueError: more calls than the schedule has steps.
        """
        calls = noise.shape[0]
        if calls > self.steps:
            raise ValueError(f"{calls} calls, and the schedule has {self.steps} steps · ask for no more than these")
        times = torch.linspace(self.steps - 1, 0, calls, dtype=torch.float64).round().int().tolist()

        def denoise(noisy: Tensor, call: int) -> Tensor:
            return self.denoise(noisy, observations, torch.tensor([times[call]], device=noisy.device))

        return ancestral(denoise, noise, [self._kept[time] for time in times])


class BESO(Diffusion):
    """A denoiser with the preconditioning of Karras et al. 2022, table 1 (VDD card 3.3 and 5)."""

    def __init__(self, interface: Mapping[str, Any], network: Mapping[str, Any]) -> None:
        super().__init__(interface, network, LogSigma)
        self._settings = {name: network[name] for name in ("sigma_min", "sigma_max", "sigma_data", "spread", "rho")}
        self._sampler = {"euler_ancestral": euler_ancestral, "ddim": ddim}[network["sampler"]]

    @property
    def levels(self) -> tuple[float, float]:
        """sigma_min and sigma_max."""
        return self._settings["sigma_min"], self._settings["sigma_max"]

    def level_at(self, uniform: Tensor) -> Tensor:
        """Log-logistic around sigma_data, cut off at `levels`, by its inverse distribution function."""
        centre, width = math.log(self._settings["sigma_data"]), self._settings["spread"]
        low, high = (1 / (1 + math.exp((centre - math.log(level)) / width)) for level in self.levels)
        return (centre + width * torch.logit(low + (high - low) * uniform)).exp()

    def forward(self, noisy: Tensor, observations: Tensor, level: Tensor) -> Tensor:
        return super().forward(self._preconditioning(level)[2] * noisy, observations, level)

    def corrupt(self, actions: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        return actions + level.view(-1, 1, 1) * noise

    def target(self, actions: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        skip, out, _ = self._preconditioning(level)
        return (actions - skip * self.corrupt(actions, noise, level)) / out

    def _preconditioning(self, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return karras(level.view(-1, 1, 1), self._settings["sigma_data"])

    def denoise(self, noisy: Tensor, observations: Tensor, level: Tensor) -> Tensor:
        skip, out, _ = self._preconditioning(level)
        return skip * noisy + out * self(noisy, observations, level)

    def score(self, actions: Tensor, observations: Tensor, level: Tensor) -> Tensor:
        """(denoise - actions) / sigma^2, without the difference of two near numbers (VDD card 3.3)."""
        _, out, into = self._preconditioning(level)
        sigma = level.view(-1, 1, 1)
        return out / sigma**2 * self(actions, observations, level) - into**2 * actions

    def sample(self, observations: Tensor, noise: Tensor) -> Tensor:
        """Karras' levels from sigma_max to sigma_min, and at last 0; clipped to the bounds of the data at the end."""
        low, high = self.levels
        sigmas = karras_levels(noise.shape[0], low, high, self._settings["rho"])

        def denoise(noisy: Tensor, call: int) -> Tensor:
            return self.denoise(noisy, observations, torch.tensor([sigmas[call]]).to(noisy))

        return self.scaling.clip(self._sampler(denoise, noise, sigmas))


class Mixture(nn.Module):
    """A student: one trunk, and three heads that give all experts' means, covariances, and the gate (VDD card 3.5).

    Attributes:
        goals: observations that come before those of the window. count: K, of experts. gate: None where it is uniform.
        gate_trains_trunk: whether a loss of the gate reaches the trunk. Methods that train the two by turns do not want
            that (card 3.4); likelihood does.
    """

    def __init__(self, interface: Mapping[str, Any], network: Mapping[str, Any]) -> None:
        super().__init__()
        self.scaling = Scaling(interface["scaling"], network["goals"] > 0)
        self.actions, self.goals, self.count = interface["actions"], network["goals"], network["experts"]
        self.gate_trains_trunk = False
        self._stds = network["init_std"], network["min_std"]
        self.trunk = _backbone(interface, network, None, None)
        features = cast(int, self.trunk.features)
        wide = self.count * self.actions
        self._diagonal = network["covariance"] == "diagonal"
        entries = wide if self._diagonal else wide * (self.actions + 1) // 2
        self.mean_head = Perceptron(features, wide, **network["heads"])
        self.covariance_head = Perceptron(features, entries, **network["heads"])
        self.gate = None
        if network["gate"] == "learned":
            self.gate = Perceptron(features, self.count, **network["gate_head"])
        for head in (self.mean_head, self.covariance_head, self.gate):
            for layer in head.modules() if head is not None else ():
                if isinstance(layer, nn.Linear):
                    nn.init.orthogonal_(layer.weight, network["gain"])
                    nn.init.zeros_(layer.bias)
        last = cast(nn.Linear, self.mean_head.last)
        nn.init.zeros_(last.weight)
        nn.init.uniform_(last.bias, -network["bias"], network["bias"])

    def expert_parameters(self) -> list[nn.Parameter]:
        """Of trunk, means and covariances."""
        return [x for part in (self.trunk, self.mean_head, self.covariance_head) for x in part.parameters()]

    def gate_parameters(self) -> list[nn.Parameter]:
        """Of the gate; none where it is uniform."""
        return [] if self.gate is None else list(self.gate.parameters())

    def features(self, observations: Tensor, last: bool = False) -> Tensor:
        """Raw observations (B, G + T, O) to what the heads see, (B, T, h); of the last step only, (B, 1, h)."""
        return cast(Tensor, self.trunk(self.scaling.observations(observations), last=last))

    def experts(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(..., h) to scaled means and factors as in `Output`, float32 at least."""
        mean = _wide(self.mean_head(features)).unflatten(-1, (self.count, self.actions))
        raw = _wide(self.covariance_head(features)).unflatten(-1, (self.count, -1))
        return mean, (deviations if self._diagonal else factors)(raw, *self._stds)

    def log_gate(self, features: Tensor) -> Tensor:
        """(..., h) to log-probabilities (..., K), float32 at least."""
        return self._gate_logits(features).log_softmax(-1)

    def _gate_logits(self, features: Tensor) -> Tensor:
        if self.gate is None:
            return _wide(features).new_zeros((*features.shape[:-1], self.count))
        return _wide(self.gate(features if self.gate_trains_trunk else features.detach()))

    def forward(self, observations: Tensor) -> Output:
        """Raw observations (B, G + T, O)."""
        features = self.features(observations)
        return Output(*self.experts(features), self.log_gate(features))

    def step(self, observations: Tensor, draw: Tensor | None = None, allowed: Tensor | None = None) -> Decision:
        """Act on the last of raw observations (B, G + T, O): gate first, then the mean of the chosen expert alone.

        Args:
            draw: (B,) a number in [0, 1) chooses an expert by probability; a negative one, or None, the likeliest.
            allowed: (B or 1, K) bool, which experts may be chosen; the others' probability is shared out.

        Raises:
            ValueError: no expert is allowed (unless while tracing).
        """
        features = self.features(observations, last=True)[:, 0]
        logits = self._gate_logits(features)
        if allowed is not None:
            if not torch.jit.is_tracing() and not bool(allowed.any(1).all()):  # type: ignore[attr-defined]
                raise ValueError(f"no expert is allowed in a row of {tuple(allowed.shape)} · allow at least one")
            logits = logits.masked_fill(~allowed, -math.inf)
        probability = logits.softmax(1)
        expert = probability.argmax(1)
        if draw is not None:
            until = probability.cumsum(1)
            point = draw.clamp(max=LARGEST_DRAW)[:, None] * until[:, -1:]
            expert = torch.where(draw < 0, expert, (until <= point).sum(1))
        shape, last = (self.count, self.actions), cast(nn.Linear, self.mean_head.last)
        weight, bias = last.weight.unflatten(0, shape), last.bias.unflatten(0, shape)
        mean = (weight[expert] @ self.mean_head.hidden(features)[:, :, None])[:, :, 0] + bias[expert]
        return Decision(self.scaling.raw(self.scaling.clip(mean)), expert, probability)

    def act(self, observations: Tensor, generator: torch.Generator | None = None, greedy: bool = False) -> Decision:
        """`step` with a number drawn for every row, or with the likeliest expert."""
        if greedy:
            return self.step(observations)
        shape = (observations.shape[0],)
        draw = torch.rand(shape, generator=generator, device=observations.device, dtype=observations.dtype)
        return self.step(observations, draw)

    def log_density(self, observations: Tensor, actions: Tensor) -> Tensor:
        """log q(a | s) in nats (B, T) of raw actions (B, T, A), per unit of raw actions."""
        scaled = log_likelihood(self(observations), self.scaling.actions(actions))
        return scaled - self.scaling.action_std.log().sum()


def factors(raw: Tensor, init_std: float, min_std: float) -> Tensor:
    """Lower Cholesky factors (..., A, A) from unconstrained numbers (..., A (A + 1) / 2), row after row (VDD card 3.5).

    The diagonal is that of `deviations`; the rest is as it is.
    """
    actions = (math.isqrt(8 * raw.shape[-1] + 1) - 1) // 2
    rows, columns = torch.tril_indices(actions, actions)
    places = torch.full((actions, actions), raw.shape[-1])
    places[rows, columns] = torch.arange(raw.shape[-1])
    square = F.pad(raw, (0, 1))[..., places.to(raw.device)]
    diagonal = torch.eye(actions, dtype=torch.bool, device=raw.device)
    return torch.where(diagonal, deviations(square, init_std, min_std), square)


def deviations(raw: Tensor, init_std: float, min_std: float) -> Tensor:
    """softplus(raw + c) + min_std, with c such that raw = 0 gives init_std."""
    return F.softplus(raw + math.log(math.expm1(init_std - min_std))) + min_std


def log_components(output: Output, actions: Tensor) -> Tensor:
    """log N(a; mean_k, factor_k factor_k^T) of scaled actions (..., A) under every expert, (..., K), in nats."""
    mean, factor, _ = output
    difference = actions[..., None, :] - mean
    if factor.dim() == mean.dim():
        white, scales = difference / factor, factor
    else:
        white = torch.linalg.solve_triangular(factor, difference[..., None], upper=False)[..., 0]
        scales = factor.diagonal(dim1=-2, dim2=-1)
    return -0.5 * (white.square().sum(-1) + actions.shape[-1] * math.log(2 * math.pi)) - scales.log().sum(-1)


def log_likelihood(output: Output, actions: Tensor) -> Tensor:
    """log q(a | s) of scaled actions (..., A), (...), in nats: the mixture's, by logsumexp (VDD card 4.1)."""
    return torch.logsumexp(output.log_gate + log_components(output, actions), -1)


def cosine_schedule(steps: int) -> tuple[Tensor, Tensor]:
    """beta and alpha-bar, (steps,) float64 each, of D3IL's cosine schedule (VDD card 3.3)."""
    x = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((x + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = (1 - f[1:] / f[:-1]).clamp(0, 0.999)
    return beta, (1 - beta).cumprod(0)


def karras(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out and c_in, each of the shape of sigma (VDD card 3.3)."""
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt()


def karras_levels(count: int, low: float, high: float, rho: float) -> list[float]:
    """From high to low, evenly spaced in sigma^(1 / rho) (Karras et al. 2022, equation 5); one is high alone."""
    ends = high ** (1 / rho), low ** (1 / rho)
    return [(ends[0] + place / max(1, count - 1) * (ends[1] - ends[0])) ** rho for place in range(count)]


def ancestral(denoise: Denoise, noise: Tensor, kept: Sequence[float]) -> Tensor:
    """Sample by the posterior of each step given the clean actions that are expected (Ho et al. 2020, equation 7).

    Args:
        denoise: noisy actions and the number of the call to the clean actions that are expected behind them.
        noise: (calls, ...) of standard deviation 1; the first is what it begins with.
        kept: alpha-bar of every call, rising.
    """
    x = noise[0]
    for call, now in enumerate(kept):
        clean = denoise(x, call)
        if call + 1 == len(kept):
            return clean
        after = kept[call + 1]
        own = now / after
        x = (math.sqrt(after) * (1 - own) * clean + math.sqrt(own) * (1 - after) * x) / (1 - now)
        x = x + math.sqrt((1 - after) / (1 - now) * (1 - own)) * noise[call + 1]
    return x


def euler_ancestral(denoise: Denoise, noise: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Steps of Euler's method that go below the next level, and noise that goes back up to it.

    Args:
        denoise, noise: as in `ancestral`. sigmas: of every call, falling; after the last comes 0.
    """
    x = noise[0] * sigmas[0]
    for call, (now, after) in enumerate(zip(sigmas, [*sigmas[1:], 0.0], strict=True)):
        up = min(after, math.sqrt(after**2 * (now**2 - after**2) / now**2))
        down = math.sqrt(after**2 - up**2)
        x = down / now * x + (1 - down / now) * denoise(x, call)
        if after:
            x = x + up * noise[call + 1]
    return x


def ddim(denoise: Denoise, noise: Tensor, sigmas: Sequence[float]) -> Tensor:
    """x <- (sigma' / sigma) x + (1 - sigma' / sigma) denoise(x), from the first noise alone (VDD card 5).

    Arguments as in `euler_ancestral`.
    """
    x = noise[0] * sigmas[0]
    for call, (now, after) in enumerate(zip(sigmas, [*sigmas[1:], 0.0], strict=True)):
        x = after / now * x + (1 - after / now) * denoise(x, call)
    return x


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize < 4 else x


def _backbone(
    interface: Mapping[str, Any], network: Mapping[str, Any], outputs: int | None, level: nn.Module | None
) -> nn.Module:
    """What reads a window: per step `outputs` numbers, or features where that is None."""
    settings = dict(network["backbone"])
    sizes = {"observations": interface["observations"], "actions": interface["actions"]}
    sizes |= {"window": network["window"], "goals": network["goals"]}
    if settings.pop("name") == "transformer":
        return Transformer(outputs=outputs or settings["width"], level=level, **sizes, **settings)
    scaling = {name: torch.tensor(value) for name, value in interface["scaling"]["observation"].items()}
    change = torch.where(scaling["change"] > 0, scaling["change"] / scaling["std"], 1.0)
    return History(outputs=outputs, level=level, change=change, **sizes, **settings)


def build(description: Mapping[str, Any]) -> nn.Module:
    """A network with fresh weights from a model's description (`network` and `interface`)."""
    network = description["network"]
    return {"ddpm": DDPM, "beso": BESO, "mixture": Mixture}[network["name"]](description["interface"], network)
