"""What stands beside an exported adapter: a model card, and a script that runs it in PyTorch."""

import json
import math
import re
from collections.abc import Mapping
from string import Template
from typing import Any, NamedTuple

from etils import epath

from sl_jax.checkpoints.huggingface import CheckpointError
from sl_jax.imaging.words import printable

_PLAIN = re.compile(r"[\w./-]+")


class CardSettings(NamedTuple):
    """How the adapter is to be sampled; see `inference.decomposer.Sampling`."""

    layers: int
    steps: int
    size: int
    prompt: str


class Training(NamedTuple):
    """What a run of this package tells of how it trained an adapter.

    Attributes:
        by_reward: by Flow-GRPO; otherwise supervised, on layers.
        guidance: scale of classifier-free guidance in training; 1 is none.
        negative_prompt: that guidance leads away from.
    """

    by_reward: bool
    guidance: float
    negative_prompt: str


def training_of(config: Mapping[str, Any]) -> Training | None:
    """What the configuration of a run says of its training; None of an empty one.

    Raises:
        CheckpointError: it is not what a run of this package leaves.
    """
    if not config:
        return None
    rollout = config.get("rollout", {"guidance": 1.0, "negative_prompt": ""})
    try:
        scale, negative = rollout["guidance"], rollout["negative_prompt"]
        if not math.isfinite(scale) or not isinstance(negative, str):
            raise ValueError(f"guidance {scale!r}, negative_prompt {negative!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the run's config.json does not tell its guidance ({error}); please pass the "
            "adapter alone, outside the work directory"
        ) from error
    return Training("rollout" in config, float(scale), negative)


def write_card(
    folder: epath.PathLike,
    form: str,
    base_model: str,
    settings: CardSettings,
    training: Training | None,
) -> None:
    """Writes `README.md` and `infer.py`.

    Args:
        folder: with the adapter's files.
        form: "peft" or "diffusers".
        base_model: name of the model that the adapter is for.
        settings: recommended for inference, and the script's defaults.
        training: of the run that it comes from; None if that is unknown. Card and script take its
            guidance.
    """
    folder = epath.Path(folder)
    base_model = printable(base_model)  # from the adapter, maybe, which may come from anywhere
    values = {
        **settings._asdict(),
        "base": base_model,
        "quoted": base_model if _PLAIN.fullmatch(base_model) else json.dumps(base_model),
        "form": form,
        "evaluations": 2 * settings.steps - 1,
        "origin": "" if training is None else _ORIGIN[training.by_reward],
        "guided": _guided(training),
        "guidance": 1.0 if training is None else training.guidance,
        "negative": "" if training is None else training.negative_prompt,
        "loading": Template(_LOADING[form]).substitute(base=json.dumps(base_model)).strip(),
        "library": {"peft": "peft", "diffusers": "diffusers"}[form],
    }
    (folder / "README.md").write_text(Template(_CARD).substitute(values))
    quoted = {name: repr(value) for name, value in values.items()}
    (folder / "infer.py").write_text(Template(_SCRIPT).substitute(quoted))


def _guided(training: Training | None) -> str:
    """The card's word on guidance."""
    if training is None:
        return "unknown: the adapter does not say how it was trained; `infer.py` takes none, 1.0"
    if training.guidance == 1:
        return "1.0, that is none, as in training"
    negative = json.dumps(training.negative_prompt).replace("|", "\\u007c")
    return (
        f"{training.guidance:g} away from the prompt {negative}, each token's norm kept, as in "
        "training; two evaluations for one"
    )


_ORIGIN = {
    True: """
It was trained by reinforcement learning (Flow-GRPO) from a judge of the layers, with `sl_jax`.
""",
    False: """
It was trained on designs with their true layers (flow matching), with `sl_jax`.
""",
}
_LOADING = {
    "peft": """
from peft import PeftModel

pipe = QwenImageLayeredPipeline.from_pretrained($base)
pipe.transformer = PeftModel.from_pretrained(pipe.transformer, "FOLDER")
""",
    "diffusers": """
pipe = QwenImageLayeredPipeline.from_pretrained($base)
pipe.load_lora_weights("FOLDER", weight_name="pytorch_lora_weights.safetensors")
""",
}

_CARD = """---
base_model: $quoted
library_name: $library
pipeline_tag: image-to-image
tags:
  - lora
  - layer-decomposition
---

# LoRA adapter for $base

It splits a picture into RGBA layers, back to front.
$origin
## Inference

| setting | value |
| --- | --- |
| sampler | Heun, $steps steps ($evaluations evaluations of the model) |
| guidance | $guided |
| size | longest side $size pixels, sides rounded to multiples of 16 |
| layers | $layers |
| prompt | "$prompt", or a caption of the picture |
| picture | RGB, transparency flattened over white |

The sampler matters: diffusers' pipeline has Euler only, which garbles the layers of such adapters.
`infer.py` has the loop:

```bash
pip install torch transformers peft "diffusers==0.42.*"
python infer.py PICTURE OUTPUT_FOLDER
```

To load the adapter elsewhere:

```python
from diffusers import QwenImageLayeredPipeline
$loading
```
"""

