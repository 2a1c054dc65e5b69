"""`hymba-align show`: what a run's folder says, whatever state it is in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hymba_align.cli import main
from hymba_align.eval.report import cost
from hymba_align.files import write_json
from hymba_align.run.lock import LEASE, LEASE_S, held, holder
from hymba_align.run_view.show import show_run
from hymba_align.run_view.view import plain_view, view_run

Build = Callable[..., Path]
Show = Callable[..., tuple[int, str, str]]


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Show:
    """`hymba-align show ...` in this process: exit code, stdout, stderr."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        code = main(["show", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def other_process(tmp_path: Path) -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Starts a process that holds a folder until it is ended."""
    started: list[subprocess.Popen[str]] = []

    def start(root: Path) -> subprocess.Popen[str]:
        code = (
            "import sys, time\nfrom pathlib import Path\nfrom hymba_align.run.lock import held\n"
            "with held(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(120)\n"
        )
        process = subprocess.Popen([sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def states(root: Path) -> dict[str, str]:
    return {step.name: step.state for step in view_run(root).steps}


# --- states -----------------------------------------------------------------------------------------------------------


def test_a_finished_run_shows_states_settings_numbers_scores_costs_and_paths(show: Show, finished: Build) -> None:
    root = finished()

    code, out, err = show(root)

    assert (code, err) == (0, "")
    assert out.splitlines()[:6] == [
        f"demo, in {root}",
        "  score base       done         1 task",
        "  train SFT        done         20 steps, 20 s",
        "  score after SFT  done         1 task",
        "  train DPO        done         20 steps, 20 s",
        "  score after DPO  done         1 task",
    ]
    for text in (
        "  base: nvidia/Hymba-1.5B-Base, bfloat16\n",
        "  SFT: max_length 512, learning_rate 5e-05, num_train_epochs 2\n",
        "  DPO: max_length 512, beta 0.1\n",
        "  loss at the end: 0.1000 (step 20)\n",
        "  pairs preferred rightly at the end: 0.750\n",
        "  tokens per second: 100\n",
        "SFT: loss\n",
        "DPO: reward margin\n",
        "50.0 ± 12.9",
        "1.00 GiB",
        f"  {root}/sft/final\n",
        f"  talk to it: hymba-align chat {root}/dpo/final\n",
        f"  read its report: {root}/report.html\n",
    ):
        assert text in out
    assert "Problem" not in out


def test_rows_that_are_left_out_have_a_line_for_each_reason(show: Show, finished: Build) -> None:
    root = finished("mine")
    counts = ("rows_read", "rows_kept", "conversations", "total_tokens", "trained_tokens", "rows_not_chosen")
    source = {**dict.fromkeys((*counts, "rows_passed_over", "shortened"), 0), "name": "my.jsonl", "repeat": 1}
    lost = {"malformed JSON": 3, "a turn, the user's, is empty": 1}
    write_json(root / "sft" / "data.json", {"sources": [{**source, "lost": lost}]})

    _, out, _ = show(root)

    assert " trained on\n    left out: 3 malformed JSON\n    left out: 1 a turn, the user's, is empty\n" in out


def test_an_interrupted_run_says_where_it_goes_on_and_with_which_command(show: Show, begun: Build) -> None:
    root = begun()

    _, out, _ = show(root)

    assert "  train SFT        interrupted  step 7 of 40; continues from checkpoint-5\n" in out
    assert "  train DPO        to do\n" in out
    assert out.endswith(f"Next\n  continue: hymba-align run {root}/recipe.yaml\n")


def test_a_folder_that_moved_is_continued_where_it_is_now(begun: Build, tmp_path: Path) -> None:
    moved = begun().rename(tmp_path / "moved here")

    assert view_run(moved).next == (("continue", f"hymba-align run '{moved}/recipe.yaml' 'output_dir={moved}'"),)


def test_a_run_at_work_says_who_works_at_what_and_is_left_alone(
    show: Show, begun: Build, other_process: Callable[[Path], subprocess.Popen[str]]
) -> None:
    root = begun()
    process = other_process(root)
    before = sorted(path.name for path in root.iterdir())

    _, out, _ = show(root)

    assert f"In use by process {process.pid} on " in out
    assert "  train SFT        running      step 7 of 40, logged " in out
    assert f"Next\n  watch it: hymba-align show {root} --follow\n" in out
    assert sorted(path.name for path in root.iterdir()) == before
    assert process.poll() is None


def test_a_killed_run_counts_as_interrupted_at_once(
    begun: Build, other_process: Callable[[Path], subprocess.Popen[str]]
) -> None:
    root = begun()
    process = other_process(root)
    assert states(root)["sft"] == "running"

    process.kill()
    process.wait()

    assert (root / LEASE).exists()
    assert states(root)["sft"] == "interrupted"


def test_a_lease_that_nobody_renewed_is_nobodys(begun: Build) -> None:
    root = begun()
    with held(root):
        found = holder(root)
        long_ago = time.time() - LEASE_S - 1
        os.utime(root / LEASE, (long_ago, long_ago))
        renewed_long_ago = holder(root)

    assert found is not None
    assert found.pid == os.getpid()
    assert renewed_long_ago is None


def test_epochs_tell_how_many_steps_there_are_where_no_checkpoint_does(begun: Build) -> None:
    root = begun()
    (root / "sft" / "checkpoint-5" / "trainer_state.json").write_text("{")

    sft = next(step for step in view_run(root).steps if step.name == "sft")

    assert (sft.step, sft.max_steps) == (7, 20)  # a step is a tenth of one of the 2 epochs


def test_a_run_without_scores_or_preferences_has_no_such_steps(finished: Build) -> None:
    root = finished(dpo=None, eval=None)
    for path in ("dpo", "eval"):
        (root / path).rename(root.parent / path)

    assert states(root) == {"sft": "done"}


# --- damage -----------------------------------------------------------------------------------------------------------


def test_weights_that_were_cut_short_are_damage(show: Show, finished: Build) -> None:
    root = finished()
    (root / "sft" / "final" / "model.safetensors").write_bytes(b"wei")

    code, out, _ = show(root)

    assert code == 0
    assert (
        f"Problem: train SFT: sft/final/model.safetensors has 3 bytes instead of 7; remove {root}/sft/final, and the same "
        "command makes it again\n"
    ) in out
    assert states(root)["sft"] == "damaged"


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("recipe.yaml", None, "recipe.yaml is missing or cannot be read, so what was asked for is not known"),
        ("recipe.yaml", "{", "recipe.yaml cannot be read: "),
        ("environment.json", "[]", "environment.json cannot be read: "),
        ("sft/manifest.json", "{", "train SFT: sft/manifest.json is not JSON; the same command makes it again"),
        ("sft/metrics.jsonl", "{\n{}\n", "metrics.jsonl:1: not a JSON object"),
        ("eval/sft/gsm8k.json", "{}", "gsm8k.json has the format 1 of another version"),
        ("sft/final/config.json", None, "train SFT: sft/final/config.json is gone; the same command makes it again"),
        ("sft/data.json", '{"sources": [3]}', "sft/data.json lacks what this version writes there"),
    ],
)
def test_a_damaged_file_is_named_and_the_rest_is_shown(
    file: str, content: str | None, problem: str, show: Show, finished: Build
) -> None:
    root = finished()
    path = root / file
    path.unlink() if content is None else path.write_text(content)

    code, out, _ = show(root)

    assert code == 0
    assert any(line.startswith("Problem: ") and problem in line for line in out.splitlines()), out
    assert "DPO: reward margin" in out


