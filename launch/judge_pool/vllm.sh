#!/usr/bin/env bash
# A vision-language model as the judge, on one host, by vLLM.
set -euo pipefail
# shellcheck source=launch/_env.sh
. "$(dirname "${BASH_SOURCE[0]}")/../_env.sh"

usage() {
  cat <<'END'
Usage: bash launch/judge_pool/vllm.sh [MODEL] [vllm argument ...]

Serves MODEL (Qwen/Qwen2.5-VL-7B-Instruct) behind the OpenAI protocol with JSON by schema, until it
is stopped. Arguments that follow are passed on to `vllm serve`, and win. Variables:

  HOST, PORT      where to listen, 127.0.0.1 and 8000; any other host needs JUDGE_TOKEN
  JUDGE_TOKEN     token that clients must show, at least 8 characters
  GPUS            GPUs that share the model's weights, 1
  REPLICAS        copies of the model behind the one port, on GPUS each, 1
  LAYERS          most layers of a candidate, 4: stage 1 as separate pictures is 2 + 3·LAYERS
  MAX_PIXELS      pixels above which a picture is shrunk, 8388608; enough for contact sheets and
                  grids of the default sizes, whose cells must keep theirs
  CONTEXT         longest prompt and answer in tokens, 32768; a token is 28 × 28 pixels
  VLLM            the program, vllm
END
}

model="Qwen/Qwen2.5-VL-7B-Instruct"
case "${1:-}" in
  -h | --help)
    usage
    exit 0
    ;;
  "" | -*) ;;
  *)
    model="$1"
    shift
    ;;
esac

vllm="${VLLM:-vllm}"
host="${HOST:-127.0.0.1}"
command -v "$vllm" >/dev/null || fail "$vllm is not found." \
  "Please install vLLM into an environment of its own (pip install vllm==0.32.0), activate it," \
  "or name the program: VLLM=/path/to/bin/vllm bash $0"
case "$host" in
  127.0.0.1 | ::1 | localhost) ;;
  *)
    [ -n "${JUDGE_TOKEN:-}" ] || fail "HOST=$host can be reached by others." \
      "Please export JUDGE_TOKEN, the token that clients must show."
    ;;
esac
if [ -n "${JUDGE_TOKEN:-}" ]; then
  [ "${#JUDGE_TOKEN}" -ge 8 ] || fail "JUDGE_TOKEN is too short: please use 8 characters or more."
  export VLLM_API_KEY="$JUDGE_TOKEN" # not an argument: those are seen by every user of the host
fi

pictures=$((2 + 3 * ${LAYERS:-4}))
exec "$vllm" serve "$model" \
  --host "$host" --port "${PORT:-8000}" \
  --tensor-parallel-size "${GPUS:-1}" --data-parallel-size "${REPLICAS:-1}" \
  --max-model-len "${CONTEXT:-32768}" \
  --limit-mm-per-prompt "{\"image\": $pictures, \"video\": 0}" \
  --mm-processor-kwargs "{\"max_pixels\": ${MAX_PIXELS:-8388608}}" \
  --structured-outputs-config '{"backend": "xgrammar", "disable_any_whitespace": true}' \
  --generation-config vllm \
  --disable-access-log-for-endpoints /health,/metrics \
  "$@"
