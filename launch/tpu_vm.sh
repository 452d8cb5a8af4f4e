#!/usr/bin/env bash
# A training run on a Cloud TPU VM, of one host or many, from any machine with gcloud.
set -euo pipefail
# shellcheck source=launch/_env.sh
. "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

usage() {
  cat <<'END_OF_USAGE'
Usage: bash launch/tpu_vm.sh COMMAND NAME [option ...] [-- argument of sl_jax.train ...]

  run       all of it: makes the TPU VM NAME or takes the one that is there, installs, starts the
            training on all hosts and follows it; starts it again after a preemption. The same
            command again follows what runs, or goes on where it was
  create, install, start, logs
            the parts of it
  status    what the TPU VM does, and the training on each host
  stop      stops the training with a checkpoint; the TPU VM stays, and costs
  delete    deletes the TPU VM

  --type=TYPE     v5litepod-8, v6e-16, …, or a slice as sl_jax.plan names it: v5e:2x4
  --zone=ZONE     otherwise gcloud's default; so with --project=PROJECT
  --version=NAME  the VM's software, otherwise the newest that is known for TYPE
  --spot          cheaper, and can be preempted
  --queued        waits for chips in Google's queue (queued resources)
  --env=NAME      hands over a variable, such as JUDGE_TOKEN or HF_TOKEN; may be repeated
  --extras=NAMES  of setup.py, tpu,gcs
  --restarts=N    how often it may start again, 100
  --grace=S       seconds after which stop kills, 60
  --dry-run       prints every command, and runs none

Only this command starts again after a preemption, so let it run where it can last (tmux). The
training itself outlives it. TPU_PAUSE: seconds between looks and tries, 30.
END_OF_USAGE
}

command="" name="" type="" version=""
spot=no queued=no dry=no extras="tpu,gcs" restarts=100 grace=60
variables=() training=()
place=() # flags of gcloud
pause="${TPU_PAUSE:-30}"
rest="$pause" # until the next try to have a VM once more
trained=no    # whether a training was started or found here
again="bash $(printf '%q' "$0")$([ $# -eq 0 ] || printf ' %q' "$@")"

HOST_SCRIPT=sl_jax/launch/tpu_host.sh # on a host
SENT=(setup.py pyproject.toml README.md LICENSE configs sl_jax launch)
CHIPS=4     # of a host, but for single hosts of eight
TRIES=4     # of a command that needs a connection
LOOKS=20    # at hosts that do not answer, or at a gcloud that does not
LONGEST=600 # seconds between tries to have a VM once more
FAILURES=3  # that nobody expected (70), one after the other with no epoch between
AGAIN=200   # the status of a training that is to start again
FAILED=201  # likewise, after an error that nobody expected

bad() {
  fail "$@" "bash launch/tpu_vm.sh --help says more."
}

parse() {
  local word
  while [ $# -gt 0 ]; do
    word="$1"
    shift
    case "$word" in
      -h | --help)
        usage
        exit 0
        ;;
      --type=*) type="${word#*=}" ;;
      --zone=* | --project=*) place+=("$word") ;;
      --version=*) version="${word#*=}" ;;
      --env=*) variables+=("${word#*=}") ;;
      --extras=*) extras="${word#*=}" ;;
      --restarts=*) restarts="${word#*=}" ;;
      --grace=*) grace="${word#*=}" ;;
      --spot) spot=yes ;;
      --queued) queued=yes ;;
      --dry-run) dry=yes ;;
      --)
        training=("$@")
        return
        ;;
      --config*) bad "$word is for sl_jax.train; please put -- before its arguments." ;;
      -*) bad "$word is not an option." ;;
      *)
        if [ -z "$command" ]; then
          command="$word"
        elif [ -z "$name" ]; then
          name="$word"
        else
          bad "'$word' is one word too many."
        fi
        ;;
    esac
  done
}

