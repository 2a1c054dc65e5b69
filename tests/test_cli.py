"""The command line: fast help, exit codes, one sentence per error."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

import hymba_align.cli
import hymba_align.pipeline
from hymba_align import __version__
from hymba_align.cli import main
from hymba_align.errors import DataError, HymbaAlignError, KernelError, Preempted
from hymba_align.processes.agent import STARTED_BY_US
from hymba_align.recipe import Recipe

RECIPE = "recipes/tiny/arithmetic.yaml"
HEAVY = ("torch", "transformers", "datasets", "trl", "accelerate", "deepspeed", "lm_eval", "numpy")


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Calls that commands make, in place of the work."""
    calls: list[tuple[object, ...]] = []
    for commands in (hymba_align.cli.data, hymba_align.cli.scoring, hymba_align.cli.training):
        monkeypatch.setattr(commands, "quiet_libraries", lambda: None)
    monkeypatch.setattr(
        hymba_align.pipeline, "run_recipe", lambda recipe, dry_run: calls.append(("run", recipe, dry_run))
    )
    monkeypatch.setattr(
        hymba_align.pipeline,
        "run_training_stage",
        lambda recipe, stage, dry_run: calls.append((stage, recipe, dry_run)),
    )
    return calls


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([name, "--help"] for name in hymba_align.cli.cli.commands)]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from hymba_align.cli import main\n"
        f"code = main({arguments!r})\n"
        f"loaded = [name for name in {(*HEAVY, 'pydantic')!r} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
        "sys.exit(code)\n"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_loading_a_recipe_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from hymba_align.recipe import load_recipe\n"
        f"load_recipe({RECIPE!r})\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )

    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("name", hymba_align.cli.cli.commands)
def test_every_help_text_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0

    assert re.search(rf"Example:\n    hymba-align {name}[ \n]", capsys.readouterr().out)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0

    assert capsys.readouterr().out == f"hymba-align {__version__}\n"


