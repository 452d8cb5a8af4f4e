#!/usr/bin/env bash
# Training on all GPUs of one node, from a fresh machine with NVIDIA's driver.
set -euo pipefail
# shellcheck source=launch/_env.sh
. "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

usage() {
  cat <<'END_OF_USAGE'
Usage: bash launch/gpu.sh [--install] [argument of sl_jax.train ...]

Installs sl_jax[cuda] into .venv-cuda, checks the driver and that JAX sees every GPU, runs the
self-test once, and then trains in the foreground. The same command again goes on where it was
stopped. Without arguments it ends after the self-test.

  --install        only installs, as on a login node without GPUs
  SELFTEST=no      variable: leaves the self-test out
  EXTRAS           variable: the extras of setup.py, cuda; cuda,gcs for gs://
  XLA_CLIENT_MEM_FRACTION
                   variable: the part of each GPU's memory that JAX takes, 0.92
  PYTHON, VENV     variables: the interpreter, and the folder of the environment
END_OF_USAGE
}

OLDEST_DRIVER=525 # of CUDA 12

only_install=no
case "${1:-}" in
  -h | --help)
    usage
    exit 0
    ;;
  --install)
    only_install=yes
    shift
    [ $# -eq 0 ] || fail "--install takes nothing else; please leave out: $*"
    ;;
esac
for argument in "$@"; do
  case "$argument" in
    --*) ;;
    *) fail "'$argument' is not an argument of sl_jax.train; please give such as --config=FILE." ;;
  esac
done

again="bash $(printf '%q' "$ROOT/launch/gpu.sh")$([ $# -eq 0 ] || printf ' %q' "$@")"
interrupted() {
  printf '\nInterrupted. To go on: %s\n' "$again"
  exit 130
}
trap interrupted INT

# gpus: a line for each with its name, driver and memory.
gpus() {
  local listed driver
  command -v nvidia-smi >/dev/null ||
    fail "nvidia-smi is not found: this node has no NVIDIA driver." \
      "Please install version $OLDEST_DRIVER or newer. On a node without GPUs: bash $0 --install"
  listed="$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>&1)" ||
    fail "nvidia-smi fails, so that no GPU can be used:" "$listed"
  [ -n "$listed" ] || fail "nvidia-smi lists no GPU."
  driver="$(head -n 1 <<<"$listed" | cut -d, -f2 | tr -d ' ')"
  [ "${driver%%.*}" -ge "$OLDEST_DRIVER" ] 2>/dev/null ||
    fail "The driver is $driver; CUDA 12 needs $OLDEST_DRIVER or newer, please install that."
  printf '%s\n' "$listed"
}

[ "$only_install" = yes ] || found="$(gpus)"
venv="$(absolute "${VENV:-$ROOT/.venv-cuda}")"
cd "$ROOT"
fill_cards
prepare "$venv" -e ".[${EXTRAS:-cuda}]"
[ "$only_install" = no ] || exit 0

printf '%s\n' "$found"
count="$(wc -l <<<"$found")"
seen="$("$venv/bin/python" -c 'import jax; print(len(jax.devices("gpu")))')" || seen=0
if [ -z "${CUDA_VISIBLE_DEVICES+set}" ]; then
  [ "$seen" -eq "$count" ] || fail "JAX sees $seen of $count GPUs; its reason stands above." \
    "Please unset LD_LIBRARY_PATH if it names another CUDA; JAX brings its own."
else
  [ "$seen" -gt 0 ] || fail "JAX sees no GPU, with CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES."
fi

# Once for these GPUs, this driver and these packages.
passed="$venv/.selftest-sl_jax"
state="$(cat "$venv/.installed-sl_jax") | $found"
if [ "${SELFTEST:-yes}" != no ] && [ "$(cat "$passed" 2>/dev/null)" != "$state" ]; then
  status=0
  "$venv/bin/python" -m sl_jax.train --selftest || status=$?
  [ "$status" -ne 130 ] || interrupted
  [ "$status" -eq 0 ] || fail "The self-test has found something wrong; see selftest.json." \
    "To train all the same: SELFTEST=no $again"
  printf '%s\n' "$state" >"$passed"
fi
[ $# -gt 0 ] || exit 0

status=0
"$venv/bin/python" -m sl_jax.train "$@" || status=$?
[ "$status" -ne 130 ] || interrupted
[ "$status" -eq 0 ] || ended "$status" "$again"
