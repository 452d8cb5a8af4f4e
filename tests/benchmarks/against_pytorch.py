r"""This package beside PyTorch (diffusers, PEFT) in one run, with the same weights.

    python tests/benchmarks/against_pytorch.py \
        --output tests/benchmarks/results/against_pytorch.json

Prints one JSON line per subject and side. `ratio_to_peer` of a peer's row says how many times as
fast this package is. Before the clock starts, both sides' results are compared; sides take turns.
On a GPU the shapes are production's (640 px, 4 layers, bfloat16), with random weights and
`--blocks` of the 60 blocks, so that both sides' weights fit; on a CPU they are small, and times
mean something as ratios only. `--small` is for tests: it shows that the benchmark works, not more.

- forward: MMDiT, against diffusers eager and compiled by `torch.compile`;
- lora: one update of an adapter, recomputing blocks, against diffusers and PEFT with gradient
  checkpointing; same loss, targets, rank and optimizer (AdamW);
- vae_encode, vae_decode: five pictures with alpha, against AutoencoderKLQwenImage;
- epoch: of the quickstart, without the judge: rollouts, decoding and updates of the tiny base.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from absl import app, flags
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from flax import traverse_util
from paired_epoch import CPU_DEVICES, measure_epoch
from pairing import (
    Side,
    copy_adapter,
    finished,
    on_gpu,
    relative_error,
    rows,
    torch_device,
    without_gradients,
)
from peft import LoraConfig

from sl_jax.checkpoints.huggingface import load_params, read_config
from sl_jax.checkpoints.naming import MMDIT
from sl_jax.checkpoints.pipeline import abstract_params, load_vae
from sl_jax.models.attention import Attention
from sl_jax.models.lora import DEFAULT_TARGETS, LoRAConfig, init_adapter
from sl_jax.models.mmdit import MMDiT, MMDiTConfig
from sl_jax.models.rope import LatentGrid
from sl_jax.models.vae import Vae
from sl_jax.planning.work import count_work

_ROWS = flags.DEFINE_list("rows", ["forward", "lora", "vae", "epoch"], "subjects to measure")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write all rows to")
_REPEATS = flags.DEFINE_integer("repeats", 7, "timed runs of each side", lower_bound=1)
_BLOCKS = flags.DEFINE_integer("blocks", 20, "blocks of the MMDiT on a GPU", 1, 60)
_COMPILE = flags.DEFINE_bool("compile", True, "also time torch.compile")
_SMALL = flags.DEFINE_bool("small", False, "smallest shapes, to see that the benchmark works")

_BLOCKS_OF_THE_MODEL = 60
_RANK, _ALPHA, _RATE = 16, 32.0, 1e-4


class Problem(NamedTuple):
    """Both sides' MMDiT with the same weights, and inputs as numpy arrays."""

    model: MMDiT
    params: Any
    peer: QwenImageTransformer2DModel
    arrays: dict[str, np.ndarray]
    grid: LatentGrid
    dtype: str

    def shapes(self) -> dict[str, Any]:
        """What rows say of it."""
        config = self.model.config
        return {
            "blocks": config.num_layers,
            "width": config.width,
            "image_tokens": self.grid.generated_tokens + self.grid.frame_tokens,
            "text_tokens": self.arrays["text"].shape[1],
            "batch": 1,
        }

    def extrapolation(self) -> dict[str, Any]:
        """On a GPU: says that times are of fewer blocks than the model has, as measured."""
        blocks = self.model.config.num_layers
        short = on_gpu() and not _SMALL.value and blocks < _BLOCKS_OF_THE_MODEL
        return {"blocks_of_the_model": _BLOCKS_OF_THE_MODEL} if short else {}

    def tolerance(self) -> float:
        """How far apart roundings may bring the sides."""
        return 1e-4 if self.dtype == "float32" else 5e-2


