"""Pictures in, RGBA layers out. `python -m sl_jax.decompose --input PICTURES --output FOLDER`.

Defaults and file names are those of the Stable-Layers release. What is complete in the output is
not computed again; bad pictures are named at the end, and the exit code is then 1.
"""

import logging
import sys

from absl import app, flags

from sl_jax.checkpoints.adapters import adapter_digest
from sl_jax.checkpoints.byte_ranges import reachable
from sl_jax.checkpoints.disk import disk_problem
from sl_jax.inference.decomposer import RELEASE, Decomposer, PictureDecomposer, Sampling
from sl_jax.inference.fingerprints import checkpoint_digest
from sl_jax.inference.folder import Job, decompose_pictures, find_pictures
from sl_jax.inference.prompts import DEFAULT_PROMPT
from sl_jax.parallel.interrupts import stop
from sl_jax.training.console import set_up_logging

_log = logging.getLogger("sl_jax")

_INPUT = flags.DEFINE_string("input", None, "Picture, folder of pictures, or pattern in quotes.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder in which every picture gets a folder.")
_MODEL = flags.DEFINE_string(
    "model", "Qwen/Qwen-Image-Layered", "Folder (diffusers layout, also gs://), hub id, 'tiny'."
)
_ADAPTER = flags.DEFINE_string(
    "adapter", None, "PEFT folder, diffusers LoRA file, work directory, or hub id; else the base."
)
_LAYERS = flags.DEFINE_integer("layers", RELEASE.layers, "Number of layers.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", RELEASE.steps, "Sampling steps.", lower_bound=1)
_SAMPLER = flags.DEFINE_enum(
    "sampler", RELEASE.sampler, ["heun", "euler"], "Heun evaluates the model twice per step."
)
_SIZE = flags.DEFINE_integer(
    "size", RELEASE.size, "Longest side, or side of the square of equal area.", lower_bound=16
)
_RESIZE = flags.DEFINE_enum(
    "resize",
    RELEASE.resize,
    ["longest", "area"],
    "longest: longest side is --size, transparency on white; area: area is --size squared, "
    "transparency kept (diffusers' pipeline).",
)
_GUIDANCE = flags.DEFINE_float("guidance", RELEASE.guidance, "Guidance scale; 1 is off.")
_NEGATIVE = flags.DEFINE_string("negative_prompt", " ", "Prompt that guidance leads away from.")
_NORMALIZE = flags.DEFINE_boolean(
    "cfg_normalize", RELEASE.normalize, "Guidance keeps the norm of the velocity."
)
_SAMPLING = (_LAYERS, _STEPS, _SAMPLER, _SIZE, _RESIZE, _GUIDANCE, _NORMALIZE)
_PROMPT = flags.DEFINE_string("prompt", DEFAULT_PROMPT, "Prompt for all pictures.")
_SEED = flags.DEFINE_integer(
    "seed", 42, "Of the first picture; the next has seed + 1.", lower_bound=0
)
_TRANSPARENT = flags.DEFINE_boolean(
    "transparent", False, "PNGs keep their alpha instead of lying on white; the PSD always does."
)
_RECURSE = flags.DEFINE_integer(
    "recurse", None, "Decompose this layer once more, into layer_N/.", lower_bound=0
)
_OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Decompose again what is complete.")
_BATCH = flags.DEFINE_integer(
    "batch_size", 1, "Pictures of one size at a time, at least one per device.", lower_bound=1
)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Computation.")

for _alias, _flag in (
    ("lora", "adapter"),
    ("base-model", "model"),
    ("num-layers", "layers"),
    ("guidance-scale", "guidance"),
    ("negative-prompt", "negative_prompt"),
    ("batch-size", "batch_size"),
):
    flags.DEFINE_alias(_alias, _flag)
for _flag in ("input", "output", "model"):
    flags.register_validator(_flag, lambda given: given != "", "it is empty; please name a path")


def main(argv: list[str]) -> None:
    """Decomposes all inputs; exits with 1 if one of them could not be."""
    set_up_logging()
    if len(argv) > 1:
        raise app.UsageError(f"arguments {argv[1:]} are not understood; please quote patterns")
    try:
        sys.exit(run())
    except ValueError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except OSError as error:
        sys.exit(disk_problem(error, _OUTPUT.value))
    except KeyboardInterrupt:
        stop("Stopped. The same command goes on with what is missing.")


def run() -> int:
    """One run by the flags; the exit code."""
    pictures = find_pictures(_INPUT.value)
    job = Job(
        reachable(_OUTPUT.value),
        Sampling(*(flag.value for flag in _SAMPLING)),
        seed=_SEED.value,
        made_by=_made_by(),
        transparent=_TRANSPARENT.value,
        overwrite=_OVERWRITE.value,
        recurse=_RECURSE.value,
        batch=_BATCH.value,
    )
    if _ADAPTER.value and (job.sampling.steps < RELEASE.steps or job.sampling.sampler != "heun"):
        _log.warning("Stable-Layers adapters garble layers unless sampled by Heun in 50 steps.")
    outcome = decompose_pictures(pictures, job, _load)
    _log.info(
        "%d decomposed, %d there before, %d failed: %s",
        len(outcome.written),
        len(outcome.kept),
        len(outcome.problems),
        job.output,
    )
    for problem in outcome.problems:
        _log.error("%s", problem)
    return 1 if outcome.problems else 0


def _made_by() -> dict[str, str | None]:
    return {
        "model": _MODEL.value,
        "model_sha256": checkpoint_digest(_MODEL.value),
        "adapter": _ADAPTER.value or None,
        "adapter_sha256": adapter_digest(_ADAPTER.value) if _ADAPTER.value else None,
        "prompt": _PROMPT.value,
        "negative_prompt": _NEGATIVE.value,
        "dtype": _DTYPE.value,
    }


def _load() -> PictureDecomposer:
    return Decomposer.from_pretrained(
        _MODEL.value,
        _ADAPTER.value or None,
        prompt=_PROMPT.value,
        negative_prompt=_NEGATIVE.value,
        dtype=_DTYPE.value,
    )


if __name__ == "__main__":
    flags.mark_flags_as_required(["input", "output"])
    app.run(main)
