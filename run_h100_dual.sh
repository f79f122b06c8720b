#!/usr/bin/env bash
#
# Launcher of the Korean sLLM training system: reads its own options, checks the environment,
# starts torchrun with train_h100_dual.py in the background, and watches or stops the run.
#
# Everything about training belongs to train_h100_dual.py, whose options pass through untouched.
# Exit codes: 0 done or out of --max-hours, 1 environment or run failed, 2 usage, 3 not running (--status, --follow,
# --stop), 130 stopped by a signal (in the foreground, and seen by --follow).

set -euo pipefail

SCRIPT_DIR="$(CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"
readonly SCRIPT_DIR
readonly SCRIPT_PATH="$SCRIPT_DIR/run_h100_dual.sh"
readonly TRAIN_SCRIPT="$SCRIPT_DIR/train_h100_dual.py"
readonly VENV_DIR="$SCRIPT_DIR/.venv"
readonly FIRST_LOG_WAIT=60 # seconds to wait for the run's first line
readonly FIRST_LOG_SHOW=5  # seconds of it to show
readonly QUIET_START=120   # seconds without one that are told
readonly OWN_OPTIONS="--foreground --dry-run --help --status --json --follow --stop --notify --python --no-install"

export PYTHONUTF8=1                                       # Hangul in paths and output, also under LC_ALL=C
export CUDA_DEVICE_ORDER=${CUDA_DEVICE_ORDER:-PCI_BUS_ID} # the numbers of nvidia-smi, by which the plan goes
export LAUNCHER_OPTIONS="$OWN_OPTIONS"

action=run foreground=false dry_run=false as_json=false may_install=true
notify="" wanted_python=""
script_args=()
foreign=()      # variables that a run is started without
python=""       # has the packages
plain_python="" # recent enough, may lack them
missing=""      # packages that plain_python lacks
declare -A plan=()
plan_text=""

# A full disk, which may be why a run failed, or a reader who has gone keeps the supervisor from no duty.
log() { printf '%s\n' "$@" 2>/dev/null || true; } # log LINE...
warn() { printf '⚠️  %s\n' "$*" >&2 2>/dev/null || true; }
die() { # die MESSAGE [EXIT_CODE]
  printf '❌ %s\n' "$1" >&2
  exit "${2:-1}"
}

banner() {
  cat 2>/dev/null <<'TEXT' || true
========================================================
     한국어 sLLM H100 듀얼 GPU 학습 실행기
     Korean sLLM H100 Dual GPU Training Launcher
     🚀 H100 최적화 + 분산 학습 지원
========================================================

TEXT
}

usage() {
  banner
  cat <<'TEXT'
사용법: ./run_h100_dual.sh [옵션]

실행:
  --foreground                    포그라운드에서 실행 (기본: 백그라운드)
  --dry-run                       환경을 확인하고 명령어만 출력 (실행 안 함)
  --notify CMD                    끝나면 CMD를 실행 (상태 finished|stopped|failed를 인자로 전달)
  --help                          이 도움말

관리:
  --status [--json]               실행 상태 (종료 코드 0 실행 중, 1 비정상 종료, 3 실행 중 아님)
  --follow                        실시간 로그와 진행률 (Ctrl-C로 나가도 학습은 계속)
  --stop                          현재 스텝을 마치고 저장한 뒤 중단

설치:
  --python PATH                   사용할 파이썬
  --no-install                    아무것도 설치하지 않고 부족한 패키지만 알림

종료 코드는 0 완료(--max-hours로 끝나도), 1 환경 문제나 실패, 2 잘못된 옵션, 130 포그라운드에서 신호로 중단

TEXT
  script_args=() # whatever else was typed
  find_python never
  "$plain_python" "$TRAIN_SCRIPT" --help
}

parse_args() { # the script parses all options that are its own, where it is asked
  while (($#)); do
    case $1 in
      --notify=* | --python=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    esac
    case $1 in
      --notify | --python)
        if (($# < 2)) || [[ -z $2 || $2 == --* ]]; then
          die "$1: 값이 없습니다. 예: --notify ./notify.sh, --python /usr/bin/python3" 2
        fi
        if [[ $1 == --notify ]]; then notify=$2; else wanted_python=$2; fi
        shift
        ;;
      --foreground) foreground=true ;;
      --dry-run) dry_run=true ;;
      --no-install) may_install=false ;;
      --help | -h) action=help ;;
      --status | --follow | --stop) action=${1#--} ;;
      --json) as_json=true ;;
      --generate | --evaluate | --generate=* | --evaluate=*) # they start no run
        action=use
        script_args+=("$1")
        ;;
      *) script_args+=("$1") ;;
    esac
    shift
  done
  [[ $as_json == false || $action =~ ^(status|help)$ ]] || die "--json: --status 와 함께 쓰세요" 2
}

