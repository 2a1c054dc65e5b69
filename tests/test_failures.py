"""A disk that is full or turns read-only, data that changes, a process that dies: an error that says what happened and
what to do, nothing corrupted, and the same command continues."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hymba_align.cli import main
from hymba_align.errors import StorageError
from hymba_align.run.manifest import find_damage
from hymba_align.run.storage import writing

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mounts and limits as Linux has them")

ROOT = Path(__file__).resolve().parents[1]
ROWS = 60
STEPS = 8
CONTINUES = "then run the same command again: it continues from the last complete checkpoint"

# of Linux's sched.h and mount.h
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18


# ---- a file system of one's own --------------------------------------------------------------------------------------


def mount(source: str, target: Path | str, kind: str | None, flags: int, options: str | None) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    if libc.mount(*encoded, ctypes.c_ulong(flags), None if options is None else options.encode()):
        raise OSError(ctypes.get_errno(), f"mount of {target}")


def mount_read_only(folder: Path) -> None:
    """Lays the folder read-only over itself; what is open for writing, as the lock is, would hinder any other way."""
    mount(str(folder), folder, None, MS_BIND, None)
    while True:
        try:
            return mount("none", folder, None, MS_REMOUNT | MS_BIND | MS_RDONLY, None)
        except OSError:  # somebody opened a file for writing in between
            time.sleep(0.002)


def enter_own_mounts() -> None:
    """Gives this process mounts of its own, which end with it, without becoming root where it is not."""
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWNS if user == 0 else CLONE_NEWNS | CLONE_NEWUSER):
        raise OSError(ctypes.get_errno(), "unshare")
    if user != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    mount("none", "/", None, MS_REC | MS_PRIVATE, None)


def in_child(work: Callable[[], object], log: Path | None) -> int:
    """The exit code of a forked process that does the work; what it prints is in `log`, if one is given."""
    pid = os.fork()
    if pid == 0:
        if log is not None:
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        code = 99
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture(scope="session")
def own_mounts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where this user may not mount anything."""
    folder = tmp_path_factory.mktemp("mounts")

    def try_it() -> None:
        enter_own_mounts()
        mount("tmpfs", folder, "tmpfs", 0, "size=1m")

    if in_child(try_it, folder.with_suffix(".log")):
        pytest.skip("this system lets the user mount nothing, not even in a namespace of their own")


# ---- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path: Path, small_base: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of both stages; its run lies in disk/run, and its reference in whole."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    rows = (ROOT / "data" / "arithmetic" / "train.jsonl").read_text().splitlines()[:ROWS]
    (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "disk").mkdir()
    trainer = {"per_device_train_batch_size": 1, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 2}
    sections = {
        "name": "demo",
        "output_dir": str(tmp_path / "disk" / "run"),
        "seed": 7,
        "base": small_base,
        "data": {"path": str(tmp_path / "train.jsonl")},
        "sft": {"max_length": 128, "trainer": {**trainer, "max_steps": STEPS}},
        "dpo": {"max_length": 128, "trainer": {**trainer, "max_steps": 2}},
    }
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(sections))
    return path


def checkpoints(run: Path) -> list[str]:
    """Those of SFT, all of them whole."""
    found = sorted((run / "sft").glob("checkpoint-*"))
    for path in found:
        assert find_damage(path) is None, path
    return [path.name for path in found]


def run_whole(recipe: Path, known: list[bytes] = []) -> bytes:  # noqa: B006  (the same for every test)
    """The weights of an SFT that nothing disturbs."""
    if not known:
        run = recipe.parent / "whole"
        assert main(["sft", str(recipe), f"output_dir={run}"]) == 0
        known.append((run / "sft" / "final" / "model.safetensors").read_bytes())
    return known[0]


def final(run: Path) -> bytes:
    assert find_damage(run / "sft" / "final") is None
    return (run / "sft" / "final" / "model.safetensors").read_bytes()


def last_line(log: Path) -> str:
    return next(line for line in reversed(log.read_text().splitlines()) if line.startswith(("Error: ", "Traceback")))