def _sizes() -> tuple[MMDiTConfig, LatentGrid, int, str]:
    """Configuration, sequence, text tokens and dtype."""
    if _SMALL.value:
        return (
            MMDiTConfig(2, 16, 2, 32, axes_dims_rope=(4, 6, 6)),
            LatentGrid(1, 2, 3),
            5,
            "float32",
        )
    if on_gpu():
        config = MMDiTConfig(_BLOCKS.value, 128, 24, 3584)
        return config, LatentGrid(4, 40, 40), 512, "bfloat16"
    return MMDiTConfig(4, 128, 4, 256), LatentGrid(4, 15, 16), 64, "float32"


def _problem() -> Problem:
    config, grid, words, dtype = _sizes()
    torch.manual_seed(0)
    settings = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
    peer = QwenImageTransformer2DModel(**settings).eval().to(getattr(torch, dtype))
    attention = Attention("cudnn" if on_gpu() else "xla")
    types = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
    model = MMDiT(config, attention=attention, **types)
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        params = load_params(folder, MMDIT, nn.unbox(abstract_params(model)))
    draw = np.random.default_rng(0)
    arrays = {
        "latents": draw.normal(size=(1, grid.generated_tokens, 64)),
        "condition": draw.normal(size=(1, grid.frame_tokens, 64)),
        "text": draw.normal(size=(1, words, config.joint_attention_dim)),
        "t": np.array([0.5]),
        "target": draw.normal(size=(1, grid.generated_tokens, 64)),
    }
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    return Problem(model, params, peer.to(torch_device()), arrays, grid, dtype)


def _velocity(model: MMDiT, grid: LatentGrid, variables: Any, arrays: dict[str, Any]) -> Any:
    names = ("latents", "condition", "text", "t")
    return model.apply(variables, *(arrays[n] for n in names), grid, method="initialise")


def _peer_velocity(problem: Problem, run: Callable[..., Any]) -> Callable[[], torch.Tensor]:
    """Runs diffusers' forward on the problem's inputs, which lie on its device already."""
    dtype = getattr(torch, problem.dtype)
    place = {"device": torch_device(), "dtype": dtype}
    sent = {name: torch.from_numpy(array).to(**place) for name, array in problem.arrays.items()}
    grid = problem.grid
    inputs = {
        "hidden_states": torch.cat([sent["latents"], sent["condition"]], 1),
        "encoder_hidden_states": sent["text"],
        "timestep": sent["t"],
        "img_shapes": [[(1, grid.height, grid.width)] * (grid.layers + 2)],
        "additional_t_cond": torch.zeros(1, dtype=torch.long, device=torch_device()),
        "return_dict": False,
    }
    return lambda: run(**inputs)[0][:, : grid.generated_tokens]


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def _compiled(problem: Problem) -> tuple[list[Side], dict[str, Any]]:
    """The peer by `torch.compile`, which needs a C++ compiler on CPUs, and what it took."""
    if not _COMPILE.value or _SMALL.value:
        return [], {"torch_compile": "not asked for"}
    if not on_gpu() and shutil.which("g++") is None:
        return [], {"torch_compile": "needs g++, which this machine lacks"}
    run = without_gradients(_peer_velocity(problem, torch.compile(problem.peer)))
    started = time.perf_counter()
    finished(run())
    spent = time.perf_counter() - started
    return [Side("diffusers, torch.compile", run)], {"torch_compile_seconds": spent}


def measure_forward(repeats: int) -> list[dict[str, Any]]:
    """MMDiT forward with the modulation of its one time."""
    problem = _problem()
    arrays = jax.tree.map(jnp.asarray, problem.arrays)
    forward = jax.jit(partial(_velocity, problem.model, problem.grid))
    variables = {"params": problem.params}
    eager = without_gradients(_peer_velocity(problem, problem.peer))
    compiled, note = _compiled(problem)
    # Kernels have no countable inside: work is counted on the plain attention.
    plain = jax.jit(partial(_velocity, problem.model.clone(attention=Attention()), problem.grid))
    return rows(
        "forward",
        [
            Side("sl_jax", lambda: forward(variables, arrays)),
            Side("diffusers, eager", eager),
            *compiled,
        ],
        shapes=problem.shapes(),
        dtype=problem.dtype,
        flops=count_work(plain.trace(variables, arrays)).flops,
        repeats=repeats,
        error=relative_error(forward(variables, arrays), _numpy(eager())),
        tolerance=problem.tolerance(),
        **note,
        **problem.extrapolation(),
    )


