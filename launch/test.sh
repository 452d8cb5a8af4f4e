#!/usr/bin/env bash
# From a fresh machine to the result of the test suite.
set -euo pipefail
# shellcheck source=launch/_env.sh
. "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

usage() {
  cat <<'END'
Usage: bash launch/test.sh [pytest arguments]

Installs sl_jax with the libraries of its tests into .venv-test, then runs the fast and the slow
tier. Paths among the arguments are relative to the repository. Variables:

  TIERS     the tiers to run, "fast slow"
  WORKERS   processes that share the tests, 2
  PYTHON    the interpreter, of version 3.11 to 3.13
  VENV      the folder of the environment, .venv-test
  PEERS     "no" installs no PyTorch, and leaves out the files whose tests compare with it
  TORCH     the requirement that installs PyTorch, torch==2.13.0
END
}

case "${1:-}" in
  -h | --help)
    usage
    exit 0
    ;;
esac
venv="$(absolute "${VENV:-$ROOT/.venv-test}")"
peers="${PEERS:-yes}"
cd "$ROOT"
prepare_tests "$venv" "$peers"

# Many tests spend their time in compilation, which uses one core each.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
common=(-n "${WORKERS:-2}" --dist loadfile --durations 10)
left_out="the tiers system and soak (Debian packages, or hours)"
if [ "$peers" = no ]; then
  while IFS= read -r file; do
    common+=("--ignore=$file")
    left_out="$left_out, $file"
  done < <(grep -rlE '^\s*(import|from)\s+(torch|diffusers|peft)\b' tests --include='*.py' | sort)
fi

failed=() ran=0
for tier in ${TIERS:-fast slow}; do
  case "$tier" in
    fast) marks="not slow and not system and not soak" ;;
    slow) marks="slow and not system and not soak" ;;
    *) fail "TIERS names $tier; please use fast, slow or both." ;;
  esac
  status=0 SECONDS=0
  "$venv/bin/python" -m pytest "${common[@]}" -m "$marks" "$@" || status=$?
  printf 'Tier %s: status %d after %d min %02d s.\n' \
    "$tier" "$status" $((SECONDS / 60)) $((SECONDS % 60))
  case "$status" in
    0) ran=1 ;;
    2) exit 130 ;; # interrupted
    5) ;; # none of the chosen tests is of this tier
    *) failed+=("$tier") ;;
  esac
done

printf 'Left out: %s.\n' "$left_out"
[ ${#failed[@]} -eq 0 ] || fail "Failed: ${failed[*]}"
[ "$ran" -eq 1 ] || fail "No test was run; please check the arguments."
