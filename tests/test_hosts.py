"""Where people run it: foreign variables, containers, torn files, disks that refuse, readers that go, Slurm."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import H100, LAUNCHER, LONG_RUN, ROOT, Place, Terminal, wait_for, write_program
from faults import SMALL, assert_checkpoints_open, assert_same_run, timeless
from samples import config, tiny_run
from test_readme import code_blocks, section

import train_h100_dual as t

FOREIGN = (
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=8 ACCELERATE_MIXED_PRECISION=bf16 ACCELERATE_USE_FSDP=true "
    "ACCELERATE_TORCH_DEVICE=meta PET_NNODES=2 PET_MAX_RESTARTS=7 RANK=3 WORLD_SIZE=8 LOCAL_RANK=1 GROUP_RANK=2 "
    "MASTER_ADDR=10.9.9.9 MASTER_PORT=1 PYTHONIOENCODING=ascii TORCHELASTIC_RESTART_COUNT=2 RUN_ID=7"
)
MEANT = "NCCL_DEBUG=WARN TORCH_NCCL_TRACE_BUFFER_SIZE=2000 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1"  # by a person
root = pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="namespaces need root and unshare")


def unshared(command: dict, script: str, *kinds: str) -> dict:
    """The same command in namespaces of its own, after a script."""
    shell = ["bash", "-euc", f'{script}\nexec "$@"', "unshared"]
    return {**command, "args": ["unshare", *(f"--{kind}" for kind in kinds), *shell, *command["args"]]}


# --- the environment ---


def test_what_is_not_meant_for_a_run_changes_nothing_and_is_told(broken, undisturbed: Place) -> None:
    place = broken("")
    place.environment |= dict(pair.split("=") for pair in f"{FOREIGN} {MEANT}".split())
    command = place.command(*SMALL)
    command["env"] |= {"RANK": "3", "WORLD_SIZE": "8"}
    answer = place.execute(command)
    assert answer.code == 0, answer.text
    assert_same_run(place.folder, undisturbed.folder, 12)
    told = (place.logs / "training_detail_rank_0.log").read_text(encoding="utf-8").splitlines()[0]
    assert {*told.rpartition(": ")[2].split()} == {pair.partition("=")[0] for pair in FOREIGN.split()} - {"RUN_ID"}


def test_the_script_by_hand_takes_no_variable_of_accelerate(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8")
    assert tiny_run(tmp_path).accelerator.gradient_accumulation_steps == 1


@pytest.mark.parametrize(("limit", "threads"), [("", None), ("taskset", 1), ("cgroup", 1), ("OMP_NUM_THREADS", 5)])
def test_threads_come_from_what_the_process_may_use(place: Place, limit: str, threads: int | None) -> None:
    command = place.command("--test", "--dry-run", "--device", "cpu", "--num-gpus", "1")
    if limit == "taskset":
        command["args"] = ["taskset", "-c", str(min(os.sched_getaffinity(0))), *command["args"]]
    elif limit == "cgroup":
        if os.geteuid():
            pytest.skip("a mount namespace needs root")
        mount = "mount -t tmpfs none /sys/fs/cgroup; echo 150000 100000 >/sys/fs/cgroup/cpu.max"
        command = unshared(command, mount, "mount")
    elif limit:
        command["env"][limit] = str(threads)
    assert f"OMP_NUM_THREADS={threads or t.usable_cpus()} " in place.execute(command).out


def test_a_kernel_without_cgroups_limits_no_threads(monkeypatch) -> None:
    monkeypatch.setattr(t.Path, "read_text", lambda path: (_ for _ in ()).throw(FileNotFoundError(path)))
    assert t.usable_cpus() == len(os.sched_getaffinity(0))


# --- a container: PID 1, nothing but loopback, a read-only root, a /tmp in memory, a name that doesn't resolve ---

CONTAINER = """
ip link set lo up
hostname no-such-host.invalid
umount -l /dev/shm
mount --bind /dev/null /etc/passwd
mount --bind /tmp /mnt
mount -t tmpfs none /tmp
for folder in $BELOW_TMP; do
  mkdir -p "$folder"
  mount --bind "/mnt/${folder#/tmp/}" "$folder"