# accelerator TYPE: the accelerator type of Google's that TYPE is or, as a slice, has.
accelerator() {
  local slice="${1#*:}" chips=1 side
  case "$1" in
    v4:* | v5e:* | v5p:* | v6e:*)
      [[ "$slice" =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || return 1
      for side in ${slice//x/ }; do chips=$((chips * side)); done
      case "$1" in
        v5e:*) printf 'v5litepod-%d\n' "$chips" ;;
        v6e:*) printf 'v6e-%d\n' "$chips" ;;
        *) printf '%s-%d\n' "${1%%:*}" $((2 * chips)) ;; # counts cores
      esac
      ;;
    *)
      [[ "$1" =~ ^(v4|v5litepod|v5p|v6e)-[1-9][0-9]*$ ]] || return 1
      printf '%s\n' "$1"
      ;;
  esac
}

# hosts TYPE: how many an accelerator type has.
hosts() {
  local count="${1##*-}"
  case "$1" in
    v4-* | v5p-*) count=$((count / 2)) ;;
  esac
  case "$1" in
    v5litepod-8 | v6e-8) printf '1\n' ;;
    *) printf '%d\n' $(((count + CHIPS - 1) / CHIPS)) ;;
  esac
}

software() {
  case "$1" in
    v4-*) printf 'tpu-ubuntu2204-base\n' ;;
    v5litepod-*) printf 'v2-alpha-tpuv5-lite\n' ;;
    v5p-*) printf 'v2-alpha-tpuv5\n' ;;
    v6e-*) printf 'v2-alpha-tpuv6e\n' ;;
  esac
}

check() {
  local word
  [ -n "$command" ] || bad "Please give a command and the name of a TPU VM."
  case "$command" in
    run | create | install | start | logs | status | stop | delete) ;;
    *) bad "'$command' is not a command." ;;
  esac
  [ -n "$name" ] || bad "Please name the TPU VM: bash launch/tpu_vm.sh $command NAME"
  [[ "$name" =~ ^[a-z]([-a-z0-9]{0,60}[a-z0-9])?$ ]] ||
    bad "'$name' cannot be the name of a TPU VM: please use small letters, digits and hyphens."
  [[ "$restarts" =~ ^[0-9]+$ ]] || bad "--restarts=$restarts is not a number."
  [[ "$grace" =~ ^[0-9]+$ ]] || bad "--grace=$grace is not a number of seconds."
  [[ "$extras" =~ ^[a-z,]+$ ]] || bad "--extras=$extras are not extras of setup.py."
  for word in ${variables[@]+"${variables[@]}"}; do
    [[ "$word" =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] ||
      bad "--env=$word: please give the name of a variable only; its value is taken from here."
    [ -n "${!word:-}" ] || bad "--env=$word: the variable is not set here; please export it."
  done
  if [ -n "$type" ]; then
    accelerator "$type" >/dev/null ||
      bad "--type=$type is not known; please give one such as v5litepod-8, v5p-32 or v6e:4x4."
    type="$(accelerator "$type")"
    version="${version:-$(software "$type")}"
  fi
  case "$command" in
    run | create) [ -n "$type" ] || bad "Please give the type of the TPU, as in --type=v5litepod-8" ;;
  esac
  case "$command" in
    run | start)
      [ ${#training[@]} -gt 0 ] || bad "There is nothing to train; please add -- --config=FILE …"
      check_workdir
      ;;
    *) [ ${#training[@]} -eq 0 ] || bad "$command takes no arguments of sl_jax.train." ;;
  esac
  [ "$dry" = yes ] || command -v gcloud >/dev/null || fail "gcloud is not found." \
    "Please install the Google Cloud CLI, then: gcloud auth login; gcloud config set project NAME"
}

# check_workdir: that it outlives the VM and is one for all hosts. An absolute path may be that of a
# disk which hosts share.
check_workdir() {
  local word workdir=""
  for word in "${training[@]}"; do
    case "$word" in --config.workdir=*) workdir="${word#*=}" ;; esac
  done
  case "$workdir" in
    *://* | /*) return ;;
  esac
  if [ "$spot$queued" = nono ] && [ "$(hosts "${type:-v6e-1}")" -eq 1 ]; then
    return
  fi
  bad "config.workdir is '$workdir': a folder of each host, which is deleted with it." \
    "Please give --config.workdir=gs://BUCKET/FOLDER, or the path of a disk that hosts share."
}

# here WORD...: runs a command, or prints its line if --dry-run.
here() {
  if [ "$dry" = yes ]; then
    printf '%s\n' "$(printf ' %q' "$@" | cut -c2-)" >&3
  else
    "$@" </dev/null
  fi
}

# cloud WORD...: gcloud compute tpus WORD... for the VM's place.
cloud() {
  here gcloud compute tpus "$@" --quiet ${place[@]+"${place[@]}"}
}

# shell WORKER COMMAND: runs it on a host, or on all; a connection that is dead is given up.
shell() {
  cloud tpu-vm ssh "$name" "--worker=$1" "--command=$2" \
    --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=4
}

# remotely WORKER WORD...: launch/tpu_host.sh WORD... on a host, or on all.
remotely() {
  shell "$1" "bash $HOST_SCRIPT$(printf ' %q' "${@:2}")"
}

# persist WORD...: again if it fails, as connections do.
persist() {
  local try
  for ((try = 1; try < TRIES; try++)); do
    if "$@"; then return; fi
    say "Try $try of $TRIES has failed; the reason stands above."
    sleep "$pause"
  done
  "$@"
}

# described GROUP FIELD: of the VM or its request; empty if it is not there.
described() {
  local said
  if ! said="$(cloud "$1" describe "$name" "--format=value($2)" 2>&1)"; then
    case "$said" in
      *NOT_FOUND* | *"not found"* | *"could not be found"*) return ;;
      *) fail "gcloud does not say what $name is:" "$said" ;;
    esac
  fi
  printf '%s\n' "$said"
}

