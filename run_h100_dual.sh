#!/usr/bin/env bash
#
# Launcher of the Korean sLLM training system: reads its own options, checks the environment,
# starts torchrun with train_h100_dual.py in the background, and watches or stops the run.
#
# Everything about training belongs to train_h100_dual.py, whose options pass through untouched.
# Exit codes: 0 done, 1 environment or run failed, 2 usage, 3 not running (--status, --stop),
# 130 stopped by a signal in the foreground.

set -euo pipefail

SCRIPT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"
readonly SCRIPT_DIR
readonly SCRIPT_PATH="$SCRIPT_DIR/run_h100_dual.sh"
readonly TRAIN_SCRIPT="$SCRIPT_DIR/train_h100_dual.py"
readonly VENV_DIR="$SCRIPT_DIR/.venv"
readonly FIRST_LOG_WAIT=60 # seconds to wait for the run's first line
readonly FIRST_LOG_SHOW=5  # seconds of it to show
readonly OWN_OPTIONS="--num-gpus --foreground --dry-run --help --status --json --stop --notify --python --no-install"

export PYTHONUTF8=1 # Hangul in paths and output, also under LC_ALL=C
export LAUNCHER_OPTIONS="$OWN_OPTIONS"

num_gpus=2
foreground=false
dry_run=false
action=run
as_json=false
notify=""
wanted_python=""
may_install=true
script_args=()
python=""       # has the packages
plain_python="" # recent enough, may lack them

log() { printf '%s\n' "$*"; }
warn() { printf '⚠️  %s\n' "$*" >&2; }
die() { # die MESSAGE [EXIT_CODE]
  printf '❌ %s\n' "$1" >&2
  exit "${2:-1}"
}

banner() {
  cat <<'TEXT'
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
  --num-gpus N                    사용할 GPU 수 (기본: 2)
  --foreground                    포그라운드에서 실행 (기본: 백그라운드)
  --dry-run                       환경을 확인하고 명령어만 출력 (실행 안 함)
  --notify CMD                    끝나면 CMD를 실행 (상태 finished|stopped|failed를 인자로 전달)
  --help                          이 도움말

관리:
  --status [--json]               실행 상태 (종료 코드 0 실행 중, 1 비정상 종료, 3 실행 중 아님)
  --stop                          현재 스텝을 마치고 저장한 뒤 중단

설치:
  --python PATH                   사용할 파이썬
  --no-install                    아무것도 설치하지 않고 부족한 패키지만 알림

TEXT
  find_python
  "$plain_python" "$TRAIN_SCRIPT" --help
}

need_value() { # need_value OPTION COUNT VALUE
  if (($2 < 2)) || [[ -z $3 || $3 == --* ]]; then
    die "$1: 값이 없습니다. 예: $1 $4" 2
  fi
}