done
mount --bind / /
mount -o remount,ro,bind /
cd "$PWD"
unset HOME TMPDIR
[[ ! -w /usr && -w /tmp ]]
mkdir real
ln -s real outputs
"""
LIFE = """
"$@" >start.txt 2>&1
for ((i = 0; i < 900; i++)); do [[ ! -s outputs/metrics.jsonl ]] || break; sleep 0.1; done
awk '$4 == "0A" { print $2 }' /proc/net/tcp /proc/net/tcp6 >listening.txt
"$1" --status >status.txt
"$1" --follow | head -n 1 >follow.txt
"$1" --stop >stop.txt
cp outputs/training.log console.txt
echo "$$" >pid.txt
step=$(ls outputs | sed -n 's/checkpoint-//p')
exec "$@" --resume --foreground --max-steps $((step + 1)) >resume.txt 2>&1
"""


@root
@pytest.mark.slow
def test_the_whole_life_of_a_run_in_a_container(place: Place, tmp_path_factory) -> None:
    words = f'"$1" {" ".join(place.directories)} --'
    script = write_program(place.folder / "life", "set -eu" + LIFE.replace('"$1" --', words))
    command = place.command(*LONG_RUN.split(), "--num-gpus", "2")
    command["args"].insert(0, str(script))
    command["env"] |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    needed = tmp_path_factory.getbasetemp(), ROOT, Path(sys.prefix)  # what it writes to, and what it reads
    command["env"]["BELOW_TMP"] = " ".join(str(path) for path in needed if path.is_relative_to("/tmp"))
    kinds = "mount", "net", "uts", "pid", "fork", "mount-proc"
    answer = place.execute(unshared(command, CONTAINER, *kinds), 300)
    shown = {path.stem: path.read_text(encoding="utf-8") for path in place.folder.glob("*.txt")}
    assert answer.code == 0, (answer.text, shown)
    assert shown["pid"] == "1\n", "the launcher's own, in the foreground"
    assert "실행 중" in shown["status"] and shown["follow"] and "중단됨" in shown["stop"], shown
    assert "📚" in shown["console"] and "이어서 학습" in shown["resume"], shown
    loopback = ("0100007F:", "00000000000000000000000001000000:", "0000000000000000FFFF00000100007F:")
    assert shown["listening"], "gloo's own"
    assert [name for name in shown["listening"].split() if not name.startswith(loopback)] == []


@root
def test_without_shared_memory_one_process_prepares_the_corpus(place: Place) -> None:
    code = "import logging, train_h100_dual as t; logging.basicConfig(); print(*t.parallel_map(str, [1, 2], 2))"
    command = {**place.command(), "args": [sys.executable, "-c", code], "cwd": ROOT}
    answer = place.execute(unshared(command, "mount -t tmpfs -o ro none /dev/shm", "mount"))
    assert answer.out.strip() == "1 2", answer.err
    assert "/dev/shm" in answer.err


# --- bookkeeping and checkpoints that are torn ---

DAMAGE = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "NULs": lambda data: data[: len(data) // 2] + b"\0" * (len(data) - len(data) // 2),
    "blank and bad lines": lambda data: b"\n\xff\xfe\n" + data + b'\n{"step": 1, "lo',
    "missing": None,
}
BOOKS = ("metrics.jsonl", "samples.md", "run_info.json", "training_curves.png")
STATES = ("pytorch_model.bin", "training_info.json", "config.json", "training_state/state.pt", t.MANIFEST)


def damage(path: Path, kind: str) -> None:
    if DAMAGE[kind] is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(DAMAGE[kind](path.read_bytes() if path.exists() else b"text\n"))


@pytest.fixture
def outputs(undisturbed: Place, tmp_path: Path) -> t.TrainConfig:
    """A copy of a run's outputs, and the options to go on with."""
    shutil.copytree(undisturbed.outputs, tmp_path / "outputs", symlinks=True)
    (tmp_path / "logs").mkdir()
    words = [word for word in SMALL if word != "--foreground"]
    words += ["--resume", "--output-dir", str(tmp_path / "outputs"), "--logs-dir", str(tmp_path / "logs")]
    return t.resolve_config(t.parse_args([*words, "--cache-dir", str(undisturbed.cache)]), "cpu")[0]


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", BOOKS)
def test_no_damage_to_bookkeeping_forbids_a_resume(outputs: t.TrainConfig, name: str, kind: str, caplog) -> None:
    path = outputs.output_dir / name
    damage(path, kind)
    assert t.make_launch_plan(outputs, 2).steps == 12
    assert t.find_resume_point(outputs, 2, thorough=True).checkpoint.name == "checkpoint-12"
    t.print_status(outputs)
    if name in BOOKS[:2]:
        t.cut_file(path, 12)
        content = path.read_bytes() if path.exists() else b""
        assert b"\0" not in content and content.decode() is not None
        for line in content.splitlines() if name == "metrics.jsonl" else ():
            assert json.loads(line)["step"] <= 12
        assert (name in caplog.text) == (kind in ("cut", "NULs", "blank and bad lines"))


