from __future__ import annotations

import json
import random
import shutil
import sys
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from hymba_align.data.inspection import contamination
from hymba_align.data.inspection.contamination import (
    Benchmark,
    Item,
    NotCompared,
    Overlap,
    decrypt_gpqa,
    describe,
    example_runs,
    find_benchmarks,
    gpqa_items,
    make_benchmark,
)
from hymba_align.data.reading.examples import Conversation, Example, PlainText, Preference, QuestionAnswer
from hymba_align.errors import DataError

QUESTION = "Ana buys twelve red apples and gives three of them to her friend Ben on a Monday morning"
NINE_WORDS = "how many planets are there around the nearest star"


def benchmark(*texts: str, name: str = "GSM8K") -> Benchmark:
    return make_benchmark(
        name, [Item(f"line {number}", {"question": text}) for number, text in enumerate(texts, start=1)]
    )


def overlap(test_set: Benchmark, example: Example) -> Overlap | None:
    return test_set.overlap(example_runs(example))


def turns(*said: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 3, said, strict=False)]


@pytest.mark.parametrize(
    "example",
    [
        PlainText(f"Now, listen: {QUESTION}. And then?"),
        QuestionAnswer(QUESTION, "9"),
        QuestionAnswer("say it", QUESTION),
        QuestionAnswer("say it", "yes", QUESTION),
        Conversation(turns("hi", "hello", QUESTION, "9")),
        Preference(turns(QUESTION), turns("", "9")[1:], turns("", "8")[1:]),
        Preference(turns("say it"), turns("", QUESTION)[1:], turns("", "8")[1:]),
        Preference(turns("say it"), turns("", "8")[1:], turns("", QUESTION)[1:]),
    ],
    ids=["text", "question", "answer", "wrong answer", "later turn", "prompt", "chosen", "rejected"],
)
def test_a_test_item_is_found_wherever_it_stands_in_an_example(example: Example) -> None:
    assert overlap(benchmark("something else entirely", QUESTION), example) == Overlap(
        "GSM8K", "line 2, question", 6, 6, 0
    )


@pytest.mark.parametrize("escaped", [True, False])
def test_a_test_item_is_found_in_the_arguments_of_a_tool_call(escaped: bool) -> None:
    said = QUESTION.replace("Ana", "Änna")
    hidden = {"queries": [{"text": f"Solve:\n{said}\nPlease."}]}
    call = {"type": "function", "function": {"name": "ask", "arguments": json.dumps(hidden, ensure_ascii=escaped)}}
    calling = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    for example in (Conversation(calling), Preference(calling[:1], calling[1:], turns("", "8")[1:])):
        assert overlap(benchmark(said), example) == Overlap("GSM8K", "line 1, question", 6, 6, 0)
    nine = "ask how many planets around the nearest star there are"  # the call's name and its argument's words
    called = {"function": {"name": "ask", "arguments": '{"how": "many planets around the nearest star there are"}'}}
    example = Conversation([{"role": "assistant", "content": "", "tool_calls": [called]}])
    assert overlap(benchmark(nine), example) is not None


def test_thirteen_words_in_a_row_are_enough_and_twelve_are_not() -> None:
    said = QUESTION.split()
    test_set = benchmark(QUESTION)
    for start in range(len(said) - 12):
        assert overlap(test_set, PlainText("so " + " ".join(said[start : start + 13]) + " end")) == Overlap(
            "GSM8K", "line 1, question", 1, 6, 0
        )
    for start in range(len(said) - 11):
        assert overlap(test_set, PlainText("so " + " ".join(said[start : start + 12]) + " end")) is None


def test_case_punctuation_and_line_breaks_hide_nothing_but_another_number_does() -> None:
    test_set = benchmark("Tom pays 3 dollars for 4 pens, 5 rings and 6 cards at 7 a.m.")
    assert (
        overlap(test_set, PlainText("TOM pays $3 dollars\nfor 4 pens 5 rings — and 6 *cards* at (7 a.m.)")) is not None
    )
    assert overlap(test_set, PlainText("Tom pays 3 dollars for 4 pens, 5 rings and 8 cards at 7 a.m.")) is None


def test_words_of_two_messages_do_not_make_a_run() -> None:
    said = QUESTION.split()
    assert overlap(benchmark(QUESTION), Conversation(turns(" ".join(said[:9]), " ".join(said[9:])))) is None


