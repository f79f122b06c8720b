#!/usr/bin/env bash
#
# The first hour on a machine: goes through what has to be seen there, one item after the other, each with a time limit
# and with what is expected of it, and goes on after a failure.  Without a GPU it does what a CPU can do.
# Usage: tests/benchmarks/first_hour.sh [--no-record] [ITEM...]     ITEM: a name of the table below; by default all

set -euo pipefail

ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)"
readonly ROOT
readonly HERE="$ROOT/tests/benchmarks"
# Name, time limit in seconds, what it needs (any, gpu, gpus: two of them, pair: two of them or a CPU), what is expected
readonly TABLE="
topology      20 gpus NVLink between the GPUs
self-test    300 any  a line compiled within 60 s; of H100s 600 TFLOP/s and 100 GB/s or more, no GPU 10 % behind
attention    120 any  every kernel within 2 % of fp32 (H200: flash 1.06 ms a layer, cuDNN 0.60 ms)
eager        240 any  tiny learns
compiled     420 any  the loss of eager within 1 %
fp16         240 gpu  the loss of eager within 2 %
muon         240 any  tiny learns
two-ranks    300 pair the loss that one rank has after the same tokens within 1 %
125m         400 gpu  MFU 35 % or more (H200: 394,000 tokens/s, 41 %)
350m         400 gpu  MFU 35 % or more
1.3b-4x8     600 gpu  45,000 to 51,000 tokens/s a GPU, MFU 40 % or more; communication alone, waiting 3 % at most each
1.3b-8x4     600 gpu  the same, MFU 2 points more
cudnn        900 gpu  faster than flash (H200: by 7 %), the same loss within 1 %
save         400 any  the steps around it lose at most 0.15 of a save that is waited for (of a CPU told only)
evaluation   420 any  the second takes no longer than the first, which compiles
stop         300 any  130; checkpoints are whole, and a resumed run goes on at the next step
stop-in-save 300 any  the same, also of the save that was under way
kill         300 any  after kill -9 of a rank started again once, and finished
hang         400 pair after kill -STOP of a rank started again once, and finished
batch-size   600 gpu  a batch is found, and the run with it has memory left
fp8          900 gpu  faster than bf16 (others: by 17 to 28 %), the same loss within 3 %
trainer      900 any  at least the speed of Hugging Face's Trainer, and 0.95 of a bare loop's
"
# shellcheck source=run_h100_dual.sh
source "$ROOT/run_h100_dual.sh"

figures() { # figures QUESTION WORD...: prints what was seen; fails where that isn't what is expected
  "$python" "$HERE/first_hour.py" "$folder" "$device" "$@"
}

launch() { # launch NAME OPTION...: a run to its end, of 20 steps of tiny on all GPUs unless the options say otherwise
  local options=(--train --foreground --python "$python" --device "$device" --num-gpus "$ranks" --model-size tiny
    --gradient-accumulation-steps 1 --learning-rate 1e-3 --max-steps 20 --logging-steps 1 --eval-steps 9999
    --save-steps 9999 --no-save-initial --report-to none --max-restarts 0
    --output-dir "$folder/$1/outputs" --logs-dir "$folder/$1/logs" --cache-dir "$folder/cache")
  if [[ $device == cpu ]]; then
    options+=(--dummy-data --vocab-size 2048 --max-seq-length 64)
  else
    options+=(--dataset-path "$folder/words.jsonl" --no-self-test)
  fi
  "$ROOT/run_h100_dual.sh" "${options[@]}" "${@:2}" >&2
}

alike() { # alike NAME TOLERANCE OPTION...: a run that ends with the loss of eager
  [[ -d $folder/eager ]] || run_item eager >&2
  launch "$1" "${@:3}"
  figures alike "$1" eager "$2"
}

big() { # big QUESTION WORDS NAME OPTION...: 16 steps of 1.3b in BF16 on real lengths, by default 4 x 8 rows a GPU
  local words
  read -ra words <<<"$2"
  launch "$3" --model-size 1.3b --gradient-accumulation-steps 8 --max-steps 16 "${@:4}"
  figures "$1" "$3" "${words[@]}"
}

until_there() { # until_there PID PATTERN: waits for a path while that run lives
  until compgen -G "$2" >/dev/null; do
    kill -0 "$1"
    sleep 0.02
  done
}

