#!/usr/bin/env bash
# The paper's claims in miniature: every arm trained and measured on a CPU, results as JSON.
set -euo pipefail
# shellcheck source=launch/_env.sh
. "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

usage() {
  cat <<'END'
Usage: bash launch/reproduce.sh [--arm NAME ...] [--seed N ...] [--work FOLDER] [--results FOLDER]

Installs sl_jax into .venv, fetches the artwork of family C, and trains and measures the arms of
tests/benchmarks/reproduction/arms.py: all of them, or those named; hours on two cores. The same
command again goes on where it was stopped. Results that are there already, as the repository's own
are, are not made again: --results NEW_FOLDER repeats everything.

  --arm NAME         an arm; may be given several times
  --seed N           of the training, instead of the arm's own seeds; may be given several times
  --work FOLDER      pictures, runs and evaluations, runs/reproduction
  --results FOLDER   one JSON file per arm and seed, tests/benchmarks/results/reproduction
  PYTHON, VENV       variables: the interpreter, and the folder of the environment
END
}

ARTWORK=(arcade==3.3.3 scikit-image==0.26.0 scikit-learn==1.9.1)

work="$ROOT/runs/reproduction"
arguments=()
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help)
      usage
      exit 0
      ;;
    --work | --results)
      set -- "$1=${2:?please name a folder after $1}" "${@:3}"
      continue
      ;;
    --work=*)
      work="$(absolute "${1#*=}")"
      arguments+=(--work "$work")
      ;;
    --results=*) arguments+=(--results "$(absolute "${1#*=}")") ;;
    *) arguments+=("$1") ;;
  esac
  shift
done

venv="$(absolute "${VENV:-$ROOT/.venv}")"
cd "$ROOT"
prepare "$venv" -e ".[cpu]"
wheels="$work/wheels"
if [ ! -f "$wheels/.complete" ]; then
  printf 'Fetching the artwork of family C\n'
  "$venv/bin/python" -m pip download --quiet --no-deps --dest "$wheels" "${ARTWORK[@]}"
  : >"$wheels/.complete"
fi
benchmarks="$ROOT/tests/benchmarks"
export PYTHONPATH="$benchmarks:$benchmarks/reproduction${PYTHONPATH:+:$PYTHONPATH}"
"$venv/bin/python" "$benchmarks/reproduction/run.py" --wheels "$wheels" \
  ${arguments[@]+"${arguments[@]}"}
"$venv/bin/python" "$benchmarks/reproduction/tables.py" ${arguments[@]+"${arguments[@]}"}