# vm_state: READY, PREEMPTED, …; where there is none, that of a request for it; or empty.
vm_state() {
  local state
  state="$(described tpu-vm state)" || return
  if [ -n "$state" ]; then
    printf '%s\n' "$state"
  else
    described queued-resources state.state
  fi
}

request() {
  local flags=("--accelerator-type=$type")
  [ "$spot" = no ] || flags+=(--spot)
  if [ "$queued" = yes ]; then
    cloud queued-resources create "$name" "--node-id=$name" "${flags[@]}" \
      "--runtime-version=$version"
  else
    cloud tpu-vm create "$name" "${flags[@]}" "--version=$version"
  fi
}

remove() {
  local requested="$queued" found
  if [ "$dry$queued" = nono ]; then
    found="$(described queued-resources name)" || return
    [ -z "$found" ] || requested=yes
  fi
  if [ "$requested" = yes ]; then
    cloud queued-resources delete "$name" --force
  else
    cloud tpu-vm delete "$name"
  fi
}

say() {
  printf '%s %s\n' "$(date +%H:%M:%S)" "$*" >&2
}

# change WORD...: changes what VM there is. Once there was a training, a failure is no end, as chips
# are often short after a preemption: it is said, and after a pause, each time longer, the caller may
# look how things stand, and try again.
change() {
  if "$@"; then
    rest="$pause"
    return
  fi
  [ "$trained" = yes ] || return 1
  say "That has failed; the reason stands above. Next try in $rest s."
  sleep "$rest"
  rest="$(awk -v rest="$rest" -v most="$LONGEST" 'BEGIN { print (2 * rest < most ? 2 * rest : most) }')"
}