def test_a_disk_that_is_full_stops_the_run_and_one_with_room_lets_it_continue(
    recipe: Path, tmp_path: Path, own_mounts: None
) -> None:
    wanted = run_whole(recipe)
    disk, log = tmp_path / "disk", tmp_path / "log"

    def work() -> None:
        enter_own_mounts()
        # A checkpoint is three times as large as the weights; there is room for one and a half.
        mount("tmpfs", disk, "tmpfs", 0, f"size={int(4.5 * len(wanted))}")
        print("FULL")
        assert main(["sft", str(recipe)]) == 1
        assert checkpoints(disk / "run"), "nothing was saved before the disk was full"
        assert not (disk / "run" / "sft" / "final").exists()
        left = {path.name for path in (disk / "run" / "sft").iterdir() if path.name.startswith(".")}
        assert not left, f"{left} still take room"
        print("ROOM")
        mount("tmpfs", disk, "tmpfs", MS_REMOUNT, "size=64m")
        assert main(["sft", str(recipe)]) == 0
        assert final(disk / "run") == wanted

    assert in_child(work, log) == 0, log.read_text()[-4000:]
    full, room = log.read_text().split("FULL\n")[1].split("ROOM\n")
    told = full.splitlines()[-2]
    assert told.startswith(f"Error: {disk}/run/sft"), told
    assert "cannot be written (the disk is full); free at least " in told, told
    assert told.endswith(CONTINUES), told
    assert "resuming from checkpoint-" in room


def test_a_file_system_that_turns_read_only_stops_the_run_and_a_writable_one_lets_it_continue(
    recipe: Path, tmp_path: Path, own_mounts: None
) -> None:
    wanted = run_whole(recipe)
    disk, log = tmp_path / "disk", tmp_path / "log"

    def turn_read_only() -> None:
        metrics = disk / "run" / "sft" / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            time.sleep(0.01)
        mount_read_only(disk)

    def work() -> None:
        enter_own_mounts()
        mount("tmpfs", disk, "tmpfs", 0, "size=64m")
        threading.Thread(target=turn_read_only, daemon=True).start()
        print("READ-ONLY", flush=True)
        assert in_child(lambda: os._exit(main(["sft", str(recipe)])), None) == 1
        assert not (disk / "run" / "sft" / "final").exists()
        assert ctypes.CDLL(None).umount2(os.fsencode(disk), 0) == 0
        assert checkpoints(disk / "run"), "nothing was saved before"
        print("WRITABLE")
        assert main(["sft", str(recipe)]) == 0
        assert final(disk / "run") == wanted

    assert in_child(work, log) == 0, log.read_text()[-4000:]
    before, after = log.read_text().split("READ-ONLY\n")[1].split("WRITABLE\n")
    told = [line for line in before.splitlines() if line.startswith("Error: ")][-1]
    assert told.startswith(f"Error: {disk}/run/"), told
    assert told.endswith(f" cannot be written (its file system is read-only); make it writable, {CONTINUES}"), told
    assert "resuming from checkpoint-" in after


def test_a_checkpoint_that_cannot_be_written_stops_the_run_wherever_the_tests_run(recipe: Path, tmp_path: Path) -> None:
    wanted = run_whole(recipe)
    run, log = tmp_path / "disk" / "run", tmp_path / "log"

    def limited() -> None:
        def limit() -> None:
            while not any((run / "sft").glob("checkpoint-*")):
                time.sleep(0.005)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

        threading.Thread(target=limit, daemon=True).start()
        sys.exit(main(["sft", str(recipe)]))

    def work() -> None:
        with pytest.raises(SystemExit) as caught:
            limited()
        assert caught.value.code == 1

    assert in_child(work, log) == 0, log.read_text()[-4000:]
    assert checkpoints(run), "nothing was saved before"
    assert last_line(log).startswith(f"Error: {run}/sft")
    reason = "cannot be written (the file is larger than this process may write: ulimit -f); raise the limit"
    assert last_line(log).endswith(f" {reason}, {CONTINUES}")
    assert main(["sft", str(recipe)]) == 0
    assert final(run) == wanted


