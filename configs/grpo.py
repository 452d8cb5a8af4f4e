"""Flow-GRPO fine-tuning of Qwen-Image-Layered from a vision-language judge.

`--config=configs/grpo.py` is the production run, `--config=configs/grpo.py:tiny` the same program
on the packaged tiny base with the embedded judge, on a CPU. Every field can be overridden as
`--config.field=value`. Behind each default stands where it comes from: paper (Flow-GRPO,
arXiv 2505.05470; Stable-Layers, 2605.30257), peer (a published setting of flow_grpo, Flow-Factory
or verl-omni), ours (measured here), or unmeasured.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from sl_jax.data import standard_buckets

# width : height
ASPECTS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16), (2, 1), (1, 2))


def get_config(variant: str = "production") -> ConfigDict:
    """The configuration of `python -m sl_jax.train`; variants: production, tiny."""
    variants = {"production": _production, "tiny": _tiny}
    if variant not in variants:
        raise ValueError(f"variant {variant!r} is unknown; please use {', '.join(variants)}")
    return variants[variant]()


def _production() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.workdir = "runs/grpo"
    config.model = "Qwen/Qwen-Image-Layered"  # folder, hub id or gs://
    config.init_adapter = ""
    config.epochs = 300  # 600 updates; unmeasured

    data = config.data = ConfigDict()
    data.path = ""  # a folder of pictures, local or gs://; or crello#train, tfds:NAME#train
    data.eval_data = ""  # the like, held out, or
    data.eval_fraction = 0.05  # the share of `path` held out by content hash
    # Longest side 640 (the Stable-Layers release), up to 2:1 both ways; which ones: ours.
    data.buckets = standard_buckets(640, ASPECTS)
    data.layers = (3, 4)  # paper: 4 at inference
    data.prompt = "a clean, well composed image"  # the Stable-Layers release's default
    data.caption = "files"  # beside the pictures; "vlm": from the judge pool; "prompt": none
    data.max_text_tokens = 512  # the checkpoint's pipeline

    rollout = config.rollout = ConfigDict()
    rollout.groups = 32  # pictures per epoch; peer: flow_grpo uses 48
    rollout.batch_groups = 8
    rollout.group_size = 8  # unmeasured; peers use 8 to 24
    rollout.steps = 10  # paper: Flow-GRPO trains with 10
    rollout.shift = placeholder(float)  # the checkpoint's own rule
    rollout.dynamics = "flow_sde"  # paper
    rollout.noise_level = 1.2  # peer: verl-omni's Qwen-Image recipes; flow_grpo's default is 0.7
    rollout.window_size = 2  # peer: Flow-GRPO-Fast
    rollout.window_range = (0, 5)  # peer: Flow-GRPO-Fast
    rollout.window_order = "drawn"  # peer: Flow-GRPO-Fast; "sliding": MixGRPO, arXiv 2507.21802
    rollout.window_epochs = 25  # at each place of a sliding window; paper: MixGRPO
    rollout.group_noise = "shared"  # unmeasured
    rollout.ode_method = "euler"  # paper
    rollout.train_frames = "all"  # unmeasured; "layers" leaves frame 0 out of the likelihood
    rollout.guidance = 1.0  # the Stable-Layers release; the base's README samples with 4
    rollout.negative_prompt = " "  # the base's README

    advantage = config.advantage = ConfigDict()
    advantage.scale = "group"  # paper; "criterion" is GDPO's, arXiv 2601.05242
    advantage.std_floor = 0.01  # unmeasured; the judge's own noise

    objective = config.objective = ConfigDict()
    objective.ratio = "velocity"  # ours
    objective.clip_low = 1e-2  # from GRPO-Guard's public 2e-6 on the velocity scale
    objective.clip_high = 1e-2
    objective.advantage_limit = 5.0  # peer: flow_grpo
    objective.log_ratio_limit = 20.0  # beyond it exp leaves float32; clipping comes long before
    objective.kl_weight = 0.0  # unmeasured; public β do not carry over
    objective.kl_half_life = placeholder(float)  # epochs; the weight stays as it is
    objective.inverse_dt_weight = False

    lora = config.lora = ConfigDict()
    lora.rank = 64  # peer: flow_grpo
    lora.alpha = 128.0  # peer: flow_grpo
    lora.targets = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
        "img_mlp.net.0.proj",
        "img_mlp.net.2",
        "txt_mlp.net.0.proj",
        "txt_mlp.net.2",
    )  # peer: verl-omni's Qwen-Image recipes

    optimizer = config.optimizer = ConfigDict()
    optimizer.learning_rate = 3e-4  # peer: flow_grpo
    optimizer.weight_decay = 1e-4  # peer: flow_grpo
    optimizer.clip_norm = 1.0  # peer: flow_grpo
    optimizer.name = "adamw"  # peer: flow_grpo; or "muon"
    optimizer.b1 = 0.9  # peer: flow_grpo
    optimizer.b2 = 0.999  # peer: flow_grpo
    optimizer.warmup_steps = 0  # peer: flow_grpo
    optimizer.decay_steps = 0  # constant; peer: flow_grpo

    learner = config.learner = ConfigDict()
    learner.updates = 2  # paper
    learner.micro_batch = 8
    learner.ema = 0.9  # peer: flow_grpo
    learner.reference = "base"
    stop = learner.stop = ConfigDict()  # the epoch's remaining updates; unmeasured
    stop.kl = placeholder(float)  # no bound
    stop.clip_fraction = placeholder(float)
    stop.log_ratio = placeholder(float)

    judge = config.judge = ConfigDict()
    judge.endpoint = "embedded"  # in process, where there are no endpoints
    # Servers: URLs, or {"url": …, "model": …, "key_env": …, "concurrency": 8, "name": …,
    # "requests_per_minute": None, "tokens_per_minute": None}. As flags, one each:
    # --config.judge.endpoints=http://host:8000/v1
    judge.endpoints = ()
    judge.model = ""  # as the servers call it
    judge.key_env = ""  # environment variable of their key
    judge.two_stage = True  # paper
    judge.stage2_weight = 0.7  # unmeasured
    judge.grids = 1
    judge.asks = 3
    judge.weights = (1.0, 1.0, 1.0, 1.0, 1.0)
    judge.prompts = ""  # a folder with candidate.md and grid.md
    judge.captions = True

    render = judge.render = ConfigDict()
    render.layout = "sheet"  # or "separate": 2 + 3·L pictures
    render.picture_size = 384  # pixels; unmeasured
    render.tile_size = 128  # pixels; unmeasured

    request = judge.request = ConfigDict()
    request.temperature = 0.0
    request.top_p = placeholder(float)  # the server's own
    request.max_tokens = 1024
    request.tokens_field = "max_tokens"
    request.seed = 0
    request.picture_format = "png"  # exact; jpeg is smaller
    request.jpeg_quality = 90
    request.detail = placeholder(str)  # of hosted models: low, high, auto
    request.structured = "auto"
    request.timeout = 120.0  # seconds
    request.extra = ConfigDict()  # further fields of the body

    judge.tries = 4
    judge.patience = 120.0  # seconds that a request waits while no server is up
    judge.hedge_after = placeholder(float)  # seconds; off
    cool_down = judge.cool_down = ConfigDict()
    cool_down.first = 1.0  # seconds
    cool_down.longest = 60.0
    cool_down.broken = 3
    judge.max_requests = placeholder(int)  # over the whole run; no limit
    judge.max_tokens = placeholder(int)
    judge.cache = True
    judge.cache_path = ""  # judge.sqlite3 in the work directory
    judge.preflight = True
    judge.recorded_pictures = 2  # per epoch
    judge.concurrency = 8  # groups in flight
    judge.min_valid = 0.5
    judge.max_wait = 3600.0  # seconds
    config.rewards = (("judge", 1.0), ("recomposition_veto", 1.0), ("all_blank_veto", 1.0))

    evaluation = config.evaluation = ConfigDict()
    evaluation.every = 20
    evaluation.pictures = 64
    evaluation.shown = 16
    evaluation.steps = 50  # the Stable-Layers release
    evaluation.method = "heun"  # the Stable-Layers release
    evaluation.batch = 8
    evaluation.seed = 42  # the Stable-Layers release
    evaluation.judge = ()  # servers of another judge, as mappings like judge.endpoints

    checkpoint = config.checkpoint = ConfigDict()
    checkpoint.every = 5
    checkpoint.keep = 3

    mesh = config.mesh = ConfigDict()
    mesh.data = 1
    mesh.fsdp = -1
    mesh.tensor = 1
    mesh.sequence = 1

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

    log = config.log = ConfigDict()
    log.wandb = ""  # project of Weights & Biases; pip install "sl_jax[wandb]"
    return config


def _tiny() -> ConfigDict:
    """Sizes for two CPU cores and ten minutes; the program is the same."""
    config = _production()
    config.workdir = "runs/tiny"
    config.model = "tiny"
    config.epochs = 24
    config.data.buckets = ((64, 64),)
    config.data.layers = (3,)
    config.data.eval_fraction = 0.2
    config.rollout.groups = 8
    config.rollout.batch_groups = 4
    # Few samples: more steps are trained per sample, and each update goes further (ours).
    config.rollout.window_size = 4
    config.rollout.window_range = (0, 6)
    config.objective.clip_low = 3e-2
    config.objective.clip_high = 3e-2
    config.optimizer.learning_rate = 1e-3
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.learner.micro_batch = 32
    config.evaluation.every = 8
    config.evaluation.pictures = 48
    config.evaluation.shown = 12
    config.evaluation.steps = 20
    config.evaluation.batch = 16
    config.compute.dtype = "float32"
    config.compute.remat = "none"
    # Two cores are busier with a device each; what a device computes alone needs no gathering: an
    # epoch takes 3.0 s, not 3.9 (ours).
    config.distributed.cpu_devices = 2
    config.mesh.data = -1
    config.mesh.fsdp = 1
    return config