stop_and_resume() { # stop_and_resume NAME PATTERN OPTION...: SIGTERM once the path is there, and then three more steps
  local code=0 last run
  launch "$1" --max-steps 100000 --no-compile "${@:3}" &
  run=$!
  until_there "$run" "$folder/$1/outputs/$2"
  kill "$(<"$folder/$1/logs/training.pid")"
  wait "$run" || code=$?
  last=$(printf '%s\n' "$folder/$1/outputs"/checkpoint-* | sort -V | tail -n 1)
  launch "$1" --max-steps $((${last##*-} + 3)) --no-compile "${@:3}" --resume
  figures resumed "$1" "$code"
}

hurt_rank() { # hurt_rank NAME SIGNAL OPTION...: the last rank gets a signal once there is a checkpoint
  local child children pids=() run steps=100
  [[ $device == cuda ]] || steps=20
  launch "$1" --max-steps $((3 * steps)) --save-steps "$steps" --max-restarts 1 --no-compile "${@:3}" &
  run=$!
  until_there "$run" "$folder/$1/outputs/checkpoint-$steps"
  # Of the supervisor's children torchrun is the one that has children, the ranks.
  read -ra children < <(cat "/proc/$(<"$folder/$1/logs/training.pid")"/task/*/children) || true # no line's end
  for child in "${children[@]}"; do
    read -ra pids < <(cat "/proc/$child"/task/*/children) || true
    ((${#pids[@]} == 0)) || break
  done
  kill "-$2" "${pids[-1]}"
  wait "$run"
  figures restarted "$1"
}

save_speed() {
  local layers=16 seen
  [[ $device == cuda ]] || layers=2
  OMP_WAIT_POLICY=passive "$python" "$HERE/save_speed.py" "$folder" --device "$device" --layers "$layers" --rounds 3 |
    tee "$folder/save.table" >&2
  seen=$(awk -F ' *[|] *' '/^. the extra time to the save/ { print $3 }' "$folder/save.table")
  printf '%s, median and range of 3 rounds\n' "$seen"
  [[ $device == cpu ]] || awk '{ exit !($1 <= 0.15) }' <<<"$seen" # a CPU's cores are the writer's too
}

against_trainer() {
  local options=(--quick --blocks 4)
  [[ $device == cpu ]] || options=(--gpu --models 125m --batch-size 16 --blocks 6 --rounds 1)
  "$HERE/run.sh" "${options[@]}" --starts 0 --no-record | tee "$folder/trainer.table" >&2
  awk -F ' *[|] *' '
    $2 == "HF Trainer" { trainer = $5 }
    $2 == "bare DDP" { bare = $5 }
    END { print "ours to Trainer " trainer ", to a bare loop " bare; exit !(trainer + 0 >= 1 && bare + 0 >= 0.95) }
  ' "$folder/trainer.table"
}

run_item() { # run_item NAME: prints what was seen in one line; fails where that isn't what is expected
  case $1 in
    topology) nvidia-smi topo -m | tee /dev/stderr | grep -m 1 -owE 'NV[0-9]+' ;;
    self-test)
      "$python" -m torch.distributed.run --standalone --nnodes 1 --local-addr 127.0.0.1 \
        --nproc-per-node $((gpus == 1 ? 1 : 2)) "$HERE/first_hour.py" "$folder" "$device" self-test
      ;;
    attention) figures attention ;;
    eager | muon)
      launch "$1" --optimizer "$([[ $1 == muon ]] && echo muon || echo adamw)" --no-compile
      figures learns "$1"
      ;;
    compiled) alike compiled 0.01 --compile ;;
    fp16) alike fp16 0.02 --fp16 --no-compile ;;
    two-ranks)
      launch one-rank --num-gpus 1 --batch-size 4 --no-compile
      launch two-ranks --num-gpus 2 --batch-size 2 --no-compile
      figures alike two-ranks one-rank 0.01
      ;;
    125m | 350m)
      launch "$1" --model-size "$1" --batch-size 16 --gradient-accumulation-steps 2 --max-steps 32 --profile
      figures utilisation "$1" 0.35 1
      ;;
    1.3b-4x8) big utilisation "0.40 0.03" "$1" --profile ;;
    1.3b-8x4) big utilisation "0.42 0.03" "$1" --batch-size 8 --gradient-accumulation-steps 4 --profile ;;
    cudnn | fp8)
      [[ -d $folder/1.3b-4x8 ]] || run_item 1.3b-4x8 >&2 || true
      if [[ $1 == fp8 ]]; then
        big faster "1.3b-4x8 0.03" fp8 --fp8
      else
        big faster "1.3b-4x8 0.01" cudnn --attention cudnn
      fi
      ;;
    save) save_speed ;;
    evaluation)
      launch evaluation --eval-steps 10 --compile
      figures evaluations evaluation
      ;;
    stop) stop_and_resume stop metrics.jsonl ;;
    stop-in-save)
      stop_and_resume stop-in-save ".checkpoint-*.tmp" --save-steps 5 --save-total-limit 3 \
        --model-size "$([[ $device == cuda ]] && echo 125m || echo tiny)"
      ;;
    kill) hurt_rank kill KILL ;;
    hang) hurt_rank hang STOP --num-gpus 2 --hang-timeout 0.5 ;;
    batch-size) big room-left "" batch-size --find-batch-size --max-steps 6 ;;
    trainer) against_trainer ;;
  esac
}