def test_metrics_that_a_full_disk_does_not_take_are_written_later(tmp_path: Path) -> None:
    log = object.__new__(t.StepLog)
    accelerator = SimpleNamespace(log=lambda *more, **options: None)
    log.run = SimpleNamespace(is_main=True, cfg=SimpleNamespace(output_dir=tmp_path), accelerator=accelerator)
    log.unwritten = b""
    if (child := os.fork()) == 0:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            for step in range(60):
                room = 1000 if step < 59 else resource.RLIM_INFINITY
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
                log.write({"step": step, "loss": 1.0})
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(60)]


@pytest.mark.parametrize("kind", [kind for kind in DAMAGE if kind != "blank and bad lines"])
@pytest.mark.parametrize("name", STATES)
def test_a_resume_goes_on_from_the_newest_whole_checkpoint_or_names_each_damaged_one(outputs, name, kind) -> None:
    damage(outputs.output_dir / "checkpoint-12" / name, kind)
    thorough = kind == "NULs"  # whatever changes the size shows at the first look
    point = t.find_resume_point(outputs, 2, thorough=thorough)
    assert point.checkpoint.name == "checkpoint-8"
    assert f"checkpoint-12 ({name} 파일" in point.notes[0] or name == t.MANIFEST
    with pytest.raises(t.EnvironmentProblem, match=r"쓸 수 없는 체크포인트를 .*checkpoint-12 \("):
        t.find_resume_point(t.replace(outputs, resume=outputs.output_dir / "checkpoint-12"), 2, thorough=thorough)
    damage(outputs.output_dir / "checkpoint-8" / name, kind)
    with pytest.raises(t.EnvironmentProblem) as refused:
        t.find_resume_point(outputs, 2, thorough=thorough)
    assert all(f"checkpoint-{step} (" in str(refused.value) for step in (12, 8))
    assert "--resume 없이" not in str(refused.value)


# --- no room, and the supervisor's end ---

# A disk that becomes read-only at one save, and a directory that loses its rights at the next; then all is as before.
MOUNTS = """
real_save = save_checkpoint
def save_checkpoint(run, state):
    folder = run.cfg.output_dir
    if run.is_main:
        run.saver.busy(None)
        if state.step == 4:
            subprocess.run(["mount", "--bind", folder, folder], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        if state.step == 6:
            subprocess.run(["umount", folder], check=True)
            folder.chmod(0o500)
        if state.step == 8:
            folder.chmod(0o700)
    real_save(run, state)
"""
REASONS = {
    4: "읽기 전용 파일 시스템입니다",
    6: "접근 권한이 없습니다",
    8: "OSError: Stale file handle",
    10: "OSError: Input/output error",
    12: "디스크 할당량(quota)이 부족합니다",
}