def test_an_item_of_eight_to_twelve_words_is_looked_for_as_a_whole() -> None:
    test_set = benchmark(NINE_WORDS)
    assert test_set.too_short == 0
    whole = ("GSM8K", "line 1, question", 1, 1, 0)
    assert describe(Overlap(*whole)) == "it holds all of GSM8K's test set, line 1, question"
    assert overlap(test_set, PlainText(f"Tell me, {NINE_WORDS}, please?")) == Overlap(*whole)
    assert overlap(test_set, PlainText(NINE_WORDS.removesuffix(" star"))) is None


def test_items_of_fewer_than_eight_words_are_counted_and_not_compared() -> None:
    test_set = benchmark("how are you today my dear", NINE_WORDS, "")
    assert test_set.too_short == 2
    assert overlap(test_set, PlainText("how are you today my dear")) is None


def test_annotations_of_calculations_hide_nothing_on_either_side() -> None:
    with_them = "She sold 48/2 = <<48/2=24>>24 clips in May and 48+24 = <<48+24=72>>72 clips altogether in both months"
    without = "She sold 48/2 = 24 clips in May and 48+24 = 72 clips altogether in both months"
    for in_test, in_training in ((with_them, without), (without, with_them), (with_them, with_them)):
        found = overlap(benchmark(in_test), PlainText(in_training))
        assert found is not None
        assert found.share == 1


def test_the_item_of_which_most_is_held_is_named_and_the_others_are_counted() -> None:
    said = QUESTION.split()
    longer = " ".join([*said, *(f"more{number}" for number in range(20))])
    test_set = benchmark("nothing of this", longer, QUESTION)
    found = overlap(test_set, PlainText(QUESTION))
    assert found == Overlap("GSM8K", "line 3, question", 6, 6, 1)
    assert describe(found) == (
        "it holds 6 of the 6 runs of 13 words in GSM8K's test set, line 3, question (100 %); also parts of 1 other item"
    )


def test_a_run_that_several_items_share_counts_for_each() -> None:
    test_set = benchmark(f"{QUESTION} first", f"{QUESTION} second")
    assert overlap(test_set, PlainText(QUESTION)) == Overlap("GSM8K", "line 1, question", 6, 7, 1)


def test_a_test_set_is_found_in_itself_and_random_texts_share_nothing_with_it() -> None:
    rng = random.Random(0)
    vocabulary = [f"w{number}" for number in range(300)]
    texts = [" ".join(rng.choices(vocabulary, k=rng.randint(8, 60))) for _ in range(400)]
    test_set = benchmark(*texts)
    assert all(found is not None and found.share == 1 for found in (overlap(test_set, PlainText(one)) for one in texts))
    assert not any(
        overlap(test_set, PlainText(" ".join(rng.choices(vocabulary, k=200)))) is not None for _ in range(400)
    )


def test_a_benchmark_without_items_or_a_row_without_words_overlaps_with_nothing() -> None:
    assert overlap(make_benchmark("GSM8K", []), PlainText(QUESTION)) is None
    assert overlap(benchmark(QUESTION), PlainText("")) is None
    assert overlap(benchmark(QUESTION), PlainText("\ud800 \x00")) is None


# ---- where test sets are found -----------------------------------------------------------------------------------------


def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contamination, "BFCL_PACKAGE", "no_such_package_here")


def gsm8k_file(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def only(name: str, found: tuple[Benchmark | NotCompared, ...]) -> Benchmark | NotCompared:
    (one,) = (one for one in found if one.name == name)
    return one


def test_gsm8k_is_compared_by_question_and_by_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_package(monkeypatch)
    answer = "First we add the nine apples to the eleven pears that lie in the big basket, which gives twenty"
    file = gsm8k_file(tmp_path / "test.jsonl", {"question": QUESTION, "answer": answer})
    test_set = only("GSM8K", find_benchmarks(file))
    assert isinstance(test_set, Benchmark)
    for name, said in (("question", QUESTION), ("answer", answer)):
        found = overlap(test_set, PlainText(said))
        assert found is not None
        assert (found.part, found.share) == (f"line 1, {name}", 1)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (['{"question": '], "{file}:1: malformed JSON"),
        ([{"question": "q", "answer": "a"}, {"text": "t"}], "{file}:2: the row has no question and answer; name a file in GSM8K's format"),
        (["[1]"], "{file}:1: the row has no question and answer; name a file in GSM8K's format"),
    ],
)  # fmt: skip
def test_a_gsm8k_file_that_cannot_be_used_is_not_compared_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Any], reason: str
) -> None:
    no_package(monkeypatch)
    file = gsm8k_file(tmp_path / "test.jsonl", *rows)
    assert only("GSM8K", find_benchmarks(file)) == NotCompared(
        "GSM8K", reason.format(file=file), "set eval.gsm8k.test_path to GSM8K's test.jsonl"
    )


