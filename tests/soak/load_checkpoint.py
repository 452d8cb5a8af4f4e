"""Loading a large checkpoint: memory beyond the arrays themselves, seconds, GB/s.

    python tests/soak/load_checkpoint.py --out tests/soak/results/load_checkpoint.json

Writes a transformer of the real width, naming and layout with fewer blocks, and random bfloat16
weights, in shards with an index; then loads it, in a process of its own, over eight simulated CPU
devices. The page cache is asked to forget the files in between. Anonymous memory is sampled from
/proc (Linux) while loading; mapped files do not count, as the kernel takes them back at will.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from flax import traverse_util
from safetensors import safe_open

from sl_jax.checkpoints import huggingface
from sl_jax.checkpoints.huggingface import load_params, save_params
from sl_jax.checkpoints.naming import MMDIT, sources
from sl_jax.checkpoints.pipeline import ComputeConfig, abstract_params, make_model
from sl_jax.models.mmdit import MMDiTConfig
from sl_jax.parallel.mesh import Layout, MeshConfig, make_mesh

SHARD = 5 * 10**8
SAMPLE_SECONDS = 0.01


def write(folder, blocks):
    """A checkpoint in shards of half a GB; every tensor's content follows from its name."""
    config = MMDiTConfig(blocks, 128, 24, 3584, axes_dims_rope=(16, 56, 56))
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text(json.dumps(config.to_dict()))
    model, _ = described(folder, MeshConfig())
    shapes = {p: leaf.shape for p, leaf in leaves(abstract_params(model)).items()}
    random = np.random.default_rng(0).standard_normal(2**24).astype(np.float32)
    noise = (random.view(np.uint32) >> 16).astype(np.uint16)  # as bfloat16

    def tensors():
        for _, source in sources(MMDIT, shapes):
            for name in source.names:
                size = math.prod(source.shape)
                shift = zlib.crc32(name.encode()) % len(noise)
                flat = np.resize(np.roll(noise, shift), size)
                yield name, flat.view(jax.numpy.bfloat16).reshape(source.shape)

    huggingface._MAX_SHARD_BYTES = SHARD
    save_params(folder / "transformer", tensors(), config.to_dict())


def described(folder, mesh):
    layout = Layout(make_mesh(mesh))
    model = make_model(folder, ComputeConfig("bfloat16"), layout)
    return model, layout.abstract(abstract_params(model))


def leaves(tree):
    import flax.linen as nn

    return traverse_util.flatten_dict(nn.unbox(tree))


