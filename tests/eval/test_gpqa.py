"""GPQA through lm-evaluation-harness: the official scoring, an order of choices that nothing moves, no item in the open."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from hymba_align.data.rendering import render
from hymba_align.data.template import load_tokenizer
from hymba_align.errors import DataError, GraderError
from hymba_align.eval.answers import Answers
from hymba_align.eval.gpqa import (
    ORDERS,
    check_data,
    choice_order,
    data_files,
    load_task,
    read_rows,
    score_gpqa,
    score_gpqa_generative,
)
from hymba_align.recipe_eval import EvalSection, GPQASection

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
REAL = SHARED / "data" / "gpqa" / "dataset.zip"
invented = runpy.run_path(str(Path(__file__).with_name("invented_gpqa.py")))
Withheld = Callable[[], AbstractContextManager[None]]
record, write_archive = invented["record"], invented["write_archive"]
pieces, holds_a_piece, files_with_a_piece = (
    invented[name] for name in ("pieces", "holds_a_piece", "files_with_a_piece")
)
TEXTS = [text for number in range(9) for column, text in record(number).items() if column != "Record ID"]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path: Path = write_archive(tmp_path / "dataset.zip")
    return path


@pytest.fixture
def gpqa(archive: Path) -> EvalSection:
    """The seven invented main problems."""
    return EvalSection(tasks=("gpqa", "gpqa_generative"), gpqa=GPQASection(path=str(archive), max_new_tokens=200))


def with_gpqa(section: EvalSection, **changes: Any) -> EvalSection:
    return section.model_copy(update={"gpqa": section.gpqa.model_copy(update=changes)})


def real(**keys: Any) -> EvalSection:
    if not REAL.is_file():
        pytest.skip("the real archive is not beside the repository")
    return EvalSection(gpqa=GPQASection(path=str(REAL), **keys))


# ---- the order of choices --------------------------------------------------------------------------------------------


def test_the_order_of_choices_is_the_documented_function_of_the_record_s_id() -> None:
    for name in ("recZ0001", "an id", "é"):
        number = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 24
        assert choice_order(name) == ORDERS[number]
    # Written down once: an order that moves makes old results incomparable.
    assert [choice_order(f"recZ{number:04d}") for number in range(3)] == [(3, 1, 2, 0), (0, 2, 1, 3), (2, 1, 3, 0)]


def test_every_order_is_one_of_the_four_choices_and_all_24_come_up_alike() -> None:
    counts = Counter(choice_order(f"record {number}") for number in range(24_000))
    assert len(counts) == 24
    assert all(sorted(order) == [0, 1, 2, 3] for order in counts)
    assert all(850 < count < 1150 for count in counts.values())  # 1,000 each, standard deviation 31


def test_a_record_has_the_same_order_in_every_subset_in_any_row_and_in_any_state_of_the_process(
    gpqa: EvalSection, tmp_path: Path
) -> None:
    by_subset = {}
    for subset in ("main", "diamond", "extended"):
        random.seed(len(subset))
        by_subset[subset] = {row["id"]: row for row in read_rows(with_gpqa(gpqa, subset=subset))}
    assert [len(rows) for rows in by_subset.values()] == [7, 3, 9]
    for subset in ("main", "diamond"):
        for name, row in by_subset[subset].items():
            assert row == by_subset["extended"][name]
    backwards = write_archive(tmp_path / "backwards.zip", {"main": invented["table"](reversed(range(7)))})
    rows = read_rows(with_gpqa(gpqa, path=str(backwards)))
    assert [row["id"] for row in rows] == list(reversed(by_subset["main"]))
    assert {row["id"]: row for row in rows} == by_subset["main"]


def test_choices_are_cleaned_as_packaged_and_the_answer_names_the_right_one(gpqa: EvalSection) -> None:
    for number, row in enumerate(read_rows(gpqa)):
        asked = record(number)
        texts = [asked[f"Incorrect Answer {place}"] for place in (1, 2, 3)]
        right = f"the {number + 40} red turnips of Upper Oom . and a cabbage"  # " [title]" becomes ". "
        order = choice_order(asked["Record ID"])
        assert row["choices"] == [[*texts, right][place] for place in order]
        assert row["choices"] == [row[f"choice{place}"] for place in (1, 2, 3, 4)]
        assert row["choices"]["ABCD".index(row["answer"][1])] == right
        assert row["Question"] == asked["Question"]


def test_of_equal_choices_the_first_is_the_right_one_as_packaged(
    gpqa: EvalSection, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = invented["table"](range(9)).replace(record(1)["Incorrect Answer 1"], record(1)["Correct Answer"])
    text = text.replace(record(2)["Incorrect Answer 1"], record(2)["Correct Answer"])
    write_archive(archive, {"main": text})
    rows = read_rows(gpqa)
    orders = [choice_order(row["id"]) for row in rows]
    # Of record 1 the wrong answer with the same text stands before the right one, of record 2 behind it.
    assert [orders[number].index(3) < orders[number].index(0) for number in (1, 2)] == [False, True]
    assert [row["answer"] for row in rows[1:3]] == ["(A)", f"({'ABCD'[orders[2].index(3)]})"]
    assert all(len(set(row["choices"])) == 3 for row in rows[1:3])


def test_the_real_records_have_one_order_in_all_subsets_and_the_right_answers_spread_over_the_letters(
    withheld: Withheld,
) -> None:
    with withheld():
        rows = {subset: {row["id"]: row for row in read_rows(real(subset=subset))} for subset in ("main", "diamond")}
        counts = {subset: len(found) for subset, found in rows.items()}
        same = sum(rows["main"].get(name) == row for name, row in rows["diamond"].items())
        letters = Counter(row["answer"] for row in rows["main"].values())
    assert counts == {"main": 448, "diamond": 198}
    assert same == 198
    assert dict(letters) == {"(A)": 128, "(B)": 112, "(C)": 116, "(D)": 92}  # chi-square 6.0 of 3 degrees, p = 0.11


def test_a_failure_over_real_items_says_its_kind_alone(withheld: Withheld) -> None:
    """pytest shows the arguments of every function on the way of an error, a table among them."""
    with pytest.raises(pytest.fail.Exception) as raised, withheld():
        read_rows_of(record(0)["Question"])
    assert raised.value.msg == "ValueError; the rest is withheld, for it could quote an item"
    assert (raised.value.pytrace, raised.value.__suppress_context__) == (False, True)


def read_rows_of(table: str) -> None:
    raise ValueError(table)


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_an_archive_that_cannot_be_used_is_one_sentence_without_its_content(gpqa: EvalSection, tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(DataError) as raised:
            load_task(with_gpqa(gpqa, path=str(path)))
        assert not holds_a_piece(str(raised.value), pieces(TEXTS))
        return str(raised.value)

    fix = "; set eval.gpqa.path to dataset.zip from github.com/idavidrein/gpqa"
    absent, text, other = tmp_path / "no.zip", tmp_path / "text.zip", tmp_path / "other.zip"
    assert message(absent) == f"{absent}: no such file{fix}"
    text.write_text("no archive", encoding="utf-8")
    assert message(text) == f"{text}: not GPQA's archive, or not with its authors' password{fix}"
    write_archive(other, password=b"another")
    assert message(other) == f"{other}: not GPQA's archive, or not with its authors' password{fix}"
    write_archive(other, {"extended": invented["table"](range(9))})
    assert message(other) == f"{other}: the archive has no dataset/gpqa_main.csv{fix}"
    get = "; get GPQA's own file"
    whole = invented["table"](range(3))
    for table, reason in [
        (whole.replace("Record ID", "Number"), f"the table has no column 'Record ID'{get}"),
        ("", f"the table has no column 'Record ID'{get}"),
        (whole.replace("recZ0002", "recZ0001"), f"row 3 has no 'Record ID' of its own{get}"),
        (whole.replace("recZ0001", " "), f"row 2 has no 'Record ID' of its own{get}"),
    ]:
        write_archive(other, {"main": table})
        assert message(other) == f"{other}: gpqa_main.csv: {reason}"


def test_without_an_archive_the_hub_s_file_is_read_into_memory(
    gpqa: EvalSection, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    asked = []

    class Hub:
        def read_bytes(self, path: str) -> bytes:
            asked.append(path)
            content: bytes = invented["table"](range(3)).encode()
            return content

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", Hub)
    rows = read_rows(with_gpqa(gpqa, path=None, subset="diamond"))
    assert asked == ["datasets/Idavidrein/gpqa/gpqa_diamond.csv"]
    assert rows == read_rows(gpqa)[:3]


def test_a_hub_that_cannot_be_reached_is_one_sentence(gpqa: EvalSection) -> None:
    nowhere = with_gpqa(gpqa, path=None)
    with pytest.raises(DataError) as raised:
        check_data(nowhere, "gpqa", ask_hub=True)
    said = str(raised.value)
    assert said.startswith("Idavidrein/gpqa cannot be read from the Hugging Face hub (")
    assert said.endswith("); set gpqa.path (in a recipe under eval) to dataset.zip from github.com/idavidrein/gpqa")
    assert "\n" not in said
    check_data(nowhere, "gpqa", ask_hub=False)  # then nobody looks
    assert data_files(nowhere) == []


def test_the_archive_is_what_the_score_depends_on(gpqa: EvalSection, archive: Path) -> None:
    assert data_files(gpqa) == [archive]


# ---- by log-likelihood -----------------------------------------------------------------------------------------------


def judge(monkeypatch: pytest.MonkeyPatch, tokenizer: Any, pick: Callable[[str], str]) -> list[tuple[Any, Any]]:
    """Makes one letter the likeliest by the prompt's text; returns the list into which what is asked for comes."""
    asked: list[tuple[Any, Any]] = []

    def score(
        self: Answers, contexts: Sequence[list[int]], continuations: Sequence[list[int]], *, name: str
    ) -> list[tuple[float, bool]]:
        asked.extend(zip(contexts, continuations, strict=True))
        found = []
        for context, continuation in zip(contexts, continuations, strict=True):
            letter = tokenizer.decode(continuation).strip().strip("()")
            likely = letter == pick(tokenizer.decode(context))
            found.append((-1.0 if likely else -2.0, likely))
        return found

    monkeypatch.setattr(Answers, "score", score)
    return asked


