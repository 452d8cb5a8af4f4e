"""Adapters and merged checkpoints between this package, PEFT and diffusers.

`python -m sl_jax.convert to-peft|from-peft|merge|verify --help` tells what each of them takes.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from etils import epath

from sl_jax.checkpoints.adapters import load_adapter, read_adapter, save_adapter_checkpoint
from sl_jax.checkpoints.card import CardSettings, training_of, write_card
from sl_jax.checkpoints.diffusers_lora import write_diffusers
from sl_jax.checkpoints.disk import disk_problem, require_writable
from sl_jax.checkpoints.merge import merge
from sl_jax.checkpoints.peft import write_peft
from sl_jax.checkpoints.pipeline import parameter_shapes
from sl_jax.checkpoints.source import resolve_model
from sl_jax.checkpoints.tensor_files import local_path
from sl_jax.checkpoints.verify import TOLERANCES, compare
from sl_jax.imaging.words import counted
from sl_jax.inference.decomposer import RELEASE
from sl_jax.inference.prompts import DEFAULT_PROMPT
from sl_jax.parallel.interrupts import stop
from sl_jax.training.console import set_up_logging

_log = logging.getLogger("sl_jax")

_BASE = "Qwen/Qwen-Image-Layered"
_SOURCE = (
    "PEFT folder, diffusers LoRA file, work directory or checkpoint of a run, or hub id OWNER/NAME"
)
_MODEL = "the base: a folder in the diffusers layout, a hub id, or 'tiny'"
_LOCAL = " (local: gs://… has to be copied first)"
_WRITERS = {"peft": write_peft, "diffusers": write_diffusers}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one subcommand; what is wrong with its input ends in one message and exit code 1."""
    set_up_logging()
    flags = _parser().parse_args(argv)
    try:
        if "output" in flags:
            require_writable(flags.output)
        flags.run(flags)
    except ValueError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except OSError as error:
        sys.exit(disk_problem(error, getattr(flags, "output", flags.source)))
    except KeyboardInterrupt:
        stop("Stopped.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("sl_jax.convert", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: object, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        added.add_argument("source", metavar="ADAPTER", type=_named, help=_SOURCE)
        return added

    export = command("to-peft", to_peft, "Writes an adapter for PyTorch, with card and script.")
    export.add_argument("output", type=_named, help="folder to write")
    export.add_argument("--format", choices=sorted(_WRITERS), default="peft")
    export.add_argument("--base-model", help="name of the base, for card and script")
    enter = command("from-peft", from_peft, "Writes an adapter as a checkpoint of this package.")
    enter.add_argument("output", type=_named, help="folder to write; must hold no adapter")
    fold = command("merge", merge_adapter, "Writes a checkpoint with the adapter folded in.")
    fold.add_argument("output", type=_named, help="folder to write; must not exist")
    check = command("verify", verify, "Compares one forward here with the same one in PyTorch.")
    check.add_argument(
        "other",
        nargs="?",
        type=_named,
        help="what PyTorch loads instead: an adapter, or a merged checkpoint",
    )
    check.add_argument("--dtype", choices=sorted(TOLERANCES), default="float32")
    for parts, note in ((enter, ""), (fold, _LOCAL), (check, _LOCAL)):
        parts.add_argument("--model", type=_named, default=_BASE, help=_MODEL + note)
    return parser


def _named(given: str) -> str:
    """A path or name that is not empty, as that of a variable without value would be."""
    if not given:
        raise argparse.ArgumentTypeError("it is empty; please name a path")
    return given


def to_peft(flags: argparse.Namespace) -> None:
    """Any adapter → PEFT folder, or diffusers LoRA file, with model card and script."""
    found = read_adapter(flags.source)
    training = training_of(found.config)
    base = flags.base_model or found.base_model or _BASE
    _WRITERS[flags.format](flags.output, found.modules, base, found.layers)
    settings = CardSettings(RELEASE.layers, RELEASE.steps, RELEASE.size, DEFAULT_PROMPT)
    write_card(flags.output, flags.format, base, settings, training)
    modules = counted(len(found.modules), "adapted module")
    print(f"{modules}, README.md and infer.py: {flags.output}")


def from_peft(flags: argparse.Namespace) -> None:
    """Any adapter → checkpoint that training and decompose take, checked against the model."""
    model = resolve_model(flags.model, ["transformer/config.json"])
    adapter = load_adapter(flags.source, parameter_shapes(model))
    save_adapter_checkpoint(epath.Path(flags.output), adapter)
    print(f"Checkpoint of the adapter: {flags.output}")


def merge_adapter(flags: argparse.Namespace) -> None:
    """Base and any adapter → checkpoint in the diffusers layout."""
    local_path(flags.model), local_path(flags.output)
    modules = read_adapter(flags.source).modules
    merged = merge(resolve_model(flags.model), modules, flags.output)
    print(
        f"{merged.changed} of {counted(merged.tensors, 'tensor')} changed, "
        f"{merged.size / 1e9:.2f} GB: {flags.output}"
    )


def verify(flags: argparse.Namespace) -> None:
    """Prints how far both sides are apart; exits with 1 if it is more than rounding."""
    local_path(flags.model)
    model = resolve_model(flags.model, ["transformer/*"])
    found = compare(model, flags.source, flags.other, flags.dtype)
    print(
        f"relative difference {found.difference:.1e} (at most {TOLERANCES[found.dtype]:g} is "
        f"rounding in {found.dtype}); the adapter changes the output by {found.effect:.1%}"
    )
    if not found.equal:
        sys.exit("The outputs differ: PyTorch computes something else from these files.")


if __name__ == "__main__":
    main()