@root
@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler for the shim")
def test_whatever_a_disk_refuses_costs_the_save_alone_and_is_told_with_its_place(broken, tmp_path) -> None:
    source, library = ROOT / "tests" / "fixtures" / "refusing-disk.c", tmp_path / "shim.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    place = broken(MOUNTS)
    command = place.command(*SMALL, "--num-gpus", "1", "--max-steps", "14", "--save-steps", "2")
    command["env"]["LD_PRELOAD"] = str(library)
    lost = "-dac_override,-dac_read_search"  # of root's rights: it obeys a directory's
    command["args"][:0] = ["setpriv", f"--bounding-set={lost}", f"--inh-caps={lost}", "--"]
    answer = place.execute(unshared(command, ":", "mount"))
    assert answer.code == 0, answer.text
    lines = [line for line in answer.out.splitlines() if "체크포인트를 저장하지 못했습니다" in line]
    assert len(lines) == len(REASONS), answer.out
    for line, (step, reason) in zip(lines, REASONS.items(), strict=True):
        assert f"(스텝 {step}): {reason}" in line and f"./outputs/checkpoint-{step}. 다음 저장 때" in line
        assert line.endswith("마지막 체크포인트: ./outputs/checkpoint-2")
    assert [path.name for path in place.checkpoints()] == ["checkpoint-2", "checkpoint-14"]
    assert_checkpoints_open(place)
    assert [line["step"] for line in timeless(place.folder) if "loss" in line] == [*range(1, 15)]
    shown = place.run("--status").out
    assert re.search(r"실패한 저장: +5번", shown), shown


def test_a_failure_is_told_though_its_state_cannot_be_written(tmp_path, monkeypatch, capsys) -> None:
    cfg = config(tmp_path)
    cfg.output_dir.mkdir()
    t.update_run_info(cfg.output_dir, run_id=t.run_id(), state="running")
    monkeypatch.setattr(t, "update_run_info", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EROFS, "read-only")))
    t.report_failure(cfg, RuntimeError("마지막 스텝(12)을 저장하지 못했습니다"))
    assert "❌ 마지막 스텝(12)을 저장하지 못했습니다" in capsys.readouterr().out


def supervised(
    tmp_path: Path, body: str, faults: str = "", text: str | None = None, notify: str = ""
) -> tuple[int, Path]:
    """Run the supervisor over a stub of Python, with stubs of programs that fail; returns its code and its folder."""
    python = write_program(tmp_path / "bin" / "python", body)
    for name in faults.split():
        write_program(tmp_path / "faults" / name, "exit 1")
    for name in ("outputs", "logs"):
        (tmp_path / name).mkdir()
    launcher = tmp_path / LAUNCHER.name
    launcher.write_text(text or LAUNCHER.read_text(encoding="utf-8"), encoding="utf-8")
    hear = f"env >'{tmp_path}/environment'; echo \"$1\" >'{tmp_path}/notified'"
    heard = write_program(tmp_path / "notify", f"{hear}\n{notify}")
    words = [tmp_path / "outputs", tmp_path / "logs", heard, python, "1", "0", python, "-m", "torch.distributed.run"]
    with open(tmp_path / "logs" / "training_console.log", "w") as log:
        path = f"{tmp_path / 'faults'}:{os.environ['PATH']}"
        code = subprocess.call(
            ["bash", launcher, "internal:supervise", *words], env={**os.environ, "PATH": path}, stdout=log, stderr=log
        )
    return code, tmp_path


@pytest.mark.parametrize("faults", ["", "tail stat flock cat grep", "rm"])
@pytest.mark.parametrize(("agent", "finalize", "state", "code"), [
    ("exit 0", "echo finished", "finished", 0), ("exit 0", "exit 1", "finished", 0), ("exit 1", "exit 1", "failed", 1),
    ("exit 1", "echo failed; exit 1", "failed", 1), ("exit 0", "echo failed", "failed", 1),
    ("exit 0", "echo stopped", "stopped", 0),  # by --max-hours
    ('rm "$0"; exit 1', "", "failed", 1),  # its Python was removed, with an environment that is made anew
    ("kill -TERM $PPID; exit 0", "echo stopped", "stopped", 130),
])  # fmt: skip
def test_whatever_fails_at_the_end_the_rest_of_it_is_done(tmp_path, faults, agent, finalize, state, code) -> None:
    body = f'case "$*" in *torch.distributed.run*) {agent} ;; *finalize*) {finalize} ;; esac'
    assert supervised(tmp_path, body, faults)[0] == code
    assert (tmp_path / "notified").read_text().strip() == state
    assert "\nH100_" not in (tmp_path / "environment").read_text(), "a run that it starts would be taken for this one"
    assert (tmp_path / "logs" / "training.pid").exists() == (faults == "rm")