@pytest.mark.parametrize("name", ["run", "sft", "dpo"])
def test_commands_hand_the_recipe_with_overrides_to_the_pipeline(name: str, pipeline: list[tuple[object, ...]]) -> None:
    assert main([name, RECIPE, "seed=7", "--dry-run", "sft.max_length=64"]) == 0

    [(called, recipe, dry_run)] = pipeline
    assert isinstance(recipe, Recipe)
    assert recipe.sft is not None
    assert (called, dry_run, recipe.seed, recipe.sft.max_length) == (name, True, 7, 64)


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (DataError("rows.jsonl is empty"), 2, "Error: rows.jsonl is empty\nMore: hymba-align explain rows\n"),
        (KernelError("no kernel here"), 1, "Error: no kernel here\nMore: hymba-align explain kernel\n"),
        (HymbaAlignError("sft diverged"), 1, "Error: sft diverged\nMore: hymba-align explain failed\n"),
        (KeyboardInterrupt(), 130, f"{hymba_align.cli.INTERRUPTION}\n"),
        (click.Abort(), 130, f"{hymba_align.cli.INTERRUPTION}\n"),
    ],
)
def test_errors_of_the_user_are_a_sentence_with_its_topic_and_an_exit_code(
    error: BaseException,
    code: int,
    printed: str,
    pipeline: list[tuple[object, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(recipe: Recipe, dry_run: bool) -> None:
        raise error

    monkeypatch.setattr(hymba_align.pipeline, "run_recipe", fail)

    assert main(["run", RECIPE]) == code

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.removeprefix("\n") == printed


def test_an_interrupted_command_that_has_nothing_to_continue_does_not_say_that_it_would(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hymba_align.run_view.find.find_run", fail)

    assert main(["show", "mine"]) == 130

    assert capsys.readouterr().err.strip() == "Interrupted."


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (Preempted("saved"), 75)])
@pytest.mark.parametrize("rank", [0, 1])
def test_of_the_processes_that_a_command_started_one_says_that_it_stops(
    error: BaseException,
    code: int,
    rank: int,
    pipeline: list[tuple[object, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(recipe: Recipe, dry_run: bool) -> None:
        raise error

    monkeypatch.setattr(hymba_align.pipeline, "run_recipe", fail)
    monkeypatch.setenv(STARTED_BY_US, "1")
    monkeypatch.setenv("RANK", str(rank))

    assert main(["run", RECIPE]) == code

    assert bool(capsys.readouterr().err.strip()) == (rank == 0)


def test_errors_of_ours_keep_their_traceback(
    pipeline: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(recipe: Recipe, dry_run: bool) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(hymba_align.pipeline, "run_recipe", fail)

    with pytest.raises(ZeroDivisionError, match="a bug"):
        main(["run", RECIPE])


def test_one_of_several_processes_says_which_it_is(
    pipeline: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "3")

    assert main(["sft", "absent.yaml"]) == 2

    assert capsys.readouterr().err.splitlines() == [
        "[rank 3] Error: absent.yaml: there is no such recipe file",
        "[rank 3] More: hymba-align explain recipe",
    ]


@pytest.mark.parametrize(
    ("arguments", "last_line"),
    [
        (["train", RECIPE], "Error: No such command 'train'."),
        (["run"], "Error: Missing argument 'RECIPE'."),
        (["run", RECIPE, "--drop"], "Error: No such option '--drop'."),
        (["eval", "m", "--tasks", "gsm8k,gsm9k"], "Error: Invalid value for '--tasks': 'gsm9k' is not a task; tasks: gsm8k, gsm8k_nvidia, gpqa, gpqa_generative, bfcl"),
    ],
)  # fmt: skip
def test_usage_errors_exit_with_2(arguments: list[str], last_line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2

    assert capsys.readouterr().err.splitlines()[-1] == last_line


def test_the_process_itself_prints_no_traceback_for_a_users_error() -> None:
    command = [sys.executable, "-m", "hymba_align", "run", RECIPE, "sft.max_lenght=3"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "Error: override 'sft.max_lenght=3': sft.max_lenght is not a key of a recipe; the nearest is sft.max_length\n"
        "More: hymba-align explain recipe\n"
    )


# --- eval -------------------------------------------------------------------------------------------------------------


def test_eval_takes_keys_of_the_section_with_or_without_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import hymba_align.eval
    from hymba_align.eval import Score, TaskResult

    calls = []
    result = TaskResult(
        task="gsm8k",
        checkpoint="owner/hymba",
        suite=None,
        n=4,
        total=9,
        limit=4,
        partial=True,
        scores={"strict_match": Score(0.25, 0.1, 4), "flexible_match": Score(0.5, None, 4)},
        settings={},
        generation={},
        chat_template={},
        first_prompt=None,
        seed=None,
        versions={},
        hardware={},
        processes=1,
        wall_s=1.0,
        new_tokens=8,
        tokens_per_second=None,
        warnings=("a prompt lost its beginning",),
    )

    def evaluate(checkpoint, section, out_dir, *, chat_template, say):
        calls.append((checkpoint, section, out_dir, chat_template))
        say("gsm8k: as it comes")
        return {"gsm8k": result}

    monkeypatch.setattr(hymba_align.eval, "evaluate", evaluate)

    assert main(["eval", "owner/hymba", "limit=4", "eval.gsm8k.num_fewshot=0", "--chat-template", "released"]) == 0
    assert main(["eval", "./runs/x/final/", "--tasks", "gsm8k", "--output", str(tmp_path)]) == 0

    (checkpoint, section, out_dir, template), second = calls
    assert (checkpoint, str(out_dir), template) == ("owner/hymba", "runs/eval/owner-hymba", "released")
    assert (section.limit, section.gsm8k.num_fewshot, section.tasks) == (4, 0, ("gsm8k",))
    assert (second[1].limit, second[2], second[3]) == (None, tmp_path, "hymba")
    out = capsys.readouterr().out
    for text in (
        "gsm8k: as it comes\n",
        "partial: 4 of 9",
        "25.0 ± 10.0",
        "50.0",
        "Warning, gsm8k: a prompt lost its beginning",
        "runs/eval/owner-hymba/gsm8k.json",
    ):
        assert text in out


@pytest.mark.parametrize(
    ("words", "tasks", "suite"),
    [
        ([], ("gsm8k",), None),
        (["--tasks", "gpqa, bfcl"], ("gpqa", "bfcl"), None),
        (["--suite", "quick", "--tasks", "gsm8k"], ("gsm8k",), "quick"),
        (["--suite", "quick", "tasks=[gpqa]"], ("gpqa",), "quick"),
    ],
)
def test_tasks_that_are_named_go_before_those_of_a_suite(
    words: list[str], tasks: tuple[str, ...], suite: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hymba_align.evaluation

    asked = []
    monkeypatch.setattr(
        hymba_align.evaluation, "run_evaluation", lambda checkpoint, section, *_, **__: asked.append(section)
    )

    assert main(["eval", "owner/hymba", *words, "--limit", "5", "--num-processes", "2"]) == 0

    assert (asked[0].tasks, asked[0].suite, asked[0].limit, asked[0].num_processes) == (tasks, suite, 5, 2)


def test_a_suite_brings_its_tasks_and_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import hymba_align.evaluation

    asked = []
    monkeypatch.setattr(
        hymba_align.evaluation, "run_evaluation", lambda checkpoint, section, *_, **__: asked.append(section)
    )
    mine = tmp_path / "mine.yaml"
    mine.write_text("tasks: [gsm8k, gpqa]\nlimit: 9\ngsm8k: {num_fewshot: 3}\n")

    assert main(["eval", "owner/hymba", "--suite", str(mine), "gsm8k.shots=first"]) == 0

    assert (asked[0].tasks, asked[0].limit) == (("gsm8k", "gpqa"), 9)
    assert (asked[0].gsm8k.num_fewshot, asked[0].gsm8k.shots) == (3, "first")


def test_a_suite_that_does_not_exist_is_told_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "owner/hymba", "--suite", "publisht"]) == 2

    assert capsys.readouterr().err == (
        "Error: override 'suite=publisht': eval.suite: there is no suite 'publisht', nor a file of that name; the nearest is "
        "'published'\n"
        "More: hymba-align explain recipe\n"
    )


def test_eval_names_the_nearest_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "owner/hymba", "limits=4"]) == 2

    assert capsys.readouterr().err == (
        "Error: override 'limits=4': eval.limits is not a key of a recipe; the nearest is eval.limit\n"
        "More: hymba-align explain recipe\n"
    )


def test_eval_of_another_architecture_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hymba_align.data.template import load_tokenizer

    load_tokenizer("data/arithmetic/tokenizer").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')

    assert main(["eval", str(tmp_path)]) == 2

    assert capsys.readouterr().err == (
        f"Error: {tmp_path}: model_type in config.json is 'llama', not 'hymba'; hymba-align trains and scores Hymba only\n"
        "More: hymba-align explain checkpoint\n"
    )
