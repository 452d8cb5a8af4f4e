"""Does supervised fine-tuning on paired designs make layers of a new family better?

    python tests/benchmarks/sft_pairs.py --work runs/pairs \
        --output tests/benchmarks/results/sft_pairs.json

The tiny base has seen family A only. `configs/sft.py:tiny` fine-tunes it on designs of family B
with their true layers, and held-out designs of B are evaluated before and after: same pictures,
same noise, the sampler that suits the base best. Errors are of the bootstrap over pictures, paired.
Stopped and started again, it goes on. Options that are not its own go to the training, as in
`--config.steps=200`.
"""

import argparse
import json
from pathlib import Path

from held_out import changes, module, read_records

from sl_jax.data import write_designs
from sl_jax.training.metrics import read_metrics

_FIRST_SEED = 100_000  # held-out designs have the seeds from 0
_SIZE, _LAYERS = 64, 3
_SAMPLER = "euler:10"  # the base's best, see tests/benchmarks/results/tiny_base.json
_MEASURES = {
    "layer_l1_order_free": -1,
    "layer_l1_mean": -1,
    "layer_l1_background": -1,
    "layerd_cost_0": -1,
    "psnr": +1,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/pairs"))
    parser.add_argument("--pairs", type=int, default=2048, help="designs to train on")
    parser.add_argument("--designs", type=int, default=256, help="held-out designs")
    parser.add_argument("--output", type=Path)
    arguments, settings = parser.parse_known_args()
    designs, run = arguments.work / "designs", arguments.work / "run"
    evaluation = arguments.work / "evaluation"
    if not designs.exists():
        seeds = range(_FIRST_SEED, _FIRST_SEED + arguments.pairs)
        write_designs(designs, "B", seeds, _SIZE, _LAYERS, with_layers=True)
    module(
        "sft",
        "--config=configs/sft.py:tiny",
        f"--config.data.path={designs}",
        f"--config.workdir={run}",
        *settings,
    )
    module(
        "evaluate",
        "--model=tiny",
        f"--adapter=tuned={run / 'adapter'}",
        f"--data=procedural:B:{arguments.designs}:{_LAYERS}:{_SIZE}",
        "--protocols=stable_layers,layerd,reference_free",
        f"--sampler={_SAMPLER}",
        "--batch_size=16",
        f"--output={evaluation}",
    )
    result = {
        "pairs": arguments.pairs,
        "held_out_pictures": arguments.designs,
        "sampler": _SAMPLER,
        "settings": settings,
        "held_out_loss": {
            str(record["step"]): record["tune/held_out_mse"]
            for record in read_metrics(run)
            if record.get("tune/held_out_mse") is not None
        },
        "held_out": changes(read_records(evaluation), "tuned", _MEASURES),
    }
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