@pytest.mark.parametrize("end", ["exit 7", "kill -KILL $$"])
def test_a_notify_command_that_fails_is_told_and_changes_nothing(tmp_path: Path, end: str) -> None:
    code, _ = supervised(tmp_path, 'case "$*" in *finalize*) echo finished ;; esac', notify=end)
    assert (code, (tmp_path / "logs" / "training.pid").exists()) == (0, False)
    assert "--notify 명령이 실패했습니다" in (tmp_path / "logs" / "training_console.log").read_text(encoding="utf-8")


def test_a_torchrun_that_waits_for_ever_can_be_stopped(tmp_path: Path) -> None:
    body = 'case "$*" in *torch.distributed.run*) kill -TERM $PPID; exec sleep 1000 ;; *finalize*) echo stopped ;; esac'
    assert supervised(tmp_path, body)[0] == 130
    assert (tmp_path / "notified").read_text().strip() == "stopped"


def test_a_start_that_does_not_come_on_says_so_with_the_last_line_of_the_detail_log(tmp_path: Path) -> None:
    text = LAUNCHER.read_text(encoding="utf-8").replace("QUIET_START=120", "QUIET_START=1")
    body = 'case "$*" in *torch.distributed.run*) echo "waiting for a host" >&2; sleep 4 ;; *) echo finished ;; esac'
    supervised(tmp_path, body, text=text)
    console = (tmp_path / "logs" / "training_console.log").read_text(encoding="utf-8")
    assert "시작하지 못했습니다" in console and "waiting for a host" in console


# --- links and readers that go ---


def test_a_lock_that_can_not_be_opened_is_refused_in_a_sentence(place: Place) -> None:
    (place.outputs / ".lock").mkdir(parents=True)  # as it would be another user's, if root were refused anything
    answer = place.run("--test")
    (complaint,) = answer.complaints
    assert (answer.code, "Traceback" in answer.text) == (1, False)
    assert f"{place.outputs}/.lock" in complaint


def test_a_disk_that_takes_no_locks_is_not_called_a_running_training(place: Place) -> None:
    write_program(place.folder / "bin" / "flock", "exit 71")
    place.environment["PATH"] = f"{place.folder / 'bin'}:{os.environ['PATH']}"
    answer = place.run("--test", "--device", "cpu")
    (complaint,) = answer.complaints
    assert answer.code == 1
    assert f"잠글 수 없는 파일입니다: {place.logs}/.training.lock" in complaint


@pytest.mark.parametrize("name", ["outputs", "logs", "cache"])
def test_a_link_to_nowhere_is_answered_in_a_sentence(place: Place, name: str) -> None:
    (place.folder / name).symlink_to(place.folder / "gone")
    answer = place.run("--test", "--dry-run", "--device", "cpu")
    assert answer.code == 1
    (complaint,) = answer.complaints
    assert "대상이 없는 링크" in complaint and str(place.folder / name) in complaint, answer.text


def test_without_a_home_the_cache_is_beside_the_script(place: Place) -> None:
    command = place.command("--test", "--dry-run", "--device", "cpu")
    command["env"] = {"PATH": command["env"]["PATH"]}
    command["args"] = command["args"][:-2]  # its default place for the cache
    answer = place.execute(command)
    assert (answer.code, "~" in answer.text) == (0, False), answer.text


def test_no_place_for_temporary_files_is_answered_in_a_sentence(place: Place) -> None:
    command = place.command("--test", "--device", "cpu", "--dummy-data")
    command["env"]["TMPDIR"] = str(place.folder / "gone")
    answer = place.execute(command)
    assert answer.code == 1
    assert [line for line in answer.complaints if "TMPDIR=" in line] == answer.complaints[-1:], answer.text
    assert not place.processes()


@pytest.fixture
def other_disk() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