def _training_step(model: MMDiT, grid: LatentGrid, optimizer: Any) -> Callable[..., Any]:
    def loss(lora: Any, scale: Any, params: Any, arrays: dict[str, Any]) -> Any:
        variables = {"params": params, "lora": lora, "lora_scale": scale}
        difference = _velocity(model, grid, variables, arrays) - arrays["target"]
        return jnp.mean(jnp.square(difference.astype(jnp.float32)))

    def step(lora: Any, state: Any, scale: Any, params: Any, arrays: dict[str, Any]) -> Any:
        gradient = jax.grad(loss)(lora, scale, params, arrays)
        updates, state = optimizer.update(gradient, state, lora)
        return optax.apply_updates(lora, updates), state, gradient

    return step


def _peer_step(problem: Problem) -> tuple[Callable[[], None], Callable[[], None]]:
    """PEFT's gradients, and the whole update."""
    peer = problem.peer
    peer.train()
    peer.enable_gradient_checkpointing()
    trained = [p for p in peer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=_RATE, weight_decay=0.0)
    target = torch.from_numpy(problem.arrays["target"]).to(torch_device())
    velocity = _peer_velocity(problem, peer)

    def gradients() -> None:
        optimizer.zero_grad()
        torch.mean((velocity() - target).float() ** 2).backward()

    def update() -> None:
        gradients()
        optimizer.step()

    return gradients, update


def measure_lora(repeats: int) -> list[dict[str, Any]]:
    """One update of a LoRA adapter on every linear layer of the blocks."""
    problem = _problem()
    arrays = jax.tree.map(jnp.asarray, problem.arrays)
    adapter = init_adapter(
        jax.random.key(0), problem.params, LoRAConfig(_RANK, _ALPHA, DEFAULT_TARGETS)
    )
    problem.peer.requires_grad_(False)
    problem.peer.add_adapter(
        LoraConfig(r=_RANK, lora_alpha=_ALPHA, target_modules=list(DEFAULT_TARGETS))
    )
    pairs = copy_adapter(adapter, problem.peer)
    for parameter in problem.peer.parameters():  # Adapters train in float32 on both sides.
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    optimizer = optax.adamw(_RATE, weight_decay=0.0)
    model = problem.model.clone(remat="block")
    step = jax.jit(_training_step(model, problem.grid, optimizer))
    rest = (adapter.lora_scale, problem.params, arrays)
    state = optimizer.init(adapter.lora)
    gradients, update = _peer_step(problem)

    gradients()
    found = traverse_util.flatten_dict(step(adapter.lora, state, *rest)[2])
    ours = np.concatenate([np.asarray(found[p])[block].T.ravel() for p, block, _ in pairs])
    # Of the last block's text nothing reaches the output: PyTorch has no gradient there.
    grads = [torch.zeros_like(w) if w.grad is None else w.grad for _, _, w in pairs]
    theirs = np.concatenate([_numpy(grad).ravel() for grad in grads])

    plain = jax.jit(
        _training_step(model.clone(attention=Attention()), problem.grid, optimizer)
    ).trace(adapter.lora, state, *rest)
    return rows(
        "lora",
        [
            Side("sl_jax", lambda: step(adapter.lora, state, *rest)[:2]),
            Side("diffusers + PEFT, gradient checkpointing", update),
        ],
        shapes=problem.shapes() | {"rank": _RANK, "targets": len(DEFAULT_TARGETS)},
        dtype=problem.dtype,
        flops=count_work(plain).flops,
        repeats=repeats,
        error=relative_error(ours, theirs),
        tolerance=10 * problem.tolerance(),
        flops_count="with recomputation",
        **problem.extrapolation(),
    )