def test_a_text_in_a_folder_does_nothing_to_the_terminal(show: Show, finished: Build) -> None:
    root = finished(base={"model": "evil\x1b[2J\u202e[red]"})

    _, out, _ = show(root)

    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "evil␛[2J‹U+202E›[red]" in out


def test_a_secret_in_a_folder_is_not_shown(show: Show, finished: Build) -> None:
    root = finished(data={"path": "s3://bucket/x", "storage_options": {"secret": "hunter2-hunter2"}})

    _, out, _ = show(root, "--json")

    assert "bucket" in out
    assert "hunter2" not in out


# --- names ------------------------------------------------------------------------------------------------------------


def test_a_run_is_found_by_its_name_in_runs(
    show: Show, finished: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished("runs/mine")
    monkeypatch.chdir(tmp_path)

    assert show("mine")[1].startswith("mine, in runs/mine\n")


def test_what_is_no_run_is_said_with_the_runs_that_are_there(
    show: Show, finished: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    nothing = show("mine")
    finished("runs/mine")

    assert nothing[0] == 2
    assert nothing[2].splitlines()[0] == (
        "Error: there is no folder 'mine', and no run of that name in runs; there is no run in runs yet"
    )
    for name, what in (
        ("your", "there is no folder 'your', and no run of that name in runs"),
        ("empty", "empty is no run folder: it has no recipe.yaml and nothing that a training stage leaves"),
        ("file", "file is a file, and a run is a folder"),
    ):
        code, out, err = show(name)
        assert (code, out) == (2, "")
        assert err.splitlines()[0] == f"Error: {what}; runs here: mine"


# --- --json and --follow ----------------------------------------------------------------------------------------------


def test_json_has_everything(show: Show, finished: Build) -> None:
    root = finished()

    code, out, err = show(root, "--json")

    found: dict[str, Any] = json.loads(out)
    assert code == 0
    assert err.startswith("demo, in ")  # what people read is on stderr
    assert [step["state"] for step in found["steps"]] == ["done"] * 5
    assert found["scores"]["sft"]["gsm8k"]["scores"]["strict_match"] == {
        "value": 0.5,
        "stderr": pytest.approx(0.1290994),
        "n": 16,
    }
    assert found["training"]["dpo"]["curves"]["rewards/margins"][-1] == [20.0, 19.5]
    assert found["training"]["sft"]["cost"] == {
        "seconds": 20.0, "tokens": 2000, "tokens_per_second": 100.0, "peak_bytes": 2**30,
    }  # fmt: skip
    assert found["checkpoints"] == [f"{root}/sft/final", f"{root}/dpo/final"]
    assert found["problems"] == []


def test_following_ends_when_nobody_works_at_the_run(show: Show, begun: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    import hymba_align.run_view.show as module

    root, slept = begun(), []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 1:
            write_json(root / "sft" / "manifest.json", {"completed": "sft", "details": {"metrics": {"steps": 40.0}}})
        else:
            lease.unlink()

    with held(root):
        lease = root / LEASE
        monkeypatch.setattr(module, "EVERY_S", 0.01)
        monkeypatch.setattr(module.time, "sleep", sleep)
        _, out, _ = show(root, "--follow")

    assert slept == [0.01, 0.01]
    assert out.splitlines()[:7] == [
        "score base: done",
        "train SFT: running, step 7 of 40",
        "score after SFT: to do",
        "train DPO: to do",
        "score after DPO: to do",
        "train SFT: done, step 40 of 40",
        "score after SFT: running",
    ]


# ---- looks inside ----------------------------------------------------------------------------------------------------


def inspected(root: Path, **changed: Any) -> None:
    """A look inside the last stage that is complete."""
    folder = root / "inspect" / "dpo"
    folder.mkdir(parents=True)
    (folder / "inspect.html").write_text("<p>page</p>")
    (folder / "inspect.json").write_text("{}")
    summary = {"head": ["what", "value"], "rows": [["KL", "0.2"]], "findings": [{"text": "KL grew.", "sign": True}]}
    done = {"started": "i", "completed": "i", "outputs": ["inspect.html", "inspect.json"]}
    details = {"summary": summary, "seconds": 12.0, "inputs": "dpo", **changed}
    write_json(root / "inspect" / "dpo.manifest.json", {"stage": "inspect/dpo", **done, "details": details})


def test_a_look_inside_is_a_step_with_its_most_telling_sentences(
    finished: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    root = finished(inspect={"data": "rows.jsonl", "stages": None})
    waiting = {step.name: step.state for step in view_run(root).steps}
    inspected(root)

    view = show_run(root)

    told = capsys.readouterr().out
    assert waiting["inspect/dpo"] == "to do"
    (step,) = [step for step in view.steps if step.name.startswith("inspect")]
    assert (step.name, step.title, step.state, step.detail) == ("inspect/dpo", "inspect after DPO", "done", "12 s")
    assert "Inside, after DPO\n  Sign: KL grew.\n" in told
    assert f"{root}/inspect/dpo/inspect.html" in told
    assert plain_view(view)["inspections"]["dpo"]["findings"] == [{"text": "KL grew.", "sign": True}]
    assert [name for name, *_ in cost.rows(view.run)][-2:] == ["inspect after DPO", "together"]


def test_a_look_inside_weights_that_were_trained_anew_is_left_out_and_named(finished: Build) -> None:
    root = finished()
    inspected(root, inputs="other weights")

    view = view_run(root)

    assert view.run.inspected == ()
    assert "The look inside after DPO is of weights that were trained anew since; run it again" in view.problems


def test_a_look_inside_whose_page_is_gone_is_damaged(finished: Build) -> None:
    root = finished()
    inspected(root)
    (root / "inspect" / "dpo" / "inspect.html").unlink()

    states = {step.name: step.state for step in view_run(root).steps}

    assert states["inspect/dpo"] == "damaged"
