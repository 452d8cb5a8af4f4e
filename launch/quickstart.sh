#!/usr/bin/env bash
# From a fresh machine to a trained adapter and a report, on a CPU.
set -euo pipefail
# shellcheck source=launch/_env.sh
. "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

usage() {
  cat <<'END'
Usage: bash launch/quickstart.sh [FOLDER] [--config.field=value ...]

Installs sl_jax into .venv, then trains the tiny base with Flow-GRPO and the embedded judge
(configs/grpo.py:tiny). The same command again goes on where it was stopped.

  FOLDER                 pictures to train on; without it procedural designs are drawn
  --config.field=value   overrides a field of the configuration
  PYTHON, VENV           variables: the interpreter, and the folder of the environment
END
}

PICTURES=256
# Far from the seeds that the base was trained and is evaluated on.
FIRST_SEED=100000

folder="" workdir="" overrides=()
for argument in "$@"; do
  case "$argument" in
    -h | --help)
      usage
      exit 0
      ;;
    --config.workdir=*) workdir="$(absolute "${argument#*=}")" ;;
    --*) overrides+=("$argument") ;;
    -*) fail "$argument is not known; bash launch/quickstart.sh --help says what is." ;;
    "") fail "FOLDER is empty; please name a folder of pictures, or leave it out." ;;
    *)
      [ -z "$folder" ] || fail "Two folders are given: $folder and $argument. Please give one."
      folder="$(absolute "$argument")"
      ;;
  esac
done
case "$folder" in
  "" | *://*) ;;
  *)
    [ -d "$folder" ] || fail "$folder is not a folder; please give a folder of pictures."
    folder="$(cd "$folder" && pwd)"
    [ -n "$(find -L "$folder" -type f -print -quit 2>/dev/null)" ] ||
      fail "$folder holds no files; please give a folder of pictures."
    ;;
esac

again="bash $(printf '%q' "$ROOT/launch/quickstart.sh")$([ $# -eq 0 ] || printf ' %q' "$@")"
interrupted() {
  printf '\nInterrupted. To go on: %s\n' "$again"
  exit 130
}
trap interrupted INT

venv="$(absolute "${VENV:-$ROOT/.venv}")"
cd "$ROOT"
prepare "$venv" -e ".[cpu]"

if [ -z "$folder" ]; then
  # Relative, so that the run goes on when the repository has moved.
  folder="runs/quickstart/pictures"
  workdir="${workdir:-runs/quickstart/run}"
  if [ ! -d "$folder" ]; then
    printf 'Drawing %d procedural designs into %s\n' "$PICTURES" "$folder"
    rm -rf "$folder.part"
    "$venv/bin/python" -c 'import sys
from sl_jax.data import write_designs
folder, first, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
write_designs(folder, "B", range(first, first + count), 64, 3)' \
      "$folder.part" "$FIRST_SEED" "$PICTURES"
    mv "$folder.part" "$folder"
  fi
else
  name="$(basename "$folder" | tr -c 'A-Za-z0-9._\n-' _)"
  workdir="${workdir:-runs/quickstart/run-$name-$(printf '%s' "$folder" | cksum | cut -d' ' -f1)}"
  printf '%s\n' "Training on $folder" \
    "The tiny base has only ever seen procedural designs of 64 pixels. On other pictures this" \
    "shows that the program runs, not what Qwen-Image-Layered does with them: for that, train" \
    "the real base with --config=configs/grpo.py on a TPU or GPU."
fi

status=0
"$venv/bin/python" -m sl_jax.train --config=configs/grpo.py:tiny "--config.data.path=$folder" \
  "--config.workdir=$workdir" ${overrides[@]+"${overrides[@]}"} || status=$?
if [ "$status" -eq 130 ]; then
  interrupted
elif [ "$status" -ne 0 ]; then
  ended "$status" "$again"
fi

place="$workdir"
[ "${place#*://}" != "$place" ] || place="$(absolute "$place")"
printf '%s\n' "" "Where things are:" \
  "  report       $place/report.html (open it in a browser)" \
  "  adapter      $place/adapter (a PEFT folder)" \
  "  curves       $(printf '%q' "$venv/bin/python") -m pip install tensorboard" \
  "               $(printf '%q' "$venv/bin/tensorboard") --logdir $(printf '%q' "$place")"
