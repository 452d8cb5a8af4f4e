"""Trains the tiny base from nothing on procedural designs of family A.

The result is a checkpoint in the diffusers layout, small enough to ship, on which every other
command can be tried on a CPU. Stage `vae` trains the RGBA autoencoder, stage `flow` the MMDiT on
its latents.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The configuration of `python -m sl_jax.sft`."""
    config = ConfigDict()
    config.seed = 0
    config.workdir = "runs/sft_tiny"
    config.export = "sl_jax/assets/tiny"  # where the checkpoint folder is written
    config.export_dtype = "float16"
    config.stages = ("vae", "flow")

    log = config.log = ConfigDict()
    log.wandb = ""  # project of Weights & Biases; pip install "sl_jax[wandb]"

    data = config.data = ConfigDict()
    data.family = "A"
    data.size = 64
    data.layers = (2, 3)

    vae = config.vae = ConfigDict()
    vae.architecture = ConfigDict(
        {
            "base_dim": 16,
            "z_dim": 16,
            "dim_mult": (1, 2, 4, 4),
            "num_res_blocks": 1,
            "temperal_downsample": (False, True, True),
            "input_channels": 4,
        }
    )
    vae.designs = 3_000  # per number of layers
    vae.batch = 16
    vae.steps = 1_600
    vae.ema = 0.998
    vae.optimizer = ConfigDict()
    vae.optimizer.name = "muon"  # AdamW needs more than ten times as many updates here
    vae.optimizer.learning_rate = 2e-3
    vae.optimizer.warmup_steps = 100
    vae.optimizer.weight_decay = 1e-4
    vae.optimizer.clip_norm = 1.0
    vae.optimizer.b1 = 0.9  # AdamW's, of what Muon leaves to it
    vae.optimizer.b2 = 0.999
    vae.optimizer.decay_steps = 0  # of a cosine to a hundredth of the peak; 0 for all of `steps`
    vae.log_every = 50
    vae.eval_every = 500
    vae.checkpoint_every = 500
    vae.health = ConfigDict({"not_finite": 5})  # updates in a row, after which the run stops
    # Noise of a few percent of the latents' size, which the decoder learns to forgive.
    vae.kl_weight = 5e-4

    flow = config.flow = ConfigDict()
    flow.architecture = ConfigDict(
        {
            "num_layers": 4,
            "num_attention_heads": 4,
            "attention_head_dim": 32,
            "axes_dims_rope": (8, 12, 12),
            "joint_attention_dim": 64,
        }
    )
    flow.designs = 12_000  # per number of layers
    flow.held_out_designs = 256
    flow.batch = 48
    flow.steps = 7_000
    flow.ema = 0.998
    flow.optimizer = ConfigDict()
    flow.optimizer.name = "muon"
    flow.optimizer.learning_rate = 5e-3
    flow.optimizer.warmup_steps = 100
    flow.optimizer.weight_decay = 1e-2
    flow.optimizer.clip_norm = 1.0
    flow.optimizer.b1 = 0.9
    flow.optimizer.b2 = 0.999
    flow.optimizer.decay_steps = 0
    flow.log_every = 50
    flow.eval_every = 500
    flow.checkpoint_every = 500
    flow.health = ConfigDict({"not_finite": 5})  # updates in a row, after which the run stops
    # Sixteen condition tokens would give μ = 0.25, a grid with hardly any high noise; production
    # (640 px) has 2.5. The exported scheduler applies this one.
    flow.mu = 2.5
    flow.time_distribution = "uniform"
    return config