_SCRIPT = '''"""Splits a picture into RGBA layers with the adapter in this folder, by Heun's method.

    python infer.py PICTURE OUTPUT_FOLDER
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import QwenImageLayeredPipeline
from PIL import Image

HERE = Path(__file__).resolve().parent
BASE, PROMPT = $base, $prompt
LAYERS, STEPS, SIZE = $layers, $steps, $size
GUIDANCE, NEGATIVE_PROMPT = $guidance, $negative  # scale 1 is none
CELL = 16  # pixels per token, along each side


def load(base=BASE, device="cpu", dtype=torch.bfloat16):
    """The base's pipeline with the adapter."""
    pipe = QwenImageLayeredPipeline.from_pretrained(base, processor=None, dtype=dtype)
    if (HERE / "adapter_config.json").exists():
        from peft import PeftModel

        pipe.transformer = PeftModel.from_pretrained(pipe.transformer, HERE)
    else:
        pipe.load_lora_weights(str(HERE), weight_name="pytorch_lora_weights.safetensors")
    return pipe.to(device)


def resized(image, size=SIZE):
    """The picture over white, with its longest side at `size`, in whole cells."""
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image.convert("RGBA"))
    zoom = size / max(image.size)
    sides = [max(round(side * zoom / CELL), 1) * CELL for side in image.size]
    return canvas.convert("RGB").resize(sides, Image.Resampling.LANCZOS)


def heun(velocity, x, sigmas):
    """Integrates dx/dsigma = velocity(x, sigma) with a second evaluation at each step's end."""
    for sigma, following in zip(sigmas[:-1], sigmas[1:]):
        width = following - sigma
        slope = velocity(x, sigma)
        if following > 0:
            slope = (slope + velocity(x + width * slope, following)) / 2
        x = x + width * slope
    return x


def fold(frames):
    """Latents [F, 16, 2h, 2w] as tokens [1, F*h*w, 64]."""
    count, channels, height, width = frames.shape
    cells = frames.reshape(count, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(1, -1, 4 * channels)


def unfold(tokens, height, width):
    """The inverse of `fold`; height and width in tokens."""
    cells = tokens.reshape(-1, height, width, tokens.shape[-1] // 4, 2, 2)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(len(cells), -1, 2 * height, 2 * width)


def guided(wanted, unwanted, scale):
    """Away from `unwanted`, with each token's norm that of `wanted`."""
    mixed = unwanted + scale * (wanted - unwanted)
    norms = [x.norm(dim=-1, keepdim=True) for x in (wanted, mixed)]
    return mixed * norms[0] / norms[1].clamp(min=1e-12)


@torch.no_grad()
def decompose(
    pipe,
    image,
    layers=LAYERS,
    steps=STEPS,
    prompt=PROMPT,
    seed=42,
    guidance=GUIDANCE,
    negative_prompt=NEGATIVE_PROMPT,
    noise=None,
):
    """RGBA images, back to front; `image` comes from `resized`."""
    model, vae, device, dtype = pipe.transformer, pipe.vae, pipe.device, pipe.dtype
    statistics = torch.tensor([vae.config.latents_mean, vae.config.latents_std], device=device)
    mean, deviation = statistics[:, :, None, None]
    height, width = image.height // CELL, image.width // CELL

    pixels = torch.from_numpy(np.array(image.convert("RGBA"))).to(device).permute(2, 0, 1)
    encoded = vae.encode((pixels / 127.5 - 1).to(dtype)[None, :, None]).latent_dist.mode()
    condition = fold((encoded[:, :, 0].float() - mean) / deviation)
    texts = [prompt] if guidance == 1 else [prompt, negative_prompt]
    texts = [pipe.encode_prompt(text, device=device) for text in texts]
    grid = np.linspace(1.0, 0.0, steps + 1)[:-1]
    pipe.scheduler.set_timesteps(sigmas=grid, mu=(height * width / 256) ** 0.5, device=device)

    def by_prompt(x, sigma, text, mask):
        return model(
            hidden_states=torch.cat([x, condition], dim=1).to(dtype),
            timestep=sigma.reshape(1).to(device, dtype),
            encoder_hidden_states=text,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, height, width)] * (layers + 2)],
            additional_t_cond=torch.zeros(1, dtype=torch.long, device=device),
            return_dict=False,
        )[0][:, : x.shape[1]].float()

    def velocity(x, sigma):
        wanted, *unwanted = (by_prompt(x, sigma, *text) for text in texts)
        return guided(wanted, *unwanted, guidance) if unwanted else wanted

    if noise is None:  # drawn on the CPU, so that a seed means the same everywhere
        shape = (1, (layers + 1) * height * width, condition.shape[-1])
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    tokens = heun(velocity, noise.to(device), pipe.scheduler.sigmas)
    frames = unfold(tokens, height, width)[1:] * deviation + mean  # the first is the whole picture
    images = []
    for frame in frames:
        decoded = vae.decode(frame[None, :, None].to(dtype), return_dict=False)[0][0, :, 0]
        levels = ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().byte()
        images.append(Image.fromarray(levels.permute(1, 2, 0).cpu().numpy()))
    return images


def main():
    """Writes layer_0.png, the background, and so on, and composite.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--base", default=BASE)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--negative-prompt", default=NEGATIVE_PROMPT)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    flags = parser.parse_args()
    pipe = load(flags.base, flags.device, getattr(torch, flags.dtype))
    image = resized(Image.open(flags.picture), flags.size)
    images = decompose(
        pipe,
        image,
        flags.layers,
        flags.steps,
        flags.prompt,
        flags.seed,
        flags.guidance,
        flags.negative_prompt,
    )
    flags.output.mkdir(parents=True, exist_ok=True)
    composite = Image.new("RGBA", image.size, (0, 0, 0, 0))
    for index, layer in enumerate(images):
        layer.save(flags.output / f"layer_{index}.png")
        composite.alpha_composite(layer)
    composite.save(flags.output / "composite.png")


if __name__ == "__main__":
    main()
'''
