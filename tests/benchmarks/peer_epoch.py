"""One epoch of Flow-GRPO in PyTorch, with the models of diffusers and the adapters of PEFT.

What `rollout`, `decode` and `learner.update` of this package do with the settings of the quickstart
(`flow_sde`, shared noise, the velocity's ratio, AdamW, an average of the weights), as plainly as
PyTorch's users would write it; the noise is given, so that both sides' results can be compared.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from pairing import torch_device

from sl_jax.grpo.config import GrpoConfig
from sl_jax.models.rope import LatentGrid

Tensor = torch.Tensor


class PeerBatch(NamedTuple):
    """What one rollout batch is given.

    Attributes:
        pictures: [n, 4, h, w] from −1 to 1.
        text: [n, s, e].
        start: noise of each group at σ = 1, [n, tokens, 64].
        noise: of the stochastic steps, [window, B, tokens, 64].
        advantage: per sample.
    """

    pictures: Tensor
    text: Tensor
    start: Tensor
    noise: Tensor
    advantage: Tensor


class _Rolled(NamedTuple):
    """The stored steps of a batch, and its layers in uint8."""

    steps: list[tuple[int, Tensor, Tensor]]
    condition: Tensor
    text: Tensor
    layers: Tensor
    latents: Tensor


class PeerEpoch:
    """Models and optimizer state; `run` is one epoch from the first adapter on.

    Args:
        transformer: with an adapter of PEFT named "default".
        vae: the autoencoder.
        sigmas: of the rollout.
        config: of the run.
        grid: of its only bucket.
        window_start: first stochastic step.
    """

    def __init__(
        self,
        transformer: QwenImageTransformer2DModel,
        vae: AutoencoderKLQwenImage,
        sigmas: np.ndarray,
        config: GrpoConfig,
        grid: LatentGrid,
        window_start: int,
    ):
        self._transformer, self._vae = transformer, vae
        self._sigmas = [float(sigma) for sigma in sigmas]
        self._config, self._grid, self._start = config, grid, window_start
        self.trained = {n: p for n, p in transformer.named_parameters() if p.requires_grad}
        self._first = {name: p.detach().clone() for name, p in self.trained.items()}
        shape = (1, vae.config.z_dim, 1, 1, 1)
        self._mean, self._std = (
            torch.tensor(values, device=torch_device()).view(shape)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )

    def run(self, batches: list[PeerBatch]) -> list[_Rolled]:
        """Rolls out and decodes all batches, and updates once on each."""
        self._restore(self._first)
        config = self._config.optimizer
        optimizer = torch.optim.AdamW(
            self.trained.values(),
            lr=config.learning_rate,
            betas=(config.b1, config.b2),
            weight_decay=config.weight_decay,
        )
        average = {name: p.clone() for name, p in self._first.items()}
        with torch.no_grad():
            rolled = [self._roll_out(batch) for batch in batches]
        for number, (batch, steps) in enumerate(zip(batches, rolled, strict=True)):
            optimizer.zero_grad()
            self._gradient(batch, steps, on_policy=number == 0)
            torch.nn.utils.clip_grad_norm_(self.trained.values(), config.clip_norm)
            optimizer.step()
            with torch.no_grad():
                for name, parameter in self.trained.items():
                    average[name].lerp_(parameter, 1 - self._config.learner.ema)
        return rolled

    def _restore(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(values[name])

    def _velocity(self, x: Tensor, condition: Tensor, text: Tensor, index: int) -> Tensor:
        grid, rows = self._grid, len(x)
        made = self._transformer(
            hidden_states=torch.cat([x, condition], 1),
            encoder_hidden_states=text,
            timestep=torch.full((rows,), self._sigmas[index], device=x.device),
            img_shapes=[[(1, grid.height, grid.width)] * (grid.layers + 2)] * rows,
            additional_t_cond=torch.zeros(rows, dtype=torch.long, device=x.device),
            return_dict=False,
        )[0]
        return made[:, : grid.generated_tokens]

    def _roll_out(self, batch: PeerBatch) -> _Rolled:
        rollout, sigmas = self._config.rollout, self._sigmas
        condition, text, x = self._encoded(batch.pictures), batch.text, batch.start
        steps = []
        for index in range(rollout.steps):
            if index == self._start:
                condition, text, x = (
                    part.repeat_interleave(rollout.group_size, 0) for part in (condition, text, x)
                )
            velocity = self._velocity(x, condition, text, index)
            number = index - self._start
            if not 0 <= number < rollout.window_size:
                x = x + (sigmas[index + 1] - sigmas[index]) * velocity
                continue
            by_x, by_velocity, std = self._coefficients(index)
            after = by_x * x + by_velocity * velocity + std * batch.noise[number]
            steps.append((index, x, after))
            x = after
        return _Rolled(steps, condition, text, self._decoded(x), x)

    def _coefficients(self, index: int) -> tuple[float, float, float]:
        """Of the next latents' mean by latents and velocity, and the noise's."""
        t, after = self._sigmas[index : index + 2]
        below = 1 - (self._sigmas[1] if t == 1 else t)
        dt, squared = after - t, self._config.rollout.noise_level**2 * t / below
        drift = squared / (2 * t) * dt
        return 1 + drift, dt + drift * (1 - t), (-dt * squared) ** 0.5

    def _gradient(self, batch: PeerBatch, rolled: _Rolled, on_policy: bool) -> None:
        """Adds the gradient of the clipped objective over all stored steps of a batch."""
        objective = self._config.objective
        now = {name: p.detach().clone() for name, p in self.trained.items()}
        given = (rolled.condition, rolled.text)
        limit = objective.advantage_limit
        advantage = batch.advantage.clamp(-limit, limit)
        for index, x, after in rolled.steps:
            by_x, by_velocity, std = self._coefficients(index)
            old = None
            if not on_policy:
                self._restore(self._first)
                with torch.no_grad():
                    old = self._velocity(x, *given, index)
                self._restore(now)
            velocity = self._velocity(x, *given, index)
            old = velocity.detach() if old is None else old
            noise = (after - by_x * x - by_velocity * old) / std
            sign = 1.0 if by_velocity > 0 else -1.0
            moved = (noise * (velocity - old)).mean((1, 2))
            ratio = torch.exp(sign * x[0].numel() ** 0.5 * moved)
            clipped = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
            loss = torch.maximum(-advantage * ratio, -advantage * clipped).mean()
            (loss / len(rolled.steps)).backward()

    def _encoded(self, pictures: Tensor) -> Tensor:
        latents = self._vae.encode(pictures[:, :, None]).latent_dist.mean
        return self._packed((latents - self._mean) / self._std)

    def _packed(self, latents: Tensor) -> Tensor:
        rows, channels, frames, height, width = latents.shape
        parts = latents.view(rows, channels, frames, height // 2, 2, width // 2, 2)
        return parts.permute(0, 2, 3, 5, 1, 4, 6).reshape(rows, -1, 4 * channels)

    def _decoded(self, tokens: Tensor) -> Tensor:
        """Layers [B, L, 4, h, w] in uint8, without frame 0."""
        grid, rows = self._grid, len(tokens)
        parts = tokens.view(rows, grid.layers + 1, grid.height, grid.width, -1, 2, 2)[:, 1:]
        frames = parts.permute(0, 1, 4, 2, 5, 3, 6).reshape(
            rows * grid.layers, -1, 1, 2 * grid.height, 2 * grid.width
        )
        pixels = self._vae.decode(frames * self._std + self._mean).sample[:, :, 0]
        whole = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return whole.view(rows, grid.layers, *whole.shape[1:])


def peer_batch(**arrays: Any) -> PeerBatch:
    """From numpy arrays, on the peer's device."""
    return PeerBatch(
        **{
            name: torch.from_numpy(np.array(value, np.float32)).to(torch_device())
            for name, value in arrays.items()
        }
    )