def forget(folder):
    """Writes everything to the disk, and asks the page cache to drop it."""
    for file in folder.rglob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def anonymous():
    """Bytes of anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status tells no RssAnon: this needs Linux")


class Peak(threading.Thread):
    """The largest anonymous memory until it is stopped."""

    def __init__(self):
        super().__init__(daemon=True)
        self.before = self.most = anonymous()
        self._stop_asked = threading.Event()
        self.start()

    def run(self):
        while not self._stop_asked.wait(SAMPLE_SECONDS):
            self.most = max(self.most, anonymous())

    def stop(self):
        self._stop_asked.set()
        self.join()
        self.most = max(self.most, anonymous())


def load(folder, mesh):
    """Loads once; what it took, and whether the parameters are those of the files."""
    _, abstract = described(folder, mesh)
    jax.device_put(0, jax.devices()[-1]).block_until_ready()  # what the backend itself takes
    peak, started, computed = Peak(), time.monotonic(), time.process_time()
    params = load_params(folder / "transformer", MMDIT, abstract)
    jax.block_until_ready(params)
    seconds, computed = time.monotonic() - started, time.process_time() - computed
    peak.stop()
    loaded = leaves(params)
    size = sum(leaf.nbytes for leaf in loaded.values())
    largest = max(loaded.values(), key=lambda leaf: leaf.nbytes)
    bound = 1.5 * largest.nbytes + 2e9
    beyond = peak.most - peak.before - size
    return {
        "bytes": size,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(computed, 2),
        "others_load": round(os.getloadavg()[0], 1),
        "GB_per_second": round(size / seconds / 1e9, 3),
        "largest_stacked_tensor_GB": round(largest.nbytes / 1e9, 3),
        "largest_shard_GB": round(largest.addressable_shards[0].data.nbytes / 1e9, 3),
        "peak_beyond_arrays_GB": round(beyond / 1e9, 3),
        "bound_GB": round(bound / 1e9, 3),
        "within_bound": beyond < bound,
        "values_compared": compare(folder / "transformer", loaded),
    }


def compare(folder, loaded):
    """Compares a part of every tensor, in a shard, with what safetensors reads; how many values."""
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    draw, compared = np.random.default_rng(1), 0
    for path, source in sources(MMDIT, {p: leaf.shape for p, leaf in loaded.items()}):
        shards, stacked = loaded[path].addressable_shards, path[0] in MMDIT.stacked
        for layer, name in enumerate(source.names):
            shard = shards[draw.integers(len(shards))]
            held, index = np.asarray(shard.data), shard.index
            held, index = (held[layer], index[1:]) if stacked else (held, index)
            starts = [int(draw.integers(max(1, n - 63))) for n in held.shape]
            found = held[tuple(slice(at, at + 64) for at in starts)]
            part = tuple(
                slice((whole.start or 0) + at, (whole.start or 0) + at + n)
                for whole, at, n in zip(index, starts, found.shape, strict=True)
            )
            if source.layout == "linear":
                found, part = found.T, part[::-1]
            with safe_open(folder / weight_map[name], framework="numpy") as file:
                wanted = file.get_slice(name)[part]
            if not np.array_equal(found.copy().view(np.uint16), wanted.view(np.uint16)):
                sys.exit(f"{name} differs from its file at {part}")
            compared += wanted.size
    return compared


def mesh_of(text):
    sizes = {name: int(size) for name, size in (part.split("=") for part in text.split(","))}
    return MeshConfig(**({"fsdp": 1} | sizes))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=7, help="of 0.68 GB each; the model has 60")
    parser.add_argument("--mesh", default="fsdp=8")
    parser.add_argument("--folder", type=Path, help="for the checkpoint; removed at the end")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", choices=("write", "load"), help="used by the command itself")
    arguments = parser.parse_args()
    if arguments.part == "write":
        write(arguments.folder, arguments.blocks)
        return
    if arguments.part == "load":
        arguments.out.write_text(json.dumps(load(arguments.folder, mesh_of(arguments.mesh))))
        return
    folder = Path(tempfile.mkdtemp(prefix="load_checkpoint_", dir=arguments.folder))
    try:
        result = measured(arguments, folder)
    finally:
        shutil.rmtree(folder)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    sys.exit(0 if result["load"]["within_bound"] else "loading takes more memory than it may")


def measured(arguments, folder):
    """Writes and loads in processes of their own."""
    checkpoint, report = folder / "model", folder / "load.json"
    settings = ("--blocks", str(arguments.blocks), "--mesh", arguments.mesh)
    for part in ("write", "load"):
        command = (sys.executable, __file__, "--part", part, "--folder", str(checkpoint))
        subprocess.run([*command, *settings, "--out", str(report)], check=True)
        forget(checkpoint)
    files = sorted((checkpoint / "transformer").glob("*.safetensors"))
    return {
        "command": f"python tests/soak/load_checkpoint.py {' '.join(settings)}",
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "versions": {
            name: importlib.metadata.version(name) for name in ("jax", "numpy", "safetensors")
        },
        "device": "8 simulated CPU devices, one process",
        "weights": "random bfloat16, real widths and names",
        "page_cache": "dropped before loading",
        "files": len(files),
        "blocks": arguments.blocks,
        "load": json.loads(report.read_text()),
    }


if __name__ == "__main__":
    main()
