"""How good decompositions are: `python -m sl_jax.evaluate --model=… --data=… --output=DIR`.

The base, any number of adapters and layers that others made, on the same pictures, by published
protocols, beside baselines. Stopped and started again, it goes on where it was.
"""

import sys

from absl import app, flags

from sl_jax.checkpoints.byte_ranges import reachable
from sl_jax.checkpoints.disk import disk_problem
from sl_jax.eval import options
from sl_jax.eval.judging import JudgeChoice
from sl_jax.eval.run import BASE, EvaluationConfig, evaluate
from sl_jax.eval.samples import MOST_LAYERS
from sl_jax.eval.systems import ModelConfig
from sl_jax.inference.decomposer import RELEASE
from sl_jax.inference.prompts import DEFAULT_PROMPT
from sl_jax.parallel.interrupts import stop
from sl_jax.scoring import JudgeError
from sl_jax.scoring.cache import CacheError
from sl_jax.scoring.keys import KeyMissingError
from sl_jax.scoring.types import PreflightError
from sl_jax.training.console import set_up_logging

_DATA = flags.DEFINE_string(
    "data",
    None,
    "procedural:FAMILY:COUNT[:LAYERS[:SIZE[:FIRST_SEED]]]; a folder of designs NAME/0000.png, … or "
    ".psd files; crello#SPLIT; a picture, a folder of pictures, a pattern in quotes; tfds:NAME.",
)
_OUTPUT = flags.DEFINE_string("output", None, "Folder for results and report.")
_MODEL = flags.DEFINE_string(
    "model", None, "Folder in the diffusers layout, hub id, or 'tiny'; none scores --layers only."
)
_ADAPTER = flags.DEFINE_multi_string(
    "adapter",
    [],
    "PEFT folder, diffusers LoRA file, work directory, or hub id; may be named, as in NAME=WHERE, "
    "and given several times.",
)
_READY = flags.DEFINE_multi_string(
    "layers",
    [],
    "Folder of another system's layers, PICTURE/0000.png, …; may be named, and given again.",
)
_PROTOCOLS = flags.DEFINE_string(
    "protocols", "", f"Some of {', '.join(options.PROTOCOLS)}; all that are possible by default."
)
_JUDGE = flags.DEFINE_multi_string(
    "judge", [], "embedded, embedded-vlm, or the address of a server; several share the work."
)
_JUDGE_MODEL = flags.DEFINE_string("judge_model", "", "Name of the model on the judge's servers.")
_JUDGE_KEY = flags.DEFINE_string("judge_key_env", "", "Environment variable with their key.")
_CONCURRENCY = flags.DEFINE_integer("judge_concurrency", 8, "Judgements at a time.", lower_bound=1)
_SAMPLER = flags.DEFINE_string(
    "sampler", RELEASE.sampler, "heun or euler, or several with steps, as in heun:50,euler:20."
)
_STEPS = flags.DEFINE_integer("steps", RELEASE.steps, "Sampling steps.", lower_bound=1)
_SIZE = flags.DEFINE_integer(
    "size",
    None,
    "Longest side; by default 640, of procedural designs and without --model their own.",
    lower_bound=16,
)
_COUNT = flags.DEFINE_integer(
    "num_layers",
    None,
    f"Layers to ask for; by default as many as there are true ones, or {RELEASE.layers}.",
    lower_bound=1,
)
_MOST = flags.DEFINE_integer("max_layers", MOST_LAYERS, "More true ones merge.", lower_bound=1)
_GUIDANCE = flags.DEFINE_float("guidance", RELEASE.guidance, "Guidance scale; 1 is off.")
_NEGATIVE = flags.DEFINE_string("negative_prompt", " ", "Prompt that guidance leads away from.")
_NORMALIZE = flags.DEFINE_boolean("cfg_normalize", RELEASE.normalize, "Guidance keeps norms.")
_PROMPT = flags.DEFINE_string("prompt", DEFAULT_PROMPT, "Prompt for all pictures.")
_SEED = flags.DEFINE_integer(
    "seed", 42, "Of the first picture; the next has seed + 1.", lower_bound=0
)
_BATCH = flags.DEFINE_integer(
    "batch_size", 1, "Pictures of one size at a time, at least one per device.", lower_bound=1
)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Computation.")
_BASE = flags.DEFINE_string("base", "", "System that others are compared with.")
_BASELINES = flags.DEFINE_boolean("baselines", True, "Run the baselines as well.")
_LIMIT = flags.DEFINE_integer("limit", None, "Take the first so many pictures.", lower_bound=1)
_SHOWN = flags.DEFINE_integer("shown", 50, "Pictures on the page.", lower_bound=0)
_SHARD = flags.DEFINE_string(
    "shard", "", "Share of this process, as in 0/8 to 7/8; the report is then written without it."
)

_EXPECTED = (ValueError, CacheError, JudgeError, KeyMissingError, PreflightError)


def main(argv: list[str]) -> None:
    """Evaluates; exits with 1 if anything had to be left out."""
    set_up_logging()
    if len(argv) > 1:
        raise app.UsageError(f"arguments {argv[1:]} are not understood; please use --flag=value")
    try:
        outcome = evaluate(_config())
    except _EXPECTED as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except OSError as error:
        sys.exit(disk_problem(error, _OUTPUT.value))
    except KeyboardInterrupt:
        stop("Stopped. The same command goes on with what is missing.")
    print(outcome.text)
    if not _SHARD.value:
        print(f"Report: {_OUTPUT.value}/report.html")
    if outcome.left_out:
        sys.exit(f"{len(outcome.left_out)} left out; the messages above and the report name them")


def _config() -> EvaluationConfig:
    model = None
    if _MODEL.value:
        guidance = (_NEGATIVE.value, _GUIDANCE.value, _NORMALIZE.value)
        how = (_DTYPE.value, _SEED.value, _BATCH.value)
        model = ModelConfig(_MODEL.value, _PROMPT.value, *guidance, *how)
    adapters = options.parse_named(_ADAPTER.value, [BASE])
    ready = options.parse_named(_READY.value, [*[BASE] * bool(model), *(a.name for a in adapters)])
    for where in (_DATA.value, _OUTPUT.value, *(named.where for named in ready)):
        reachable(where)
    asked = (_JUDGE_MODEL.value, _JUDGE_KEY.value, _CONCURRENCY.value)
    judge = JudgeChoice(tuple(_JUDGE.value), *asked) if _JUDGE.value else None
    return EvaluationConfig(
        data=_DATA.value,
        output=_OUTPUT.value,
        model=model,
        adapters=adapters,
        layers=ready,
        protocols=options.parse_protocols(_PROTOCOLS.value),
        judge=judge,
        samplers=options.parse_samplers(_SAMPLER.value, _STEPS.value),
        size=_SIZE.value,
        num_layers=_COUNT.value,
        max_layers=_MOST.value,
        base=_BASE.value,
        baselines=_BASELINES.value,
        shard=options.parse_shard(_SHARD.value),
        limit=_LIMIT.value,
        shown=_SHOWN.value,
    )


if __name__ == "__main__":
    flags.mark_flags_as_required(["data", "output"])
    app.run(main)
