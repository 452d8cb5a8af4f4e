"""Supervised fine-tuning of Qwen-Image-Layered on designs with true layers.

`--config=configs/sft.py` is for the real model, `--config=configs/sft.py:tiny` the same program on
the packaged tiny base, on a CPU. Every field can be overridden as `--config.field=value`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from sl_jax.models.lora import DEFAULT_TARGETS


def get_config(variant: str = "production") -> ConfigDict:
    """The configuration of `python -m sl_jax.sft`; variants: production, tiny."""
    variants = {"production": _production, "tiny": _tiny}
    if variant not in variants:
        raise ValueError(f"variant {variant!r} is unknown; please use {', '.join(variants)}")
    return variants[variant]()


def _production() -> ConfigDict:
    config = ConfigDict()
    config.stages = ("tune",)
    config.seed = 0
    config.workdir = "runs/sft"
    config.model = "Qwen/Qwen-Image-Layered"  # folder, hub id or gs://
    config.init_adapter = ""  # an adapter to go on from
    config.train = "lora"  # or "full": all parameters, in float32; then export is needed
    config.export = ""  # where a fully trained checkpoint is written

    data = config.data = ConfigDict()
    data.path = ""  # a folder of designs NAME/0000.png …, of .psd files, or crello#train
    data.eval_data = ""  # the like, or
    data.eval_fraction = 0.02  # the share of `path` held out by content hash
    data.held_out = 64  # designs to measure the loss on, at most
    data.buckets = ((640, 640), (480, 640), (640, 480), (432, 640), (640, 432))
    data.min_layers = 2  # with the background; designs with fewer are not used
    data.max_layers = 8  # with more, neighbours are merged
    data.prompt = "a clean, well composed image"  # the Stable-Layers release's default
    data.captions = True
    data.max_text_tokens = 512  # the checkpoint's pipeline

    config.batch = 8  # designs per update, over all devices
    config.steps = 4_000
    config.ema = 0.999
    config.mu = placeholder(float)  # the checkpoint's own shift of the noise levels
    config.time_distribution = "uniform"  # the density of the sampling grid; or "logit_normal"
    config.log_every = 10
    config.eval_every = 250
    config.checkpoint_every = 250

    health = config.health = ConfigDict()
    health.not_finite = 5  # updates in a row that are not finite, after which the run stops

    log = config.log = ConfigDict()
    log.wandb = ""  # project of Weights & Biases; pip install "sl_jax[wandb]"

    lora = config.lora = ConfigDict()
    lora.rank = 64
    lora.alpha = 128.0
    lora.targets = DEFAULT_TARGETS

    optimizer = config.optimizer = ConfigDict()
    optimizer.name = "adamw"  # or "muon"
    optimizer.learning_rate = 1e-4  # with train = "full" use 1e-5
    optimizer.weight_decay = 1e-4
    optimizer.clip_norm = 1.0
    optimizer.b1 = 0.9  # peer: flow_grpo's decay of AdamW's first moment
    optimizer.b2 = 0.999  # peer: of its second
    optimizer.warmup_steps = 100
    optimizer.decay_steps = 0  # of a cosine to a hundredth of the peak; 0 for all of `steps`

    mesh = config.mesh = ConfigDict()
    mesh.data = 1
    mesh.fsdp = -1
    mesh.tensor = 1
    mesh.sequence = 1

    # parameters over fsdp × tensor, activations by samples, heads and tokens
    rules = mesh.rules = ConfigDict()
    rules.batch = ("data", "fsdp")
    rules.tokens = ("sequence",)
    rules.embed = ("fsdp",)
    rules.heads = ("tensor",)
    rules.mlp = ("tensor",)
    rules.modulation = ("tensor",)
    rules.layers = ()

    compute = config.compute = ConfigDict()
    compute.dtype = "bfloat16"
    compute.attention = "auto"
    compute.remat = "block"
    compute.cache = "auto"  # of compiled programs: in the work directory; or a folder, gs://, "off"

    distributed = config.distributed = ConfigDict()
    distributed.join = "auto"  # TPU pods, SLURM and others are found; "on", "off"
    distributed.coordinator = ""  # or HOST:PORT of process 0, the same in all
    distributed.processes = placeholder(int)
    distributed.process = placeholder(int)  # this one, from 0
    distributed.cpu_devices = 1  # of a process without accelerators
    # seconds from SIGTERM to the end: Kubernetes, spot machines and SLURM give 30 by default
    distributed.grace = 25.0
    return config


def _tiny() -> ConfigDict:
    """Sizes for two CPU cores; the program is the same."""
    config = _production()
    config.workdir = "runs/sft_tiny_tune"
    config.model = "tiny"
    config.data.eval_fraction = 0.1
    config.data.buckets = ((64, 64),)
    config.data.max_layers = 3
    config.batch = 16
    config.steps = 400
    config.ema = 0.98
    config.eval_every = 100
    config.checkpoint_every = 100
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 20
    config.compute.dtype = "float32"
    return config