def _vae_sides() -> tuple[Vae, Any, AutoencoderKLQwenImage, int, str]:
    """Both sides' autoencoder, the pictures' side in pixels, and the dtype."""
    tiny = Path(str(resources.files("sl_jax") / "assets" / "tiny" / "vae"))
    if not on_gpu():
        vae, params = load_vae(tiny, "float32")
        peer = AutoencoderKLQwenImage.from_pretrained(tiny).eval()
        return vae, params, peer, 16 if _SMALL.value else 128, "float32"
    config = read_config(resources.files("sl_jax") / "assets" / "qwen_image_layered" / "vae")
    settings = {k: v for k, v in config.items() if not k.startswith("_")}
    torch.manual_seed(0)
    peer = AutoencoderKLQwenImage(**settings).eval().to(torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        vae, params = load_vae(folder, "bfloat16")
    return vae, params, peer.to(torch_device()), 640, "bfloat16"


def measure_vae(repeats: int) -> list[dict[str, Any]]:
    """Encoding to the posterior's mean, and decoding."""
    vae, params, peer, side, dtype = _vae_sides()
    count = 1 if _SMALL.value else 5
    factor, channels = vae.config.spatial_factor, vae.config.z_dim
    draw = np.random.default_rng(0)
    pixels = draw.uniform(-1, 1, (count, side, side, vae.config.input_channels))
    latents = draw.normal(size=(count, side // factor, side // factor, channels))
    inputs = {"vae_encode": pixels.astype(np.float32), "vae_decode": latents.astype(np.float32)}
    ours = {
        "vae_encode": jax.jit(lambda p, x: vae.apply({"params": p}, x, method="encode").mean),
        "vae_decode": jax.jit(lambda p, x: vae.apply({"params": p}, x, method="decode")),
    }
    theirs = {
        "vae_encode": lambda x: peer.encode(x).latent_dist.mean,
        "vae_decode": lambda x: peer.decode(x).sample,
    }
    made = []
    for name, array in inputs.items():
        given = jnp.asarray(array)
        sent = torch.from_numpy(array).permute(0, 3, 1, 2)[:, :, None]
        sent = sent.to(torch_device(), getattr(torch, dtype)).contiguous()
        mine = partial(ours[name], params, given)
        peers = without_gradients(partial(theirs[name], sent))
        truth = _numpy(peers()[:, :, 0].permute(0, 2, 3, 1))
        made += rows(
            name,
            [Side("sl_jax", mine), Side("diffusers, eager", peers)],
            shapes={"batch": count, "side": side, "base_dim": vae.config.base_dim},
            dtype=dtype,
            flops=count_work(ours[name].trace(params, given)).flops,
            repeats=repeats,
            error=relative_error(mine(), truth),
            tolerance=1e-4 if dtype == "float32" else 1e-1,
        )
    return made


MEASURES: dict[str, Callable[[int], list[dict[str, Any]]]] = {
    "forward": measure_forward,
    "lora": measure_lora,
    "vae": measure_vae,
    "epoch": lambda repeats: measure_epoch(repeats, _SMALL.value),
}


def main(arguments: list[str]) -> None:
    """Measures what `--rows` names."""
    unknown = sorted(set(_ROWS.value) - set(MEASURES))
    if len(arguments) > 1 or unknown:
        raise app.UsageError(f"please choose --rows among {', '.join(MEASURES)}")
    jax.config.update("jax_num_cpu_devices", CPU_DEVICES)
    made = []
    for name in _ROWS.value:
        made += MEASURES[name](_REPEATS.value)
        if _OUTPUT.value:
            path = Path(_OUTPUT.value)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