# ---- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (OSError(28, "No space left on device"), "{at} cannot be written (the disk is full); free at least "),
        (OSError(122, "Disk quota exceeded", "{at}/x"), "{at}/x cannot be written (the disk quota is used up); free "),
        (OSError(30, "Read-only file system", "{at}/x"), "{at}/x cannot be written (its file system is read-only); make"),
        (PermissionError(13, "Permission denied", "{at}/x"), "{at}/x cannot be written (this user may not write there); "),
        (OSError(116, "Stale file handle"), "{at} cannot be written (the disk or the network file system failed: ESTALE)"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "{at} cannot be written (the disk is full); "),
        (RuntimeError("PytorchStreamWriter failed writing file data/3"), "{at} cannot be written (the disk is full); "),
    ],
)  # fmt: skip
def test_whoever_could_not_write_the_message_says_where_why_and_what_to_do(
    tmp_path: Path, error: Exception, what: str
) -> None:
    if isinstance(error, OSError) and error.filename:
        error.filename = error.filename.format(at=tmp_path)
    with pytest.raises(StorageError) as caught, writing(tmp_path, needed_bytes=lambda: 10**18):
        raise error
    assert str(caught.value).startswith(what.format(at=tmp_path))
    assert str(caught.value).endswith(CONTINUES)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(2, "No such file"),
        PermissionError(13, "Permission denied", "/etc/shadow"),
        RuntimeError("code"),
    ],
)
def test_errors_about_something_else_stay_what_they_are(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, writing(tmp_path):
        raise error
    assert caught.value is error


# ---- data that changes -----------------------------------------------------------------------------------------------


def changed(path: Path) -> str:
    return (
        f"Error: {path} has changed since this run began; run the same command again to use what it holds now "
        "(whatever was made from what it held before is made again), or put the earlier file back first"
    )


def rows_kept(run: Path, stage: str) -> int:
    kept: int = json.loads((run / stage / "data.json").read_text())["sources"][0]["rows_kept"]
    return kept


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_data_file_that_changes_before_a_stage_reads_it_stops_the_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], stage: str
) -> None:
    from hymba_align.run.folder import RunFolder

    data, run = tmp_path / "train.jsonl", tmp_path / "disk" / "run"
    short = ["sft.trainer.max_steps=2", *(["dpo=null"] if stage == "sft" else [])]
    mark_started, first = RunFolder.mark_started, data.read_text()

    def changes(self: RunFolder, name: str, *arguments: Any) -> Path | None:
        if name == stage:
            data.write_text(first + first.splitlines()[0] + "\n")
        return mark_started(self, name, *arguments)

    monkeypatch.setattr(RunFolder, "mark_started", changes)
    assert main(["run", str(recipe), *short]) == 2
    assert capfd.readouterr().err.splitlines()[-2] == changed(data)
    assert not (run / stage / "final").exists()
    monkeypatch.undo()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    again = data.read_text()

    data.write_text(first)
    assert main(["run", str(recipe), *short]) == 0, "the earlier file is back"
    assert rows_kept(run, stage) == ROWS, "the cache has rows of the changed file"
    if stage == "sft":
        data.write_text(again)
        assert main(["run", str(recipe), *short]) == 0
        assert rows_kept(run, stage) == ROWS + 1


def test_a_streamed_file_that_changes_while_it_is_read_stops_the_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from hymba_align import stage_training

    data, train = tmp_path / "train.jsonl", stage_training._call_trainer

    def changes(*arguments: Any) -> dict[str, float]:
        metrics = train(*arguments)
        data.write_text(data.read_text() + data.read_text().splitlines()[0] + "\n")
        return metrics

    monkeypatch.setattr(stage_training, "_call_trainer", changes)
    assert main(["sft", str(recipe), "data.streaming=true", "dpo=null", "sft.trainer.max_steps=2"]) == 2
    assert capfd.readouterr().err.splitlines()[-2] == changed(data)


def test_test_problems_that_change_while_they_are_scored_stop_the_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import hymba_align.eval

    test = tmp_path / "test.jsonl"
    test.write_text((tmp_path / "train.jsonl").read_text())

    def changes(checkpoint: str, section: Any, out_dir: Path, **_: Any) -> dict[str, None]:
        test.write_text(test.read_text() + "\n")
        (out_dir / "gsm8k.json").write_text("{}")
        return {"gsm8k": None}

    monkeypatch.setattr(hymba_align.eval, "evaluate", changes)
    assert main(["run", str(recipe), "eval={stages: [base], gsm8k: {num_fewshot: 0}}", "sft=null", "dpo.data={}"]) == 2
    assert capfd.readouterr().err.splitlines()[-2] == changed(test)


# ---- a process that dies ---------------------------------------------------------------------------------------------


def test_a_data_worker_that_is_killed_stops_the_run_with_what_to_do_and_the_next_run_continues(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import hymba_align.data.reading.sources
    from hymba_align.data.records import Maker

    make, parent = Maker.__call__, os.getpid()

    def dies(self: Maker, chunk: Any) -> Any:
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return make(self, chunk)

    monkeypatch.setattr(hymba_align.data.reading.sources, "CHUNK_ROWS", 10)  # or one process would do
    monkeypatch.setattr(Maker, "__call__", dies)
    command = ["sft", str(recipe), "data.workers=2", "sft.trainer.max_steps=2"]
    assert main(command) == 1
    assert capfd.readouterr().err.splitlines()[-2] == (
        "Error: a process that prepared data was killed, most often for want of memory; set data.workers to less than 2"
    )
    monkeypatch.setattr(Maker, "__call__", make)
    assert main(command) == 0
    assert rows_kept(tmp_path / "disk" / "run", "sft") == ROWS