def test_what_is_not_at_hand_is_named_with_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_package(monkeypatch)
    missing = tmp_path / "no.jsonl"
    assert find_benchmarks(missing) == (
        NotCompared(
            "GSM8K",
            f"{missing}: the file cannot be read (FileNotFoundError)",
            "set eval.gsm8k.test_path to GSM8K's test.jsonl",
        ),
        NotCompared("GPQA", "no file of it was named", "get dataset.zip from github.com/idavidrein/gpqa and name it"),
        NotCompared("BFCL", "its grader, which ships the data, is not installed", "hymba-align install-bfcl"),
    )


def test_without_a_file_gsm8k_comes_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from hymba_align.data.reading import sources

    asked = []

    def read_hub(repository: str, what_to_do: str, **options: Any) -> list[dict[str, str]]:
        asked.append((repository, options))
        return [{"question": QUESTION, "answer": "#### 9"}]

    no_package(monkeypatch)
    monkeypatch.setattr(sources, "read_hub", read_hub)
    test_set = only("GSM8K", find_benchmarks())
    assert isinstance(test_set, Benchmark)
    assert asked == [("openai/gsm8k", {"name": "main", "split": "test"})]
    assert overlap(test_set, PlainText(QUESTION)) == Overlap("GSM8K", "row 1, question", 6, 6, 0)


@pytest.mark.parametrize("forbidden", [True, False])
def test_a_hub_out_of_reach_is_asked_once_and_means_not_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, forbidden: bool
) -> None:
    import datasets
    from huggingface_hub import HfApi

    asked = []

    def without_network(self: Any, name: str, *, timeout: float, **given: Any) -> Any:
        asked.append((name, given, timeout))
        raise type("ConnectError", (Exception,), {"__module__": "httpx2"})("Name or service not known")

    no_package(monkeypatch)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", forbidden)
    monkeypatch.setenv("HF_HUB_OFFLINE", str(int(forbidden)))
    monkeypatch.setattr(HfApi, "repo_info", without_network)
    why = "HF_HUB_OFFLINE forbids to fetch it" if forbidden else "the hub does not answer within 3 s: ConnectError"
    assert only("GSM8K", find_benchmarks()) == NotCompared(
        "GSM8K", f"openai/gsm8k is not in the cache, and {why}", "set eval.gsm8k.test_path to GSM8K's test.jsonl"
    )
    assert asked == ([] if forbidden else [("openai/gsm8k", {"repo_type": "dataset"}, 3.0)])
    assert datasets.config.HF_HUB_OFFLINE is forbidden


def test_a_hub_that_answers_is_read_where_the_cache_has_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    from hymba_align import hub
    from hymba_align.data.reading import sources

    def read_hub(repository: str, what_to_do: str, **options: Any) -> list[dict[str, str]]:
        if datasets.config.HF_HUB_OFFLINE:
            raise DataError(f"{repository} cannot be read; {what_to_do}")
        return [{"question": QUESTION, "answer": "#### 9"}]

    no_package(monkeypatch)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "hub_problem", lambda name, kind: None)
    monkeypatch.setattr(sources, "read_hub", read_hub)
    test_set = only("GSM8K", find_benchmarks())
    assert isinstance(test_set, Benchmark)
    assert test_set.items == 1


# ---- GPQA --------------------------------------------------------------------------------------------------------------

SECRET = "the unspeakable question that nobody but its authors may ever read in the open or anywhere else"
TABLE = f'Question,Explanation,Record ID\n"{SECRET}","because, as it is, ""so"" and not otherwise in any of the known cases",r1\n'