def right_letter(prompt: str) -> str:
    """Where the right choice stands in a prompt."""
    before = prompt.split(" red turnips of Upper Oom")[0]
    return before[before.rindex("(") + 1]


def next_letter(prompt: str) -> str:
    return "ABCDA"["ABCD".index(right_letter(prompt)) + 1]


def test_the_right_choice_scores_one_another_zero_and_samples_are_ids_and_letters(
    gpqa: EvalSection, model: Any, tokenizer: Any, run_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    judge(monkeypatch, tokenizer, right_letter)
    right = score_gpqa(run_of(model, gpqa))
    assert {name: (score.value, score.n) for name, score in right.scores.items()} == {
        "acc": (1.0, 7),
        "acc_norm": (1.0, 7),
    }
    judge(monkeypatch, tokenizer, next_letter)
    wrong = score_gpqa(run_of(model, gpqa))
    assert {score.value for score in wrong.scores.values()} == {0.0}
    rows = read_rows(gpqa)
    assert [sample.id for sample in wrong.samples] == [row["id"] for row in rows]
    for sample, row in zip(wrong.samples, rows, strict=True):
        assert (sample.question, sample.response, sample.tokens) == (None, None, None)
        assert f"({sample.target})" == row["answer"]
        following = "ABCDA"["ABCD".index(sample.target) + 1]
        assert sample.extracted == {"acc": following, "acc_norm": following}
        assert sample.correct == {"acc": False, "acc_norm": False}


def test_a_result_has_no_prompt_but_its_hash_and_says_how_little_so_few_problems_tell(
    gpqa: EvalSection, model: Any, tokenizer: Any, run_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = str(read_rows(gpqa)[0]["Question"]).strip()[:30]
    asked = judge(monkeypatch, tokenizer, lambda prompt: right_letter(prompt) if first in prompt else "A")
    result = score_gpqa(run_of(model, gpqa))
    context, continuation = asked[0]
    prompt = tokenizer.decode([*context, *continuation]).removesuffix("(A)")
    assert result.first_prompt is None
    assert result.settings["first_prompt_sha256"] == hashlib.sha256(prompt.encode()).hexdigest()
    assert (result.settings["subset"], result.settings["num_fewshot"]) == ("main", 0)
    assert result.settings["harness_task"] == "gpqa_main_zeroshot"
    assert result.generation == {}
    share, n = result.scores["acc"].value, 7
    assert 0 < share < 1
    error = (share * (1 - share) / (n - 1)) ** 0.5
    assert result.scores["acc"].stderr == pytest.approx(error)
    always_a = sum(row["answer"] == "(A)" for row in read_rows(gpqa))
    assert result.warnings == (
        f"7 problems leave a standard error of {100 * error:.1f} points; guessing gives 25 %, and one letter for all up to "
        f"{100 * max(Counter(row['answer'] for row in read_rows(gpqa)).values()) / 7:.1f} %",
    )
    assert always_a < 7


def test_the_standard_error_over_the_448_main_problems_is_about_two_points() -> None:
    from hymba_align.eval.gpqa import precision_warnings
    from hymba_align.eval.result import Sample, Score

    samples = [Sample(str(n), "ABCD"[n % 4], None, None, {}, {}) for n in range(448)]
    share = 139 / 448
    headline = Score(share, (share * (1 - share) / 447) ** 0.5, 448)
    assert precision_warnings(headline, samples) == [
        "448 problems leave a standard error of 2.2 points; guessing gives 25 %, and one letter for all up to 25.0 %"
    ]
    for partial in (Score(1.0, None, 1), Score(0.0, 0.0, 6)):
        assert precision_warnings(partial, samples[: partial.n]) == []


def test_a_limit_scores_the_first_problems_with_the_same_prompts_and_says_so(
    gpqa: EvalSection, model: Any, run_of: Callable[..., Any]
) -> None:
    whole = score_gpqa(run_of(model, gpqa))
    random.seed(5)
    part = score_gpqa(run_of(model, gpqa.model_copy(update={"limit": 3})))
    assert (part.n, part.total, part.limit, part.partial) == (3, 7, 3, True)
    assert part.samples == whole.samples[:3]
    assert part.settings["first_prompt_sha256"] == whole.settings["first_prompt_sha256"]
    assert part.warnings[0] == "only the first problems were scored, 3 of 7"


def test_a_folder_in_the_place_of_the_archive_is_named(tmp_path: Path) -> None:
    section = EvalSection.model_validate({"gpqa": {"path": str(tmp_path)}})
    with pytest.raises(DataError) as raised:
        read_rows(section)
    told = "is a folder; eval.gpqa.path names a file, dataset.zip from github.com/idavidrein/gpqa"
    assert str(raised.value) == f"{tmp_path} {told}"


@pytest.mark.parametrize("which", ["small", "released"])
def test_context_and_choice_are_token_for_token_the_reply_that_training_renders(
    gpqa: EvalSection,
    model: Any,
    tokenizer: Any,
    run_of: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    which: str,
) -> None:
    if which == "released":
        if not (SHARED / "hymba_1_5b").is_dir():
            pytest.skip("the released tokenizer is not beside the repository")
        tokenizer = load_tokenizer(str(SHARED / "hymba_1_5b"))
    asked = judge(monkeypatch, tokenizer, right_letter)
    score_gpqa(run_of(model, gpqa, tokenizer=tokenizer))
    assert len(asked) == 28
    for number, row in enumerate(read_rows(gpqa)):
        choices = "\n".join(f"({letter}) {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True))
        question = f"What is the correct answer to this question:{row['Question']}\nChoices:\n{choices}\nAnswer:"
        for place, letter in enumerate("ABCD"):
            context, continuation = asked[4 * number + place]
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": f"({letter})"}]
            reply = render(tokenizer, messages).input_ids
            assert [*context, *continuation, tokenizer.eos_token_id] == reply
            # The line break that ends the header goes to the choice (the harness moves trailing white space there), and no
            # space stands before the choice.
            assert tokenizer.decode(continuation) == f"\n({letter})"
            assert tokenizer.decode(context).endswith("<extra_id_1>Assistant")


# ---- generated -------------------------------------------------------------------------------------------------------


def answer_with(row_of: Callable[[str], dict[str, Any]], text: str) -> Callable[[str], str]:
    """Replies in which {letter} is the right letter, {next} the next one, and {question} and {choice} quote the item."""

    def reply(asked: str) -> str:
        row = row_of(asked)
        letter = row["answer"][1]
        following = "ABCDA"["ABCD".index(letter) + 1]
        choice = row["choices"]["ABCD".index(letter)]
        return text.format(letter=letter, next=following, question=row["Question"], choice=choice) + "</s>"

    return reply


def row_finder(section: EvalSection) -> Callable[[str], dict[str, Any]]:
    rows = read_rows(section)

    def find(asked: str) -> dict[str, Any]:
        [row] = [row for row in rows if row["Question"].strip() in asked]
        return row

    return find


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("It asks: {question} So {choice}. The answer is ({letter}).", True, True),
        ("{question} The answer is ({next}). No: ({letter})", False, True),
        ("The answer is {letter}.\nNot ({next})", True, False),
        ("{choice}", False, True),  # the harness finds the choice's own text
        ("Answer: {letter}", False, True),
        ("The answer is {choice}, I think.", False, True),
        ("{question} I cannot say.", False, False),
    ],
)
def test_answers_are_graded_by_the_harness_and_leave_letters_only(
    gpqa: EvalSection,
    look_up: Callable[..., Any],
    run_of: Callable[..., Any],
    text: str,
    strict: bool,
    flexible: bool,
) -> None:
    run = run_of(look_up(answer_with(row_finder(gpqa), text)), gpqa.model_copy(update={"limit": 2}))
    result = score_gpqa_generative(run)
    assert {name: score.value for name, score in result.scores.items()} == {
        "strict_match": float(strict),
        "flexible_match": float(flexible),
    }
    assert result.samples[0].extracted["strict_match"] in {"[invalid]", *"ABCD"}
    assert all(sample.correct == {"strict_match": strict, "flexible_match": flexible} for sample in result.samples)
    assert all((sample.question, sample.response) == (None, None) for sample in result.samples)
    assert all(sample.tokens is not None and not sample.cut_off for sample in result.samples)
    result.write(run.out_dir / "gpqa_generative.json")
    stored = sorted(path.name for path in run.out_dir.iterdir())
    assert stored == ["gpqa_generative.answers-0.jsonl", "gpqa_generative.json"]
    assert files_with_a_piece(run.out_dir, pieces(TEXTS)) == []


def test_the_search_for_pieces_finds_them_in_files_and_in_json(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("well: " + record(3)["Question"][10:40], encoding="utf-8")
    (tmp_path / "escaped.json").write_text(repr(record(3)["Question"]), encoding="utf-8")
    (tmp_path / "clean.txt").write_text("turnips of Zarnavia", encoding="utf-8")
    assert files_with_a_piece(tmp_path, pieces(TEXTS)) == ["escaped.json", "plain.txt"]


def test_an_error_inside_the_harness_keeps_what_it_says_to_itself(
    gpqa: EvalSection, model: Any, run_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Answers, *arguments: Any, **settings: Any) -> Any:
        try:
            raise KeyError(record(0)["Question"])
        except KeyError as error:
            raise ValueError(f"cannot score {record(0)['Question']!r}") from error

    monkeypatch.setattr(Answers, "score", fail)
    with pytest.raises(GraderError) as raised:
        score_gpqa(run_of(model, gpqa))
    line = fail.__code__.co_firstlineno + 4
    assert str(raised.value) == (
        f"scoring GPQA failed with a ValueError in test_gpqa.py:{line}; its message is withheld, for it could quote an item"
    )
    shown = "".join(traceback.format_exception(raised.value, limit=0))
    assert not holds_a_piece(shown, pieces(TEXTS))


def test_errors_of_the_machine_and_our_own_pass_as_they_are(
    gpqa: EvalSection, model: Any, run_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (OSError(28, "No space left on device"), DataError("a file is gone")):

        def fail(self: Answers, *arguments: Any, error: Exception = error, **settings: Any) -> Any:
            raise error

        monkeypatch.setattr(Answers, "score", fail)
        with pytest.raises(type(error)) as raised:
            score_gpqa(run_of(model, gpqa))
        assert raised.value is error


def test_nothing_is_written_and_nothing_logged_while_tasks_are_made_and_scored(
    gpqa: EvalSection,
    model: Any,
    run_of: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import datasets

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    with caplog.at_level(logging.DEBUG):
        for score in (score_gpqa, score_gpqa_generative):
            score(run_of(model, with_gpqa(gpqa, max_new_tokens=4)))
    task = load_task(gpqa)
    assert task.eval_docs.cache_files == []
    after = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert sorted(path.name for path in after) == ["gpqa.answers-0.jsonl", "gpqa_generative.answers-0.jsonl"]
    printed = capfd.readouterr()
    for content in (*(path.read_bytes() for path in after), caplog.text, printed.out, printed.err):
        assert not holds_a_piece(content, pieces(TEXTS))


WHOLE_RUN = """
import logging, sys
from pathlib import Path
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)
from hymba_align.eval import evaluate
from hymba_align.recipe_eval import EvalSection, GPQASection
for number, path in enumerate(sys.argv[2:]):
    section = EvalSection(
        tasks=("gpqa", "gpqa_generative"), limit=3, max_new_tokens=4, gpqa=GPQASection(path=path, subset="diamond")
    )
    evaluate(sys.argv[1], section, Path(f"out-{number}"))
"""


def test_a_whole_run_leaves_no_piece_of_an_item_in_any_file_or_output(
    archive: Path, model: Any, tokenizer: Any, tmp_path: Path, withheld: Withheld
) -> None:
    """The home, temporary and cache folders of the process are its own, so that every file it writes is looked at."""
    archives = [archive, REAL] if REAL.is_file() else [archive]
    home = tmp_path / "home"
    checkpoint = home / "checkpoint"
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    given = [path for path in checkpoint.rglob("*") if path.is_file()]
    # XDG_CACHE_HOME stays: the kernel is not compiled once more, and nothing else here reads it.
    folders = {name: str(home) for name in ("HOME", "TMPDIR", "HF_HOME")}
    folders["XDG_CACHE_HOME"] = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    done = subprocess.run(
        [sys.executable, "-c", WHOLE_RUN, str(checkpoint), *map(str, archives)],
        cwd=home,
        env={**os.environ, **folders, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        check=False,
        timeout=200,
    )
    outputs = {"stdout": done.stdout, "stderr": done.stderr}
    with withheld():
        secret = pieces(TEXTS) if len(archives) == 1 else pieces(TEXTS) | pieces(texts_of(real(subset="diamond")))
        leaked = [name for name, content in outputs.items() if holds_a_piece(content, secret)]
        leaked += files_with_a_piece(home, secret, but=given)
    assert leaked == []
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    results = [
        home / f"out-{number}" / f"{task}.json"
        for number in range(len(archives))
        for task in ("gpqa", "gpqa_generative")
    ]
    assert all(path.is_file() for path in results)


def texts_of(section: EvalSection) -> list[str]:
    return [text for row in read_rows(section) for text in (row["Question"], *row["choices"])]