# --- environment ---

drop_foreign_variables() { # what a pod, srun or another project's accelerate and torchrun left behind: each would count
  local name
  for name in "${!ACCELERATE_@}" "${!PET_@}" "${!TORCHELASTIC_@}" PYTHONIOENCODING MASTER_{ADDR,PORT} \
    {,LOCAL_,GROUP_,ROLE_}{RANK,WORLD_SIZE}; do
    [[ ! -v $name ]] || foreign+=("$name")
  done
  unset "${foreign[@]}"
}

find_python() { # find_python WHEN: sets plain_python and python; WHEN is what ask is to do
  # python: the first that has the packages.  plain_python: the same or, if none has, the first that is recent enough,
  # which makes .venv.  Each is asked at once: wrong options are told by the first Python that can read them.
  local candidates=(python3 "$VENV_DIR/bin/python" python3.14 python3.13 python3.12 python3.11) candidate
  [[ -z $wanted_python ]] || candidates=("$wanted_python")
  for candidate in "${candidates[@]}"; do
    # A half-made environment isn't the Python that makes it anew.
    [[ $candidate == "$VENV_DIR"/* && -e $VENV_DIR/.installing ]] && continue
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue # as MINIMUM_PYTHON
    ask "$candidate" "$1"
    [[ -n $plain_python ]] || plain_python=$candidate missing=${plan[missing]}
    if [[ -z ${plan[missing]} ]]; then
      plain_python=$candidate python=$(command -v "$candidate")
      return
    fi
  done
  if [[ -n $plain_python ]]; then
    [[ $1 == never ]] || ask "$plain_python" always # what can be told without the packages
    return
  fi
  [[ -z $wanted_python ]] || die "--python: '$wanted_python' 은(는) 실행할 수 있는 Python 3.11 이상이 아닙니다. 경로를 확인하세요"
  die "Python 3.11 이상이 없습니다. 설치하세요: sudo apt install python3 python3-venv"
}

ask() { # ask PYTHON WHEN: makes the plan always, never, or where its packages are complete; sets plan and plan_text
  # One question answers everything that can be told before the start, and refuses what can't run; the code says
  # whether the options (2) or the machine (1) were at fault.
  local line background=true
  [[ $foreground == true ]] && background=false
  plan=() plan_text=""
  {
    while IFS= read -r line && [[ -n $line ]]; do plan[${line%%=*}]=${line#*=}; done
    IFS= read -rd '' plan_text || true # to the end
  } < <("$1" "$TRAIN_SCRIPT" internal:plan "$2" "$background" "${script_args[@]}")
  if ((${plan[code]:-1} != 0)); then
    printf '%s' "$plan_text" >&2
    exit "${plan[code]:-1}"
  fi
}

ensure_environment() {
  [[ -z $python ]] || return 0
  if [[ $may_install == false || -n $wanted_python ]]; then
    die "필요한 패키지가 없습니다: $missing (설치: $plain_python -m pip install -r '$SCRIPT_DIR/requirements.txt')"
  fi
  python="$VENV_DIR/bin/python"
  if [[ $dry_run == true ]]; then
    warn "패키지가 없어 실행할 때 $VENV_DIR 에 설치합니다: $missing"
    return
  fi
  install_packages "$SCRIPT_DIR/requirements.txt"
  ask "$python" always # again: PyTorch can be asked now
}

install_packages() { # install_packages REQUIREMENTS...
  local output requirement arguments=()
  for requirement in "$@"; do arguments+=(-r "$requirement"); done
  log "📦 필요한 패키지를 $VENV_DIR 에 설치합니다 (처음 한 번, 몇 분 걸립니다)"
  if [[ ! -x $VENV_DIR/bin/python || -e $VENV_DIR/.installing ]]; then
    mkdir -p "$VENV_DIR" || die "디렉토리를 만들지 못했습니다: $VENV_DIR"
    touch "$VENV_DIR/.installing"
    rm -rf "${VENV_DIR:?}"/*
    if ! output=$("$plain_python" -m venv "$VENV_DIR" 2>&1); then
      printf '%s\n' "$output" >&2
      die "가상 환경을 만들지 못했습니다. 설치하세요: sudo apt install python3-venv"
    fi
  fi
  touch "$VENV_DIR/.installing"
  output=$(mktemp)
  # shellcheck disable=SC2064 # the name is known now
  trap "rm -f '$output'" EXIT
  if ! "$VENV_DIR/bin/python" -m pip install --disable-pip-version-check "${arguments[@]}" 2>&1 |
    tee "$output" | { grep --line-buffered -E '^(Collecting|Downloading|Installing|Successfully|ERROR)' || true; }; then
    explain_pip_failure "$output"
  fi
  rm -f "$VENV_DIR/.installing" "$output"
  trap - EXIT
  log "✅ 패키지 설치 완료"
}

explain_pip_failure() { # explain_pip_failure OUTPUT
  if grep -qi 'no space left' "$1"; then
    die "디스크가 가득 차 설치하지 못했습니다. 공간을 비우세요: df -h '$SCRIPT_DIR'"
  elif grep -qiE 'name resolution|connection|timed out|unreachable|no matching distribution' "$1"; then
    die "패키지 저장소에 연결하지 못했습니다. 네트워크를 확인하세요: $VENV_DIR/bin/python -m pip download torch"
  fi
  tail -n 5 "$1" >&2
  die "패키지를 설치하지 못했습니다. 직접 해 보세요: $VENV_DIR/bin/python -m pip install -r '$SCRIPT_DIR/requirements.txt'"
}

# --- start ---

build_command() {
  local rendezvous=(--standalone --nnodes 1 --local-addr 127.0.0.1) # whatever the machine's own name resolves to
  if [[ -n ${H100_DUAL_STORE_DIR-} ]]; then
    # A server of torch's listens on every interface; nobody else can connect to a file.  No heartbeats: half a record,
    # which is what a full disk leaves of one, is read for ever, and then torchrun sees no crash and no signal.
    rendezvous=(
      --nnodes 1 --rdzv-backend c10d --rdzv-conf "store_type=file,keep_alive_interval=31536000"
      --rdzv-endpoint "$H100_DUAL_STORE_DIR/torchrun" --local-addr 127.0.0.1
    )
  fi
  if ((plan[nnodes] > 1)); then
    # torchrun numbers the machines in the alphabetical order of their names; only the first one's is an address too.
    local name=${plan[rdzv_endpoint]%:*}
    ((plan[node_rank] == 0)) || printf -v name '%s~%03d' "$name" "${plan[node_rank]}"
    rendezvous=(
      --nnodes "${plan[nnodes]}" --rdzv-backend c10d --rdzv-endpoint "${plan[rdzv_endpoint]}" --rdzv-id h100_dual
      --rdzv-conf "is_host=$((plan[node_rank] == 0))" --local-addr "$name"
    )
  fi
  command=(
    env "${foreign[@]/#/--unset=}" "OMP_NUM_THREADS=${OMP_NUM_THREADS:-${plan[threads]}}" PYTHONUNBUFFERED=1 PYTHONUTF8=1
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT=86400 # a save may take as long as it takes, also where all processes are signalled
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # a shared one keeps dead ranks' addresses: restarts would hang on them
    "$python" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "${plan[processes]}"
    --max-restarts "${plan[max_restarts]}" --signals-to-handle "SIGTERM,SIGINT,SIGQUIT" # and not SIGHUP
    "$TRAIN_SCRIPT" "${script_args[@]}" --device "${plan[device]}"
  )
}

print_command() {
  log "🧪 실행할 명령어 (--dry-run이므로 실행하지 않습니다):"
  local words
  printf -v words '%q ' "${command[@]}"
  log "${words% }"
}

# --- processes ---

pid_is_ours() { # pid_is_ours PID: the living supervisor of these logs, which has their lock open
  [[ $1 =~ ^[0-9]+$ && /proc/$1/fd/9 -ef $logs_lock ]]
}

read_pid() { # read_pid PID_FILE
  local pid=""
  [[ -r $1 ]] && read -r pid <"$1"
  printf '%s' "$pid"
}

acquire_lock() {
  # Held on descriptor 9 by the launcher, its supervisor and torchrun, so a kill -9 can't leave it behind; the plan
  # has looked at the output's, which rank 0 takes.  Looked at first, so that a refused start makes no directory.
  [[ ! -e $logs_lock ]] || flock -n "$logs_lock" true || refuse_second_run $?
  mkdir -p "${plan[logs_dir]}" "${plan[output_dir]}" 2>/dev/null ||
    die "디렉토리를 만들지 못했습니다: ${plan[logs_dir]}, ${plan[output_dir]} (다른 --logs-dir, --output-dir 를 주세요)"
  exec 9>>"$logs_lock"
  flock -n 9 || refuse_second_run $?
}

refuse_second_run() { # refuse_second_run CODE: of flock, 1 where another process has the lock
  local tries
  (($1 == 1)) || die "잠글 수 없는 파일입니다: $logs_lock (쓸 수 있는 로컬 디스크의 --logs-dir 를 주세요)"
  for ((tries = 0; tries < 20; tries++)); do # whoever holds the lock may be about to write its PID
    ! pid_is_ours "$(read_pid "$pid_file")" || break
    sleep 0.1
  done
  die "이미 실행 중인 학습이 있습니다 (PID $(read_pid "$pid_file")). 다른 --output-dir 와 --logs-dir 를 주거나 멈추세요: $SCRIPT_PATH --stop --logs-dir '${plan[logs_dir]}'"
}

rotate_console_log() {
  local number=1
  [[ -s $console_log ]] || return 0
  while [[ -e $console_log.$number ]]; do number=$((number + 1)); done
  mv "$console_log" "$console_log.$number"
}

supervise() { # runs torchrun until every rank has left; the PID in the file is this shell's
  # Called where set -e doesn't count: whatever fails in here, its duties at the end are done, one after the other.
  local agent ranks="" signals=0 heard=false code=0 outcome=finished state="" logged guard=() pause turns=0
  H100_DUAL_RUN_ID="$$-$(date +%s)" # tells this run's state from an earlier one's
  export H100_DUAL_RUN_ID
  trap 'signals=$((signals + 1))' TERM INT # no more: one that comes while a trap runs may be lost
  trap '' HUP
  printf '%s\n' "$$" >"$pid_file" || die "PID 파일을 쓰지 못해 시작하지 않습니다: $pid_file (디스크 공간과 권한을 확인하세요)"
  # What torchrun itself says goes to the detail log; the run's own state file says how it ended.
  # A session of its own keeps the terminal's Ctrl-C away from it; should this shell be killed, it hears of it.
  logged=$(stat -c %s "$detail_log" 2>/dev/null || printf 0)
  if command -v setpriv >/dev/null; then guard=(setpriv --pdeathsig TERM --); fi
  setsid "${guard[@]}" "${command[@]}" 2>>"$detail_log" </dev/null &
  agent=$!
  exec {pause}<> <(:)
  SECONDS=0
  # A killed torchrun leaves ranks that save before they go: rank 0 holds the output's lock so long.
  while kill -0 "$agent" 2>/dev/null || { [[ $(read_pid "$output_lock") == "$$" ]] && is_locked "$output_lock"; }; do
    if ((signals > 1)); then
      signal_ranks KILL
      kill -KILL "$agent" 2>/dev/null || true
    elif ((signals == 1)); then
      [[ $heard == true ]] || log "🛑 중단 요청: 현재 스텝을 마치고 저장합니다 (한 번 더 보내면 즉시 끝납니다)"
      signal_ranks TERM # again and again: one that is being started may not hear the first; others it leaves as they are
      # Another machine doesn't know what there is to save.
      [[ $heard == true ]] || ((plan[node_rank] > 0)) ||
        "$python" "$TRAIN_SCRIPT" internal:stopping "${plan[output_dir]}" "$agent" || true
      heard=true
    fi
    if ((SECONDS > QUIET_START)) && [[ ! -s $console_log ]]; then
      warn "$SECONDS초가 지나도록 시작하지 못했습니다. $detail_log 의 마지막 줄: $(tail -c "+$((logged + 1))" "$detail_log" | tail -n 1)"
      SECONDS=0
    fi
    if ((++turns % 7200 == 0)) && [[ -n ${H100_DUAL_STORE_DIR-} ]]; then # an hour: what ages in /tmp is tidied away
      touch -c "$H100_DUAL_STORE_DIR" "$H100_DUAL_STORE_DIR"/* || true
    fi
    read -rt 0.5 -u "$pause" || true # a sleep without a process
  done
  wait "$agent" 2>/dev/null || code=$?
  ((code == 0)) || outcome=failed
  ((signals == 0)) || outcome=stopped
  state=$("$python" "$TRAIN_SCRIPT" internal:finalize "${plan[output_dir]}" "$outcome" "$code" "$detail_log")
  state=${state:-$outcome}
  if [[ $state == failed ]]; then
    [[ -s $console_log ]] || tail -n 15 "$detail_log" || true
    log "❌ 학습이 실패로 끝났습니다. 자세한 내용: $detail_log"
  fi
  rm -rf "$pid_file" "${H100_DUAL_STORE_DIR-}"
  exec 9>&- # --notify may start the next run, also by torchrun itself: each is a run of its own
  unset H100_DUAL_RUN_ID H100_DUAL_STORE_DIR
  if [[ -n $notify ]]; then
    bash -c "$notify \"\$@\"" notify "$state" || warn "--notify 명령이 실패했습니다: $notify"
  fi
  case $state in
    finished) return 0 ;;
    stopped) return $((signals > 0 ? 130 : 0)) ;; # 0: by its own --max-hours, as a chain of jobs wants it
    *) return 1 ;;
  esac
}

is_locked() { # is_locked FILE: another process has its lock; where files can't be locked, none has
  local code=0
  flock -n "$1" true || code=$?
  ((code == 1))
}

signal_ranks() { # signal_ranks SIGNAL: to torchrun's children, and to torchrun itself only while it has none
  # agent and ranks are supervise's, which alone calls it.
  local children pid
  children=$(cat "/proc/$agent/task"/*/children 2>/dev/null) || true
  ranks=${children:-$ranks}
  for pid in ${ranks:-$agent}; do
    # By the run's name in its environment: the number may be another process's by now.
    ! grep -qsz "^H100_DUAL_RUN_ID=$H100_DUAL_RUN_ID\$" "/proc/$pid/environ" || kill "-$1" "$pid" 2>/dev/null || true
  done
}

start_foreground() {
  # The run writes to the log alone; a process beside it shows the log to the end, on a terminal with a progress bar.
  local follower code=0
  : >>"$console_log"
  "$python" "$TRAIN_SCRIPT" internal:follow "$$" "${script_args[@]}" 9>&- &
  follower=$!
  supervise >>"$console_log" 2>&1 || code=$?
  wait "$follower" || true
  exit "$code"
}

start_background() {
  local pid look
  look="tail -f $(shown_path "$console_log")"
  log "🔄 백그라운드 모드로 실행됩니다" "📋 로그 파일: ${look#tail -f }" "📋 실시간 로그 확인: $look" ""
  : >"$console_log"
  trap 'log "" "백그라운드에서 계속 실행 중... (PID ${pid-})"; exit 0' INT
  setsid nohup "$BASH" "$SCRIPT_PATH" internal:supervise "${plan[output_dir]}" "${plan[logs_dir]}" "$notify" "$python" \
    "${plan[processes]}" "${plan[node_rank]}" "${command[@]}" >>"$console_log" 2>&1 </dev/null &
  pid=$!
  exec 9>&-
  log "✅ 백그라운드 학습 시작됨!" "🔢 프로세스 ID: $pid" "📄 PID 파일: $(shown_path "$pid_file")" ""
  log "🔍 학습 상태 확인 명령어:"
  log "$(printf '  %-*s     # %s\n' "${#look}" "$look" "실시간 로그" "${#look}" "ps -p $pid" "프로세스 상태" \
    "${#look}" "kill $pid" "학습 중단")"
  log "" "📋 초기 로그 출력 (${FIRST_LOG_SHOW}초간):" "----------------------------------------"
  for ((i = 0; i < FIRST_LOG_WAIT * 5; i++)); do
    if [[ -s $console_log ]]; then
      timeout --foreground "$FIRST_LOG_SHOW" tail -n +1 -f "$console_log" 2>/dev/null || true
      break
    fi
    kill -0 "$pid" 2>/dev/null || break
    sleep 0.2
  done
  log "----------------------------------------"
  report_first_seconds "$pid"
}

report_first_seconds() { # report_first_seconds PID
  local code=0 tries
  for ((tries = 0; tries < 100; tries++)); do # one that has told its failure ends in a moment
    { kill -0 "$1" 2>/dev/null && grep -qs '^❌' "$console_log"; } || break
    sleep 0.1
  done
  if kill -0 "$1" 2>/dev/null; then
    log "백그라운드에서 계속 실행 중..."
    return
  fi
  wait "$1" || code=$?
  case $code in
    0) log "✅ 학습이 끝났습니다" ;;
    130) log "🛑 학습이 중단되었습니다" ;;
    *) die "학습이 시작하자마자 실패했습니다. 로그: $(shown_path "$console_log")" ;;
  esac
}