lacks() { # lacks NEEDS: prints what this machine hasn't got of it
  case $1:$gpus in
    gpu:0) printf 'needs a GPU' ;;
    gpus:[01] | pair:1) printf 'needs two GPUs' ;;
  esac
}

end_runs() { # those that an item left, at once: the supervisors' second signal
  local path tries
  for ((tries = 0; tries < 5; tries++)); do
    for path in "$folder"/*/logs/training.pid; do
      [[ ! -e $path ]] || kill "$(<"$path")" || true
    done
    compgen -G "$folder/*/logs/training.pid" >/dev/null || break
    sleep 1
  done
}

try_item() { # try_item NAME LIMIT NEEDS EXPECTED: runs it, tells how it went, and adds its row
  local code=0 seen verdict="as expected"
  SECONDS=0
  seen=$(lacks "$3")
  if [[ -n $seen ]]; then
    verdict="not run"
  else
    timeout --kill-after=60 "$2" "${BASH_SOURCE[0]}" internal:item "$1" "$folder" "$python" "$gpus" \
      >"$folder/$1.seen" 2>"$folder/$1.log" &
    job=$!
    wait "$job" || code=$?
    job=""
    seen=$(paste -sd ';' "$folder/$1.seen")
    ((code == 0)) || verdict="NOT as expected"
    ((code != 124 && code != 137)) || seen="not done after $2 s"
    # What a run says of its own failure is better than the last line.
    seen=${seen:-$(grep -m 1 '^❌' "$folder/$1.log" || tail -n 1 "$folder/$1.log")}
    rm -rf "$folder"/*/outputs/checkpoint-*
  fi
  log "$1: $verdict ($SECONDS s)" "   expected: $4" "   seen: $seen"
  printf '%s\t' "$1" "$4" "${seen//[$'\t|']/ }" "$verdict" >>"$folder/rows"
  printf '%s\n' "$SECONDS" >>"$folder/rows"
}

set_machine() { # set_machine FOLDER PYTHON GPUS
  folder=$1 python=$2 gpus=$3 device=cpu ranks=1
  ((gpus == 0)) || device=cuda ranks=$((gpus > 2 ? 2 : gpus))
}

main_hour() {
  local to_results=true wanted=" " known word name limit needs expected job=""
  if [[ ${1-} == internal:item ]]; then
    set_machine "${@:3}"
    trap end_runs EXIT
    run_item "$2"
    return
  fi
  known=$(awk '{ printf "%s ", $1 }' <<<"${TABLE//$'\n\n'/}")
  for word in "$@"; do
    if [[ $word == --no-record ]]; then
      to_results=false
    elif [[ " $known" == *" $word "* ]]; then
      wanted+="$word "
    else
      die "first_hour.sh [--no-record] [ITEM...]     items: $known" 2
    fi
  done
  find_python never
  if [[ -z $python ]]; then
    install_packages "$ROOT/requirements.txt"
    python="$VENV_DIR/bin/python"
  fi
  set_machine "$(mktemp -dt first_hour.XXXX)" "$python" "$("$python" -c 'import torch; print(torch.cuda.device_count())')"
  trap 'rm -rf "$folder"/*/ "$folder"/words.jsonl' EXIT # and not the logs
  trap '[[ -z $job ]] || kill "$job"; wait; exit 130' INT TERM
  [[ $device == cpu ]] || "$python" "$HERE/first_hour.py" "$folder" "$device" words
  while read -r name limit needs expected; do
    [[ -z $name ]] || [[ $wanted != " " && $wanted != *" $name "* ]] || try_item "$name" "$limit" "$needs" "$expected"
  done <<<"$TABLE"
  "$python" "$HERE/first_hour.py" "$folder" "$device" table "tests/benchmarks/first_hour.sh $*" "$to_results"
  log "logs: $folder"
  ! grep -q $'\tNOT as expected\t' "$folder/rows"
}

main_hour "$@"