def test_a_run_through_tee_with_its_files_on_another_disk_outlives_its_terminal(place, warm, other_disk) -> None:
    notified = place.folder / "notified"
    for path in (place.outputs, place.logs):
        (other_disk / path.name).mkdir()
        path.symlink_to(other_disk / path.name)
    assert other_disk.stat().st_dev != place.folder.stat().st_dev
    options = [*LONG_RUN.split(), "--foreground", "--notify", f"echo >'{notified}'"]
    terminal, shown = Terminal(place, *options, pipe="2>&1 | tee shown"), place.folder / "shown"
    place.wait("a step", lambda: shown.exists() and "스텝 1/" in shown.read_text(encoding="utf-8", errors="replace"))
    terminal.hang_up()
    place.wait("the shell's end", lambda: terminal.process.poll() is not None, 10)
    size = place.console_log.stat().st_size
    place.wait("more of the log", lambda: place.console_log.stat().st_size > size)
    assert (place.outputs / "training.log").read_text(encoding="utf-8").startswith(place.console()[:size])
    look = place.command("--status")
    look["args"] = ["bash", "-c", 'set -o pipefail; "$@" | head -n 1; echo "${PIPESTATUS[0]}"', "pipe", *look["args"]]
    status = place.execute(look)
    assert status.err == "" and re.fullmatch(r"📊 상태: 실행 중 .*\n(0|141)\n", status.out), status.text
    assert place.run("--stop").code == 0
    place.wait_for_end(10)
    assert "🛑 학습을 중단했습니다" in place.console()
    assert notified.read_text().strip() == "stopped"
    assert not place.pid_file.exists()


@pytest.mark.parametrize(("visible", "expected"), [
    (None, "012"), ("", ""), ("-1", ""), ("NoDevFiles", ""), ("2, 0", "20"), ("1,-1,0", "1"), ("GPU-2b", "2"),
    ("0,0", "두 번"), ("0,GPU-0b", "두 번"), ("0,7", "없거나"), ("GPU-", "없거나"), ("MIG-6a7b", "MIG 장치"),
])  # fmt: skip
def test_gpus_are_understood_by_name_or_refused(tmp_path, monkeypatch, visible, expected) -> None:
    lines = [f"'{index}, GPU-{index}b1c, {H100} {index}, 81559, 4'" for index in range(3)]
    write_program(tmp_path / "nvidia-smi", f"printf '%s\\n' {' '.join(lines)}")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    if expected.strip("012"):
        with pytest.raises(t.EnvironmentProblem, match=expected):
            t.query_gpus(visible)
    else:
        assert "".join(gpu.name[-1] for gpu in t.query_gpus(visible)) == expected


def test_a_longer_run_does_not_warm_up_again(tmp_path) -> None:
    run = SimpleNamespace(cfg=config(tmp_path), total_steps=1000, warmup_steps=1, peak_rate=1e-3)
    rates = [t.learning_rate_at(run, step) for step in range(20, 800)]  # 20 steps' warm-up of 0.05
    assert {*rates} == {1e-3}


def test_the_job_script_saves_goes_back_to_the_queue_and_goes_on(place: Place, warm: None) -> None:
    log = place.folder / "scontrol"
    job = code_blocks(section("Slurm"), "bash")[0]
    assert "--signal=B:TERM@" in job and "exec " in job
    options = " ".join(word for word in LONG_RUN.split() if word != "--train")
    job = job.replace("--dataset-path /path/to/datasets", f"{options} {' '.join(place.directories)}")
    script = write_program(place.folder / "job", job.replace("./run_h100_dual.sh", str(LAUNCHER)))
    write_program(place.folder / "bin" / "scontrol", f'echo "$*" >>"{log}"')
    lines = place.outputs / "metrics.jsonl"
    for number in range(2):
        command = place.command()
        command["args"] = [str(script)]
        command["env"] |= {"SLURM_JOB_ID": "42", "PATH": f"{place.folder / 'bin'}:{os.environ['PATH']}"}
        batch = subprocess.Popen(**command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
        known = lines.read_text().count("\n") if lines.exists() else 0
        place.wait("a step", lambda n=known: lines.exists() and lines.read_text().count("\n") > n)
        os.kill(batch.pid, signal.SIGTERM)  # to the batch shell alone, which the launcher took the place of
        shown = place.finish(batch)[0]
        assert batch.returncode == 130, shown
        assert ("이어서 학습" in shown) == (number == 1), shown
    assert log.read_text() == "requeue 42\n" * 2
    wait_for("the end of all processes", lambda: not place.processes(), 10)