create() {
  local state known said="" looks=0 answered="$trained"
  while :; do
    state="$(vm_state)" || state=unknown
    case "$state" in
      unknown) # of a client that is offline, or not logged in: then nothing is waited for yet
        [ "$answered" = yes ] || exit 1
        looks=$((looks + 1))
        [ "$looks" -lt "$LOOKS" ] || fail "gcloud has not answered $looks times." \
          "What was asked for comes all the same, and costs. To go on: $again"
        sleep "$pause"
        continue
        ;;
      READY)
        known="$(described tpu-vm acceleratorType)" || continue
        [ "${known##*/}" = "$type" ] || fail "$name is there, as a ${known##*/} and not a $type." \
          "Please choose another name, or delete it: bash launch/tpu_vm.sh delete $name"
        say "$name is ready."
        return
        ;;
      "")
        say "Making $name, a $type."
        change request || fail "gcloud could not make $name; its words stand above." \
          "Where chips are short, --queued waits for them in Google's queue."
        [ "$dry" = no ] || return 0
        ;;
      PREEMPTED | TERMINATED | SUSPENDED)
        [ "$state" = PREEMPTED ] || [ "$spot$queued" != nono ] ||
          fail "$name is $state, with all that is on its disk. To start it again, and go on:" \
            "  gcloud compute tpus tpu-vm start $name${place[*]+ ${place[*]}}" \
            "If nothing on it is wanted: bash launch/tpu_vm.sh delete $name"
        say "$name is $state: it is deleted and made again."
        change remove
        ;;
      STOPPED)
        say "$name is stopped: it is started."
        change cloud tpu-vm start "$name"
        ;;
      FAILED)
        fail "The request for $name has failed. To see why:" \
          "  gcloud compute tpus queued-resources describe $name" \
          "Then please delete it: bash launch/tpu_vm.sh delete $name"
        ;;
      *)
        [ "$state" = "$said" ] || say "$name is $state."
        sleep "$pause"
        ;;
    esac
    said="$state" answered=yes looks=0
  done
}

install() {
  local archive="$scratch/sl_jax.tar.gz" unpack="mkdir -p sl_jax && tar -xzf sl_jax.tar.gz -C sl_jax"
  say "Installing on all hosts of $name."
  here tar -C "$ROOT" --exclude=__pycache__ -czf "$archive" "${SENT[@]}"
  persist cloud tpu-vm scp "$archive" "$name:sl_jax.tar.gz" --worker=all
  persist shell all "$unpack && bash $HOST_SCRIPT install $extras"
}

# hand_over: the variables of --env, in a file that only its owner reads, here and there.
hand_over() {
  local file="$scratch/env" word
  [ ${#variables[@]} -gt 0 ] || return 0
  if [ "$dry" = no ]; then
    for word in "${variables[@]}"; do printf 'export %s=%q\n' "$word" "${!word}"; done >"$file"
    chmod 600 "$file"
  fi
  persist cloud tpu-vm scp "$file" "$name:.sl_jax-env" --worker=all --scp-flag=-p
  rm -f "$file"
}

start() {
  say "Starting the training on all hosts of $name."
  hand_over
  persist remotely all start "${training[@]}"
}

# training_state: that of all hosts together, as launch/tpu_host.sh tells it, or "unreachable". Of
# several the first of another, running, lost, never, stopped; of statuses the highest.
training_state() {
  local lines state told
  told="bash $HOST_SCRIPT state$(printf ' %q' "${training[@]}")"
  if ! lines="$(shell all "if [ -f $HOST_SCRIPT ]; then $told; else echo never; fi")"; then
    printf 'unreachable\n'
    return
  fi
  for state in another running lost never stopped; do
    if grep -qxF "$state" <<<"$lines"; then
      printf '%s\n' "$state"
      return
    fi
  done
  printf 'ended %s\n' "$(sed -n 's/^ended //p' <<<"$lines" | sort -n | tail -n 1)"
}

# goes_on STATUS: whether a training that ended so is to be started again, as often as it takes:
# terminated (143) or killed otherwise.
goes_on() {
  [ "$1" -gt 128 ] && [ "$1" -ne 130 ]
}

# attend: follows the training until it ends, over lost connections. The status is that of the
# training, or AGAIN or FAILED if it is to start again. Its log is then in $scratch/log.
attend() {
  local state looks=0 copy="$scratch/log"
  if [ "$dry" = yes ]; then
    logs
    return
  fi
  : >"$copy"
  while :; do
    remotely 0 follow "$(($(wc -c <"$copy")))" | tee -a "$copy" || say "The connection to $name is lost."
    state="$(training_state)"
    case "$state" in
      "ended 0") return 0 ;;
      ended*)
        say "The training has ended with status ${state#* }."
        [ "$state" != "ended 70" ] || return "$FAILED"
        ! goes_on "${state#* }" || return "$AGAIN"
        return "${state#* }"
        ;;
      stopped)
        say "The training was stopped."
        return 143
        ;;
      lost | never) # the hosts were started again
        say "The training is gone."
        return "$AGAIN"
        ;;
      unreachable)
        state="$(vm_state)" || state=unknown # of a client that is offline
        say "$name is ${state:-gone}."
        case "$state" in
          READY | unknown) looks=$((looks + 1)) ;;
          *) return "$AGAIN" ;;
        esac
        [ "$looks" -lt "$LOOKS" ] || fail "$name has not answered $looks times; what runs there goes on." \
          "To follow it again: $again"
        ;;
      *) looks=0 ;;
    esac
    sleep "$pause"
  done
}