parse_args() {
  local usage_problems=()
  while (($#)); do
    case $1 in
      --num-gpus=* | --notify=* | --python=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    esac
    case $1 in
      --num-gpus)
        need_value "$1" $# "${2-}" 2
        if [[ ! $2 =~ ^[0-9]{1,9}$ ]]; then
          usage_problems+=("$1: '$2' 값은 정수가 아닙니다 (예: 2)")
        elif ((10#$2 < 1 || 10#$2 > 64)); then
          usage_problems+=("$1: '$2' 값은 범위를 벗어났습니다 (1 이상 64 이하). 가장 가까운 값: $((10#$2 < 1 ? 1 : 64))")
        else
          num_gpus=$((10#$2))
        fi
        shift
        ;;
      --notify)
        need_value "$1" $# "${2-}" "./notify.sh"
        notify=$2
        shift
        ;;
      --python)
        need_value "$1" $# "${2-}" /usr/bin/python3
        wanted_python=$2
        shift
        ;;
      --foreground) foreground=true ;;
      --dry-run) dry_run=true ;;
      --no-install) may_install=false ;;
      --help | -h) action=help ;;
      --status) action=status ;;
      --json) as_json=true ;;
      --stop) action=stop ;;
      --foreground=* | --dry-run=* | --no-install=* | --help=* | --status=* | --json=* | --stop=*)
        usage_problems+=("${1%%=*}: 값을 받지 않는 옵션입니다. ${1%%=*} 만 쓰세요")
        ;;
      *) script_args+=("$1") ;;
    esac
    shift
  done
  if [[ $as_json == true && $action == run ]]; then
    usage_problems+=("--json: --status 와 함께 쓰세요")
  fi
  if ((${#usage_problems[@]})); then
    printf '❌ %s\n' "${usage_problems[@]}" >&2
    find_python
    "$plain_python" "$TRAIN_SCRIPT" internal:paths "${script_args[@]}" >/dev/null || true
    exit 2
  fi
}

# --- environment ---

find_python() {
  local candidates=(python3 "$VENV_DIR/bin/python" python3.14 python3.13 python3.12 python3.11) candidate missing
  [[ -n $wanted_python ]] && candidates=("$wanted_python")
  for candidate in "${candidates[@]}"; do
    command -v "$candidate" >/dev/null || continue
    missing=$("$candidate" "$TRAIN_SCRIPT" internal:packages 2>/dev/null) || continue
    plain_python=${plain_python:-$candidate}
    [[ $candidate == "$VENV_DIR"/* && -e $VENV_DIR/.installing ]] && continue # a set-up that was cut off
    if [[ -z $missing ]]; then
      python=$(command -v "$candidate")
      return
    fi
  done
  [[ -n $plain_python ]] && return
  if [[ -n $wanted_python ]]; then
    command -v "$wanted_python" >/dev/null || die "--python: '$wanted_python' 을(를) 실행할 수 없습니다. 경로를 확인하세요"
    die "--python: '$wanted_python' 은(는) Python 3.11 이상이 아닙니다. 다른 경로를 주세요"
  fi
  die "Python 3.11 이상이 없습니다. 설치하세요: sudo apt install python3 python3-venv"
}

ensure_environment() {
  [[ -n $python ]] && return
  local missing
  missing=$("$plain_python" "$TRAIN_SCRIPT" internal:packages | paste -sd ' ')
  if [[ $may_install == false || -n $wanted_python ]]; then
    die "필요한 패키지가 없습니다: $missing (설치: $plain_python -m pip install -r '$SCRIPT_DIR/requirements.txt')"
  fi
  if [[ $dry_run == true ]]; then
    warn "패키지가 없어 실행할 때 $VENV_DIR 에 설치합니다: $missing"
    python="$VENV_DIR/bin/python"
    return
  fi
  install_packages "$SCRIPT_DIR/requirements.txt"
  python="$VENV_DIR/bin/python"
}

install_packages() { # install_packages REQUIREMENTS...
  local output requirement arguments=()
  for requirement in "$@"; do arguments+=(-r "$requirement"); done
  log "📦 필요한 패키지를 $VENV_DIR 에 설치합니다 (처음 한 번, 몇 분 걸립니다)"
  if [[ ! -x $VENV_DIR/bin/python || -e $VENV_DIR/.installing ]]; then
    "$plain_python" -m venv --clear "$VENV_DIR" ||
      die "가상 환경을 만들지 못했습니다. 설치하세요: sudo apt install python3-venv"
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

# --- plan ---

declare -A plan=()
check_text=""
info_text=""

make_plan() {
  # One question answers everything that can be told before torch is imported, and refuses what
  # can't run; its exit code says whether the options (2) or the machine (1) were at fault.
  local output line block=0 background=true
  [[ $foreground == true ]] && background=false
  output=$("$plain_python" "$TRAIN_SCRIPT" internal:plan "$num_gpus" "$background" "${script_args[@]}") || exit $?
  while IFS= read -r line; do
    if [[ -z $line ]] && ((block < 2)); then
      block=$((block + 1))
    elif ((block == 0)); then
      plan[${line%%=*}]=${line#*=}
    elif ((block == 1)); then
      check_text+=$line$'\n'
    else
      info_text+=$line$'\n'
    fi
  done <<<"$output"
}

check_environment() {
  if [[ $dry_run == true && ! -x $python ]]; then
    return
  fi
  "$python" "$TRAIN_SCRIPT" internal:torch "${plan[gpus]}" || exit $?
}

build_command() {
  command=(
    env "OMP_NUM_THREADS=${plan[threads]}" PYTHONUNBUFFERED=1 PYTHONUTF8=1
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT=86400 # a save may take as long as it takes
    "$python" -m torch.distributed.run --standalone --nproc-per-node "${plan[processes]}"
    "$TRAIN_SCRIPT" "${script_args[@]}"
  )
  if [[ -n ${plan[add_device]} ]]; then
    command+=(--device "${plan[add_device]}")
  fi
}

print_command() {
  log "🧪 실행할 명령어 (--dry-run이므로 실행하지 않습니다):"
  local words
  printf -v words '%q ' "${command[@]}"
  log "${words% }"
}

# --- processes ---

pid_is_ours() { # pid_is_ours PID: the living supervisor of these logs, which has their lock open
  [[ $1 =~ ^[0-9]+$ && /proc/$1/fd/9 -ef ${plan[logs_dir]}/.training.lock ]]
}

read_pid() { # read_pid PID_FILE
  local pid=""
  [[ -r $1 ]] && read -r pid <"$1"
  printf '%s' "$pid"
}

acquire_lock() {
  # Held on descriptors 8 and 9 by the launcher and its supervisor, so a kill -9 can't leave them behind.
  local output_lock="${plan[output_dir]}/.launcher.lock" logs_lock="${plan[logs_dir]}/.training.lock"
  # Looked at first, so that a refused start makes no directory.
  [[ ! -e $logs_lock ]] || flock -n "$logs_lock" true || refuse_second_run
  [[ ! -e $output_lock ]] || flock -n "$output_lock" true || refuse_shared_output "$output_lock"
  mkdir -p "${plan[logs_dir]}" "${plan[output_dir]}" 2>/dev/null ||
    die "디렉토리를 만들지 못했습니다: ${plan[logs_dir]}, ${plan[output_dir]} (다른 --logs-dir, --output-dir 를 주세요)"
  exec 8>>"$output_lock" 9>>"$logs_lock"
  flock -n 9 || refuse_second_run
  flock -n 8 || refuse_shared_output "$output_lock"
}

refuse_second_run() {
  die "이미 실행 중인 학습이 있습니다 (PID $(read_pid "$pid_file")). 멈추려면: $SCRIPT_PATH --stop --logs-dir '${plan[logs_dir]}'"
}

refuse_shared_output() { # refuse_shared_output LOCK
  die "이 출력 디렉토리에서 다른 학습이 실행 중입니다 (PID $(read_pid "$1")): ${plan[output_dir]} (다른 --output-dir 를 주세요)"
}

rotate_console_log() {
  local number=1
  [[ -s $console_log ]] || return 0
  while [[ -e $console_log.$number ]]; do number=$((number + 1)); done
  mv "$console_log" "$console_log.$number"
}

supervise() { # supervise: runs the command to its end; the PID in the file is this shell's
  local child="" signals=0 state code=0 outcome=failed
  RUN_ID="$$-$(date +%s)" # tells this run's state from an earlier one's
  export RUN_ID
  trap 'signals=$((signals + 1)); pass_signal "$child" "$signals"' TERM INT
  trap '' HUP
  printf '%s\n' "$$" >"$pid_file"
  printf '%s\n' "$$" >"${plan[output_dir]}/.launcher.lock"
  # What torchrun itself says goes to the detail log; the run's own state file says how it ended.
  # A session of its own keeps the terminal's Ctrl-C away from it: it gets one signal, from here.
  # Should this shell be killed, torchrun hears it as a request to stop.
  local guard=()
  if command -v setpriv >/dev/null; then guard=(setpriv --pdeathsig TERM --); fi
  setsid "${guard[@]}" "${command[@]}" 2>>"${plan[logs_dir]}/training_detail_rank_0.log" </dev/null 8>&- 9>&- &
  child=$!
  ((signals == 0)) || kill -TERM "$child" 2>/dev/null || true
  while kill -0 "$child" 2>/dev/null; do
    code=0
    wait "$child" || code=$?
  done
  ((signals == 0)) || outcome=stopped
  state=$("$python" "$TRAIN_SCRIPT" internal:finalize "${plan[output_dir]}" "$outcome" "프로세스가 비정상 종료했습니다 (코드 $code)")
  ((code == 0 || signals)) || [[ $state != finished ]] || state=failed
  if [[ $state == failed ]]; then
    [[ -s $console_log ]] || tail -n 15 "${plan[logs_dir]}/training_detail_rank_0.log" # no word of the run itself
    log "❌ 학습이 실패로 끝났습니다 (코드 $code). 자세한 내용: ${plan[logs_dir]}/training_detail_rank_0.log"
  fi
  rm -f "$pid_file"
  if [[ -n $notify ]]; then
    bash -c "$notify \"\$@\"" notify "$state" || warn "--notify 명령이 실패했습니다: $notify"
  fi
  case $state in
    finished) return 0 ;;
    stopped) return 130 ;;
    *) return 1 ;;
  esac
}

pass_signal() { # pass_signal CHILD COUNT: the first asks torchrun to stop, the second ends everything
  local worker
  if (($2 == 1)); then
    log "🛑 중단 요청: 현재 스텝을 마치고 저장합니다 (한 번 더 보내면 즉시 끝납니다)"
    [[ -z $1 ]] || kill -TERM "$1" 2>/dev/null || true
    return 0 # in a trap a bare return gives the status from before it, and set -e would end this shell
  fi
  for worker in $(cat "/proc/$1/task/$1/children" 2>/dev/null) "$1"; do
    kill -KILL "$worker" 2>/dev/null || true
  done
}

start_foreground() {
  local tee_pid code=0
  exec > >(
    trap '' HUP
    exec tee -i -a "$console_log"
  )
  tee_pid=$!
  supervise || code=$?
  exec >&-
  wait "$tee_pid" || true
  exit "$code"
}

start_background() {
  local pid
  log "🔄 백그라운드 모드로 실행됩니다"
  log "📋 로그 파일: $(shown_path "$console_log")"
  log "📋 실시간 로그 확인: tail -f $(shown_path "$console_log")"
  log ""
  : >"$console_log"
  setsid nohup "$BASH" "$SCRIPT_PATH" internal:supervise "${plan[output_dir]}" "${plan[logs_dir]}" "$notify" "$python" \
    "${command[@]}" >>"$console_log" 2>&1 </dev/null &
  pid=$!
  exec 8>&- 9>&-
  trap 'log ""; log "백그라운드에서 계속 실행 중... (PID $pid)"; exit 0' INT
  log "✅ 백그라운드 학습 시작됨!"
  log "🔢 프로세스 ID: $pid"
  log "📄 PID 파일: $(shown_path "$pid_file")"
  log ""
  log "🔍 학습 상태 확인 명령어:"
  log "  tail -f $(shown_path "$console_log")     # 실시간 로그"
  log "  ps -p $pid                             # 프로세스 상태"
  log "  kill $pid                              # 학습 중단"
  log ""
  log "📋 초기 로그 출력 (${FIRST_LOG_SHOW}초간):"
  log "----------------------------------------"
  for ((i = 0; i < FIRST_LOG_WAIT * 5; i++)); do
    if [[ -s $console_log ]]; then
      timeout "$FIRST_LOG_SHOW" tail -n +1 -f "$console_log" || true
      break
    fi
    kill -0 "$pid" 2>/dev/null || break
    sleep 0.2
  done
  log "----------------------------------------"
  report_first_seconds "$pid"
}

report_first_seconds() { # report_first_seconds PID
  local code=0
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
  if [[ $1 == "$PWD"/* ]]; then
    printf '%s' ".${1#"$PWD"}"
  else
    printf '%s' "$1"
  fi
}

start_run() {
  make_plan
  banner
  log "🔍 H100 학습 환경 확인 중..."
  ensure_environment
  check_environment
  log "$check_text"
  log "$info_text"
  build_command
  if [[ $dry_run == true ]]; then
    print_command
    return
  fi
  set_log_paths
  acquire_lock
  rotate_console_log
  log "🎯 학습 시작!"
  if [[ $foreground == true ]]; then
    start_foreground
  else
    start_background
  fi
}

set_log_paths() {
  console_log="${plan[logs_dir]}/training_console.log"
  pid_file="${plan[logs_dir]}/training.pid"
}

find_run() { # where the run is that --status and --stop speak of
  local line
  while IFS= read -r line; do
    plan[${line%%=*}]=${line#*=}
  done < <("$plain_python" "$TRAIN_SCRIPT" internal:paths "${script_args[@]}" || printf 'failed=%s\n' "$?")
  [[ -z ${plan[failed]-} ]] || exit "${plan[failed]}"
  set_log_paths
}

status_run() {
  local alive=false code=3
  find_run
  if pid_is_ours "$(read_pid "$pid_file")"; then
    alive=true code=0
  elif [[ -e $pid_file ]]; then
    code=1
  fi
  "$plain_python" "$TRAIN_SCRIPT" internal:status "$alive" "$as_json" "${script_args[@]}"
  exit "$code"
}

stop_run() {
  local pid seconds=0
  find_run
  pid=$(read_pid "$pid_file")
  if ! pid_is_ours "$pid"; then
    log "실행 중인 학습이 없습니다"
    exit 3
  fi
  kill -TERM "$pid"
  log "🛑 중단 요청을 보냈습니다 (PID $pid). 현재 스텝을 마치고 저장하는 중..."
  while pid_is_ours "$pid"; do
    sleep 0.5
    seconds=$((seconds + 1))
    ((seconds % 20)) || log "   저장을 기다리는 중... ($((seconds / 2))초)"
  done
  "$plain_python" "$TRAIN_SCRIPT" internal:status false "$as_json" "${script_args[@]}"
}

main() {
  if [[ ${1-} == internal:supervise ]]; then
    plan[output_dir]=$2 plan[logs_dir]=$3 notify=$4 python=$5
    command=("${@:6}")
    set_log_paths
    supervise
    return
  fi
  parse_args "$@"
  if [[ $action == help ]]; then
    usage
    return
  fi
  find_python
  case $action in
    run) start_run ;;
    status) status_run ;;
    stop) stop_run ;;
  esac
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  main "$@"
fi