shown_path() { # shown_path PATH: as it can be typed here
  printf '%s' "${1/#"$PWD/"/./}"
}

start_run() {
  trap '' PIPE # a reader who has seen enough, as head, ends no run
  banner
  log "🔍 H100 학습 환경 확인 중..."
  ensure_environment
  log "$plan_text"
  if [[ $dry_run == true ]]; then
    build_command
    print_command
    return
  fi
  set_log_paths
  acquire_lock
  rotate_console_log
  if ((plan[node_rank] == 0)); then # relative, and right where either directory is a link to another disk
    ln -sfnr "$console_log" "${plan[output_dir]}/training.log" || die "링크를 만들지 못했습니다: ${plan[output_dir]}/training.log"
  fi
  if ((plan[nnodes] == 1)); then
    H100_DUAL_STORE_DIR=$(mktemp -dt h100_dual.XXXXXX) || die "임시 디렉토리를 만들지 못했습니다. 다른 경로를 주세요: TMPDIR=경로"
    export H100_DUAL_STORE_DIR
  fi
  build_command
  ((${#foreign[@]} == 0)) || log "이 실행의 것이 아니라 빼고 시작한 환경 변수: ${foreign[*]}" >>"$detail_log"
  log "🎯 학습 시작!"
  if [[ $foreground == true ]]; then
    start_foreground
  else
    start_background
  fi
}

use_checkpoint() { # --generate and --evaluate: one process in the foreground, without the lock and files of a run
  ensure_environment
  command=("$python" "$TRAIN_SCRIPT" "${script_args[@]}")
  if [[ $dry_run == true ]]; then
    print_command
    return
  fi
  exec "${command[@]}"
}

set_log_paths() {
  # Machines may share the directories or not: beside the first one's, each one's files have names of their own.
  local node=""
  ((plan[node_rank] == 0)) || node="_node_${plan[node_rank]}"
  console_log="${plan[logs_dir]}/training_console${node}.log"
  pid_file="${plan[logs_dir]}/training${node}.pid"
  logs_lock="${plan[logs_dir]}/.training${node}.lock"
  output_lock="${plan[output_dir]}/.lock"
  detail_log="${plan[logs_dir]}/training_detail_rank_$((plan[node_rank] * ${plan[processes]:-1})).log"
}

interrupted() { # Ctrl-C before the run has begun
  printf '\n🛑 시작하기 전에 중단했습니다\n' >&2
  exit 130
}

main() {
  local when=never
  if [[ ${1-} == internal:supervise ]]; then
    plan[output_dir]=$2 plan[logs_dir]=$3 notify=$4 python=$5 plan[processes]=$6 plan[node_rank]=$7 # as start_background
    command=("${@:8}")
    set_log_paths
    supervise || exit
    return
  fi
  trap interrupted INT
  printf -v LAUNCHER_COMMAND '%s\036' "$SCRIPT_PATH" "$@"
  export LAUNCHER_COMMAND # for run_info.json
  drop_foreign_variables
  parse_args "$@"
  if [[ $action == help ]]; then
    usage
    return
  fi
  [[ ! $action =~ ^(run|use)$ ]] || when=complete
  find_python "$when"
  case $action in
    run) start_run ;;
    status) exec "$plain_python" "$TRAIN_SCRIPT" internal:status "$as_json" "${script_args[@]}" ;;
    follow | stop) exec "$plain_python" "$TRAIN_SCRIPT" internal:follow "$action" "${script_args[@]}" ;;
    use) use_checkpoint ;;
  esac
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  main "$@"
fi