def gpqa_zip(path: Path, table: str = TABLE, member: str = "dataset/gpqa_extended.csv") -> Path:
    """Not encrypted, since zipfile cannot write such archives; a password is then not used."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, table)
    return path


def test_gpqa_is_compared_and_a_finding_names_the_item_s_number_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_package(monkeypatch)
    before = sorted(tmp_path.rglob("*"))
    test_set = only("GPQA", find_benchmarks(tmp_path / "no", gpqa_zip(tmp_path / "dataset.zip")))
    assert isinstance(test_set, Benchmark)
    found = overlap(test_set, PlainText(f"I know {SECRET}"))
    assert found is not None
    assert describe(found) == "it holds 5 of the 5 runs of 13 words in GPQA's test set, item 1, question (100 %)"
    assert "unspeakable" not in repr(test_set) + repr(vars(test_set)) + describe(found)
    assert sorted(tmp_path.rglob("*")) == [*before, tmp_path / "dataset.zip"]


def test_an_item_never_shows_its_text() -> None:
    items = gpqa_items(TABLE)
    assert items is not None
    assert repr(items) == "[Item('item 1')]"
    assert items[0].texts["question"] == SECRET


@pytest.mark.parametrize(
    ("table", "member", "reason"),
    [
        (TABLE, "dataset/other.csv", "{file}: the archive has no dataset/gpqa_extended.csv"),
        (f"Q,E\n{SECRET},x\n", "dataset/gpqa_extended.csv", "{file}: dataset/gpqa_extended.csv has no columns Question and Explanation"),
        ("", "dataset/gpqa_extended.csv", "{file}: dataset/gpqa_extended.csv has no columns Question and Explanation"),
    ],
)  # fmt: skip
def test_a_gpqa_archive_that_is_another_is_not_compared_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: str, member: str, reason: str
) -> None:
    no_package(monkeypatch)
    file = gpqa_zip(tmp_path / "dataset.zip", table, member)
    found = only("GPQA", find_benchmarks(tmp_path / "no", file))
    assert isinstance(found, NotCompared)
    assert found.reason == reason.format(file=file)


def test_an_archive_that_is_none_or_cannot_be_decrypted_is_an_error_without_its_content(tmp_path: Path) -> None:
    file = tmp_path / "dataset.zip"
    assert str(decrypt_gpqa(file)) == f"{file}: no such file"
    file.write_bytes(b"no archive")
    assert str(decrypt_gpqa(file)) == f"{file}: not GPQA's archive, or not with its authors' password"
    archive = bytearray(gpqa_zip(file).read_bytes())
    archive[6] |= 1  # the flag for encryption, in the file's header and in the directory
    archive[archive.index(b"PK\x01\x02") + 8] |= 1
    file.write_bytes(bytes(archive))
    error = decrypt_gpqa(file)
    assert str(error) == f"{file}: not GPQA's archive, or not with its authors' password"
    assert isinstance(error, DataError)
    assert (error.__context__, error.__cause__, error.__traceback__) == (None, None, None)


def test_the_real_archive_is_decrypted_and_all_items_are_compared(
    shared: Path, monkeypatch: pytest.MonkeyPatch, withheld: Callable[[], AbstractContextManager[None]]
) -> None:
    no_package(monkeypatch)
    with withheld():
        test_set = only("GPQA", find_benchmarks("no", shared / "data" / "gpqa" / "dataset.zip"))
        assert isinstance(test_set, Benchmark)
        counts = (test_set.items, test_set.too_short)
    assert counts == (546, 0)


# ---- BFCL --------------------------------------------------------------------------------------------------------------


def bfcl_package(folder: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> Path:
    """A package of that layout, which fails when it is imported."""
    data = folder / "fake_bfcl" / "data"
    (data / "possible_answer").mkdir(parents=True)
    (folder / "fake_bfcl" / "__init__.py").write_text("raise RuntimeError('imported')")
    for name, content in files.items():
        (data / name).write_text(content, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(contamination, "BFCL_PACKAGE", "fake_bfcl")
    return data


def bfcl_row(name: str, *turns_of_question: str) -> str:
    question = [
        [{"role": "system", "content": QUESTION}, {"role": "user", "content": turn}] for turn in turns_of_question
    ]
    return json.dumps({"id": name, "question": question, "function": [{"name": "f", "description": QUESTION}]}) + "\n"


def test_bfcl_is_read_from_the_installed_package_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = "please move every report of the last quarter into the archive folder and sort them by name"
    bfcl_package(
        tmp_path,
        monkeypatch,
        {
            "BFCL_v4_multi_turn_base.json": bfcl_row("multi_turn_base_0", "hello", asked) + bfcl_row("multi_turn_base_1", "hi"),
            "BFCL_v4_format_sensitivity.json": '{\n    "simple_python": ["simple_python_58"]\n}\n',
            "possible_answer/BFCL_v4_multi_turn_base.json": '{"id": "multi_turn_base_0", "ground_truth": []}\n',
        },
    )  # fmt: skip
    test_set = only("BFCL", find_benchmarks("no"))
    assert isinstance(test_set, Benchmark)
    assert (test_set.items, test_set.too_short) == (2, 1)
    found = overlap(test_set, PlainText(asked))
    assert found is not None
    assert (found.part, found.share) == ("multi_turn_base_0, user turn 2", 1)
    assert overlap(test_set, PlainText(QUESTION)) is None  # descriptions and system messages are not questions
    assert "fake_bfcl" not in sys.modules


def test_bfcl_is_read_from_the_environment_of_its_grader_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bfcl_package(tmp_path / "here", monkeypatch, {"BFCL_v4_x.json": bfcl_row("here_0", QUESTION)})
    environment = tmp_path / "bfcl-eval"
    for packages in ("lib/python3.11/site-packages", "Lib/site-packages"):
        data = bfcl_package(environment / packages, monkeypatch, {"BFCL_v4_x.json": bfcl_row("there_0", QUESTION)})
        test_set = only("BFCL", find_benchmarks("no", bfcl_environment=environment))
        assert isinstance(test_set, Benchmark)
        assert test_set.part_names == ("there_0, user turn 1",)
        (data / "BFCL_v4_x.json").write_text("")
        assert only("BFCL", find_benchmarks("no", bfcl_environment=environment)) == NotCompared(
            "BFCL", f"{data} holds no questions", f"remove {environment}, and run 'hymba-align install-bfcl'"
        )
        shutil.rmtree(environment)
    assert "fake_bfcl" not in sys.modules
    test_set = only("BFCL", find_benchmarks("no", bfcl_environment=environment))
    assert isinstance(test_set, Benchmark)
    assert test_set.part_names == ("here_0, user turn 1",)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "{data} holds no questions"),
        ({"BFCL_v4_x.json": bfcl_row("x_0", "a") + "{bad\n"}, "{data}/BFCL_v4_x.json:2: malformed JSON"),
        ({"BFCL_v4_x.json": '{"id": "x_0", "question": [["a"]]}\n'}, "{data}/BFCL_v4_x.json:1: not an item of BFCL as bfcl-eval writes them"),
    ],
)  # fmt: skip
def test_a_broken_bfcl_package_is_not_compared_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], reason: str
) -> None:
    data = bfcl_package(tmp_path, monkeypatch, files)
    assert only("BFCL", find_benchmarks("no")) == NotCompared(
        "BFCL", reason.format(data=data), "pip install --no-deps bfcl-eval --force-reinstall"
    )


# ---- real sets ---------------------------------------------------------------------------------------------------------


def gsm8k_rows(shared: Path, name: str) -> list[QuestionAnswer]:
    lines = (shared / "data" / "gsm8k" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [QuestionAnswer(row["question"], row["answer"]) for row in map(json.loads, lines)]


def test_every_row_of_gsm8k_s_test_set_is_found_and_few_of_its_training_set(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_package(monkeypatch)
    test_set = only("GSM8K", find_benchmarks(shared / "data" / "gsm8k" / "test.jsonl"))
    assert isinstance(test_set, Benchmark)
    in_test = [overlap(test_set, row) for row in gsm8k_rows(shared, "test")]
    assert all(found is not None and found.share == 1 for found in in_test)
    in_train = [found for found in (overlap(test_set, row) for row in gsm8k_rows(shared, "train")) if found]
    assert len(in_train) == 7  # of 7,473; none holds a whole question or answer
    assert max(found.share for found in in_train) < 0.6