run() {
  local state status count=0 looks=0 failures=0
  while :; do
    create
    state=never
    [ "$dry" = yes ] || state="$(training_state)"
    case "$state" in
      unreachable) # as hosts are at first
        looks=$((looks + 1))
        [ "$looks" -lt "$LOOKS" ] || fail "The hosts of $name have not answered $looks times."
        sleep "$pause"
        continue
        ;;
      running) say "The training runs already." ;;
      another)
        fail "Another training runs on $name; please stop it first: bash launch/tpu_vm.sh stop $name"
        ;;
      "ended 0")
        say "The training is finished."
        return
        ;;
      *)
        install
        start
        ;;
    esac
    status=0 looks=0 trained=yes
    attend || status=$?
    case "$status" in
      "$AGAIN") failures=0 ;;
      "$FAILED")
        ! grep -q 'Epoch [0-9]* of [0-9]*: ' "$scratch/log" || failures=0
        failures=$((failures + 1))
        [ "$failures" -lt "$FAILURES" ] ||
          fail "An error that nobody expected has ended it $failures times, with no epoch between." \
            "The log above says why. To try again: $again"
        ;;
      *) return "$status" ;;
    esac
    [ "$count" -lt "$restarts" ] || fail "It has started again $count times, and does not any more."
    count=$((count + 1))
    say "Start $((count + 1)), to go on where it was."
    sleep "$pause"
  done
}

logs() {
  remotely 0 follow 0
}

status() {
  local state
  state="$(vm_state)"
  printf '%s: %s\n' "$name" "${state:-not there}"
  case "$dry$state" in
    yes | noREADY) remotely all state ;;
  esac
}

stop() {
  remotely all stop "$grace"
}

delete() {
  remove
}

interrupted() {
  printf '\n%s\n' "Interrupted. What was started on $name goes on, and costs." \
    "To follow it: $again" \
    "To stop the training: bash launch/tpu_vm.sh stop $name" \
    "To delete the TPU VM: bash launch/tpu_vm.sh delete $name" >&2
  exit 130
}

parse "$@"
check
exec 3>&1
scratch="${TMPDIR:-/tmp}/FOLDER"
if [ "$dry" = no ]; then
  scratch="$(mktemp -d)" # mode 700
  trap 'rm -rf "$scratch"' EXIT
fi
case "$command" in
  run | create | install | start | logs) trap interrupted INT ;;
esac
"$command"
