#!/usr/bin/env bash
# What launch/tpu_vm.sh asks of each host of a TPU VM, over ssh; nobody needs to call it by hand.
set -euo pipefail
# shellcheck source=launch/_env.sh
. "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

usage() {
  cat <<'END_OF_USAGE'
Usage: bash launch/tpu_host.sh COMMAND

  install EXTRAS    makes an environment with sl_jax[EXTRAS]
  start ARGUMENT…   starts sl_jax.train, in a session of its own that outlives this call
  state ARGUMENT…   one line on the training with these arguments: "running", "ended STATUS",
                    "lost" with its host, "never"; "another" if one with others runs
  follow BYTES      prints the log from there on, until the training ends
  stop SECONDS      SIGTERM, and after so many seconds SIGKILL; its state is then "stopped"
END_OF_USAGE
}

VENV="$ROOT/.venv-tpu"
PYTHON_OF_UV=3.12              # for hosts whose own Python is too old
RUN="$HOME/.sl_jax-run"        # pid, command, status and log of the training
VARIABLES="$HOME/.sl_jax-env"  # secrets, from launch/tpu_vm.sh

# a_python: the host's own if it suits, otherwise one that uv brings.
a_python() {
  local uv="$HOME/.local/bin/uv"
  if (find_python "${VERSIONS[@]}") 2>/dev/null; then
    return
  fi
  if ! command -v uv >/dev/null && [ ! -x "$uv" ]; then
    python3 -m pip install --quiet --user uv >&2
  fi
  ! command -v uv >/dev/null || uv="$(command -v uv)"
  "$uv" python install --quiet "$PYTHON_OF_UV" >&2
  "$uv" python find "$PYTHON_OF_UV"
}

install() {
  PYTHON="$(a_python)"
  cd "$ROOT"
  prepare "$VENV" -e ".[$1]"
}

# session: the id of the training's session and process group; fails if it is not there any more.
session() {
  local id
  id="$(cat "$RUN/pid" 2>/dev/null)" && [ -n "$id" ] &&
    grep -qF tpu_host.sh "/proc/$id/cmdline" 2>/dev/null && printf '%s\n' "$id"
}

# state [ARGUMENT...]: of the training with these arguments, or of any.
# shellcheck disable=SC2120
state() {
  local same=yes
  [ $# -eq 0 ] || [ "$(printf '%q ' "$@")" = "$(cat "$RUN/command" 2>/dev/null)" ] || same=no
  if session >/dev/null; then
    if [ "$same" = yes ]; then printf 'running\n'; else printf 'another\n'; fi
  elif [ ! -d "$RUN" ] || [ "$same" = no ]; then
    printf 'never\n'
  elif [ -f "$RUN/stopped" ]; then
    printf 'stopped\n'
  elif [ -f "$RUN/status" ]; then
    printf 'ended %s\n' "$(cat "$RUN/status")"
  else
    printf 'lost\n'
  fi
}

start() {
  case "$(state "$@")" in
    running)
      printf 'Runs on %s already.\n' "$(hostname)"
      return
      ;;
    another) fail "Another training runs on $(hostname); please stop it first." ;;
  esac
  [ -x "$VENV/bin/python" ] || fail "$VENV is missing; please install first."
  mkdir -p "$RUN"
  rm -f "$RUN/pid" "$RUN/status" "$RUN/stopped"
  [ ! -f "$RUN/log" ] || mv "$RUN/log" "$RUN/log.before"
  printf '%q ' "$@" >"$RUN/command"
  setsid nohup bash "$ROOT/launch/tpu_host.sh" _train "$@" >"$RUN/log" 2>&1 </dev/null &
  for _ in {1..100}; do
    [ ! -s "$RUN/pid" ] || break
    sleep 0.1
  done
  [ -s "$RUN/pid" ] || fail "The training does not start on $(hostname):" "$(cat "$RUN/log")"
  printf 'Started on %s.\n' "$(hostname)"
}

# _train ARGUMENTS: leads the session, and leaves the status behind.
_train() {
  local status=0
  printf '%s\n' "$$" >"$RUN/pid.new"
  mv "$RUN/pid.new" "$RUN/pid"
  trap : TERM INT # which the training gets as well: it saves, and its status is awaited
  if [ -f "$VARIABLES" ]; then
    chmod 600 "$VARIABLES"
    # shellcheck disable=SC1090
    . "$VARIABLES"
  fi
  cd "$ROOT"
  "$VENV/bin/python" -m sl_jax.train "$@" || status=$?
  printf '%s\n' "$status" >"$RUN/status.new"
  mv "$RUN/status.new" "$RUN/status"
}

follow() {
  local id from=("-c" "+$((${1:-0} + 1))")
  [ -f "$RUN/log" ] || fail "Nothing was started on $(hostname) yet."
  if id="$(session)"; then
    tail "${from[@]}" "--pid=$id" -f "$RUN/log"
  else
    tail "${from[@]}" "$RUN/log"
  fi
}

stop() {
  local id left="$1"
  if ! id="$(session)"; then
    printf 'Nothing runs on %s.\n' "$(hostname)"
    return
  fi
  : >"$RUN/stopped"
  kill -TERM -- "-$id"
  while session >/dev/null && [ "$left" -gt 0 ]; do
    sleep 1
    left=$((left - 1))
  done
  if session >/dev/null; then
    kill -KILL -- "-$id"
    printf 'Killed on %s, after %s s.\n' "$(hostname)" "$1"
  else
    printf 'Stopped on %s, with status %s.\n' "$(hostname)" "$(cat "$RUN/status")"
  fi
}

case "${1:-}" in
  install | start | state | follow | stop | _train) "$@" ;;
  -h | --help) usage ;;
  *)
    usage >&2
    exit 2
    ;;
esac
