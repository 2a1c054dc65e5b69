"""What is read for an inspection: the stages' own conversations and pairs, chosen by what they say."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hymba_align.data.prepare import prepare_sft
from hymba_align.data.rendering import render
from hymba_align.data.template import load_tokenizer
from hymba_align.errors import DataError
from hymba_align.inside.texts import Texts, document_of_text, read_texts
from hymba_align.recipe import DataSection, SourceSection

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "data" / "arithmetic" / "tokenizer"
TEST_SET = "data/arithmetic/test.jsonl"
Write = Callable[..., Path]
ASKED = [{"role": "user", "content": "How many?"}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(str(TOKENIZER))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def rows_to_file(*rows: dict[str, Any], name: str = "d.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return rows_to_file


def read(data: Any, tokenizer: Any, documents: int = 100, max_length: int = 256, **settings: Any) -> Texts:
    return read_texts(data, tokenizer, documents=documents, max_length=max_length, seed=1, **settings)


def shipped_rows(count: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ROOT / TEST_SET).read_text().splitlines()[:count]]


def conversation(*turns: str) -> list[dict[str, str]]:
    return [{"role": "user" if place % 2 == 0 else "assistant", "content": text} for place, text in enumerate(turns)]


def text_of(ids: Any, tokenizer: Any) -> str:
    return str(tokenizer.decode(list(ids)))


# ---- which rows ------------------------------------------------------------------------------------------------------


def test_the_same_documents_are_chosen_in_whatever_order_the_file_has_them(write: Write, tokenizer: Any) -> None:
    rows = shipped_rows(60)
    shuffled = random.Random(0).sample(rows, len(rows))
    assert shuffled != rows
    first, second = (
        read(write(*given, name=name), tokenizer, documents=8)
        for given, name in ((rows, "a.jsonl"), (shuffled, "b.jsonl"))
    )
    assert [one.token_ids for one in first.documents] == [one.token_ids for one in second.documents]
    assert [one.chosen_ids for one in first.pairs] == [one.chosen_ids for one in second.pairs]
    assert len(first.documents) == len(first.pairs) == 8


def test_they_are_not_the_first_of_the_file_and_another_seed_chooses_others(tokenizer: Any) -> None:
    chosen = [read_texts(TEST_SET, tokenizer, documents=20, max_length=256, seed=seed).documents for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1]
    lines = [{int(one.name.rpartition(":")[2]) for one in documents} for documents in chosen]
    assert all(max(numbers) > 100 for numbers in lines)
    assert len(lines[0] & lines[2]) < 10


def test_a_sections_own_seed_comes_before_the_recipes(tokenizer: Any) -> None:
    own, recipes = (
        read_texts(DataSection(path=TEST_SET, seed=own), tokenizer, documents=5, max_length=256, seed=seed)
        for own, seed in ((2, 1), (None, 2))
    )
    assert own.documents == recipes.documents
    assert own.pairs == recipes.pairs


def test_fewer_rows_than_wanted_are_all_taken(write: Write, tokenizer: Any) -> None:
    found = read(write(*shipped_rows(5)), tokenizer)
    assert (found.rows, len(found.documents), len(found.pairs)) == (5, 5, 5)
    assert not any(pair.is_made for pair in found.pairs), "the shipped rows bring their wrong answers"


def test_wrong_answers_that_were_made_are_told_from_those_that_a_row_has(write: Write, tokenizer: Any) -> None:
    rows = shipped_rows(3)
    del rows[1]["wrong_answer"]
    found = read(write(*rows), tokenizer)
    assert sorted((pair.name[-1], pair.is_made) for pair in found.pairs) == [("1", False), ("2", True), ("3", False)]
    assert "3 pairs, 1 with a wrong answer made for it" in found.summary()


def test_held_out_rows_are_those_that_the_stage_keeps_from_training(tokenizer: Any) -> None:
    section = DataSection(path=TEST_SET, validation_fraction=0.2, keep_fraction=0.7)
    prepared = prepare_sft(section, tokenizer, 256, seed=1)
    assert prepared.validation is not None
    found = read(section, tokenizer, held_out=True)
    assert sorted(one.token_ids for one in found.documents) == sorted(map(tuple, prepared.validation["input_ids"][:]))
    assert 5 < len(found.documents) < 100


def test_without_held_out_rows_the_message_says_what_to_set(tokenizer: Any) -> None:
    with pytest.raises(DataError) as error:
        read(DataSection(path=TEST_SET), tokenizer, held_out=True)
    assert str(error.value) == (
        "data/arithmetic/test.jsonl: no row gives a document to look at: data.validation_fraction is 0, which keeps none "
        "for validation; raise it, or name a file of texts that were not trained on"
    )


# ---- documents -------------------------------------------------------------------------------------------------------


def test_a_document_is_what_sft_trains_on_with_the_assistants_tokens_scored(write: Write, tokenizer: Any) -> None:
    (row,) = shipped_rows(1)
    (document,) = read(write(row), tokenizer).documents
    rendered = render(tokenizer, conversation(row["question"], row["answer"]))
    assert document.token_ids == tuple(rendered.input_ids)
    assert document.scored == tuple(map(bool, rendered.assistant_mask))
    assert document.name.endswith("d.jsonl:1")


def test_questions_are_asked_and_joined_as_the_section_says(write: Write, tokenizer: Any) -> None:
    path = write(*shipped_rows(6))
    section = DataSection(path=str(path), question_format="Question: {question}", examples_per_conversation=3)
    found = read(section, tokenizer, max_length=512)
    texts = [text_of(one.token_ids, tokenizer) for one in found.documents]
    assert [text.count("Question: ") for text in texts] == [3, 3]
    assert len(found.pairs) == 6
    solved = [text_of(one.prompt_ids, tokenizer).count("#### ") for one in found.pairs]
    assert max(solved) == 2, "the prompt of a pair begins with earlier questions, as DPO's does"


def test_questions_are_joined_with_those_of_their_own_source(write: Write, tokenizer: Any) -> None:
    rows = shipped_rows(24)
    paths = [write(*rows[start : start + 12], name=f"{start}.jsonl") for start in (0, 12)]
    sources = tuple(SourceSection(path=str(path), examples_per_conversation=3) for path in paths)
    found = read(DataSection(sources=sources), tokenizer, max_length=512)
    texts = [text_of(one.token_ids, tokenizer) for one in found.documents]
    assert [text.count("#### ") for text in texts] == [3] * 8


def test_of_a_preference_the_chosen_conversation_is_the_document_and_its_reply_alone_is_scored(
    write: Write, tokenizer: Any
) -> None:
    prompt = conversation("Ana has 2 coins.", "I see.", "How many does Ana have?")
    row = {"prompt": prompt, "chosen": "Ana has 2 coins.", "rejected": "Ben has 5."}
    found = read(write(row), tokenizer)
    (document,), (pair,) = found.documents, found.pairs
    assert not pair.is_made
    assert document.token_ids == pair.prompt_ids + pair.chosen_ids
    scored = tuple(token for token, flag in zip(document.token_ids, document.scored, strict=True) if flag)
    assert scored == pair.chosen_ids
    assert text_of(pair.rejected_ids, tokenizer) == "Ben has 5.</s>"


def test_every_token_of_a_text_is_scored_and_what_is_too_long_is_cut_and_told(write: Write, tokenizer: Any) -> None:
    path = write({"text": "Ana has 2 coins. " * 40}, {"text": "Ben buys 3 books."})
    found = read(path, tokenizer, max_length=50)
    assert sorted(len(one.token_ids) for one in found.documents)[1] == 50
    assert all(all(one.scored) for one in found.documents)
    assert found.pairs == ()
    assert [(one.place, one.reason) for one in found.shortened] == [
        (f"{path}:1", "all but the first 50 tokens of the text were cut away")
    ]
    assert found.summary() == (
        f"2 documents chosen from 2 rows of {path}; 1 shortened (first {path}:1: all but the first 50 tokens of the text "
        "were cut away)"
    )


def test_where_a_row_does_not_fit_another_takes_its_place_and_the_loss_is_told(write: Write, tokenizer: Any) -> None:
    rows = shipped_rows(10)
    for row in rows[:5]:
        row["question"] = "How many coins? " * 60
    found = read(write(*rows), tokenizer, documents=5, max_length=150)
    assert len(found.documents) == 5
    reasons = {one.reason for one in found.left_out}
    assert reasons <= {
        "the turns up to the assistant's first answer are longer than max_length=150; raise max_length or shorten them"
    }
    assert all(len(one.prompt_ids) + len(one.chosen_ids) <= 150 for one in found.pairs)


def test_rows_that_cannot_be_read_are_told_and_none_at_all_is_an_error(write: Write, tokenizer: Any) -> None:
    good, bad = shipped_rows(1)[0], {"question": "", "answer": "1"}
    found = read(write(good, bad), tokenizer)
    assert [one.reason for one in found.left_out] == ["the column 'question' is empty; fill it in or remove the row"]
    assert found.summary() == f"1 document chosen from 1 row of {found.source}; 1 pair; 1 row left out"
    assert found.why_left_out() == [f"1 lost (the column 'question' is empty, first {found.source}:2)"]
    path = write({"question": "How many?", "answer": "2"}, name="long.jsonl")
    with pytest.raises(DataError) as error:
        read(path, tokenizer, max_length=5)
    assert str(error.value) == (
        f"{path}:1: the turns up to the assistant's first answer are longer than max_length=5; raise max_length or shorten "
        "them"
    )


def test_a_row_without_a_possible_pair_is_a_document_and_the_summary_says_why_it_is_no_more(
    write: Write, tokenizer: Any
) -> None:
    path = write({"question": "Who has coins?", "answer": "Ana."})
    found = read(path, tokenizer)
    assert (len(found.documents), found.pairs) == (1, ())
    assert found.summary() == (
        f"1 document chosen from 1 row of {path}; no pair from 1 row (the answer does not end in a line '#### <number>', "
        f"first {path}:1)"
    )


def test_rows_of_a_converter_may_be_of_any_schema(
    write: Write, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_rows.py").write_text(
        "def convert(row):\n"
        "    if row['kind'] == 'text':\n"
        "        return {'text': 'Ana has coins.'}\n"
        "    return {'prompt': 'How many?', 'chosen': 'Ana has 2.', 'rejected': 'Ben has 3.'}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    section = DataSection(path=str(write({"kind": "text"}, {"kind": "pair"})), convert="own_rows:convert")
    found = read(section, tokenizer)
    assert (len(found.documents), len(found.pairs)) == (2, 1)


def test_a_template_that_does_not_mark_the_assistant_is_refused_unless_all_rows_are_texts(write: Write) -> None:
    unmarked = load_tokenizer(str(TOKENIZER))
    unmarked.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    assert len(read(write({"text": "Ana has coins."}), unmarked).documents) == 1
    with pytest.raises(DataError) as error:
        read(TEST_SET, unmarked)
    assert str(error.value) == (
        "the chat template does not mark what the assistant writes ({% generation %}), so nothing would be scored; use "
        "chat_template: hymba"
    )


def test_a_text_of_ones_own_is_a_document_unless_it_is_empty(tokenizer: Any) -> None:
    document, cut = document_of_text("Ana has 2 coins.", "mine.txt", tokenizer, max_length=50)
    assert text_of(document.token_ids, tokenizer).endswith("Ana has 2 coins.</s>")
    assert (all(document.scored), cut) == (True, None)
    with pytest.raises(DataError) as error:
        document_of_text(" \n", "mine.txt", tokenizer, max_length=50)
    assert str(error.value) == "mine.txt: the text is empty; write something into it"


def test_of_a_text_that_is_too_long_the_beginning_is_read_and_told(tokenizer: Any) -> None:
    text = "Ana has 2 coins. " * 20
    whole, _ = document_of_text(text, "mine.txt", tokenizer, max_length=500)

    document, cut = document_of_text(text, "mine.txt", tokenizer, max_length=50)

    assert (document.token_ids, len(document.scored)) == (whole.token_ids[:50], 50)
    assert cut is not None
    assert (cut.place, cut.reason) == ("mine.txt", "its first 50 of 103 tokens are read")


def test_a_text_file_is_one_document(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("Ana has 2 coins. " * 20)

    found = read(file, tokenizer, max_length=50)

    assert [len(document.token_ids) for document in found.documents] == [50]
    assert found.summary() == (
        f"1 document chosen from 1 row of {file}; 1 shortened (first {file}: its first 50 of 103 tokens are read)"
    )


# ---- rows that say the same ------------------------------------------------------------------------------------------


def test_of_rows_that_say_nearly_the_same_one_counts_where_each_has_to_be_a_document_of_its_own(
    write: Write, tokenizer: Any
) -> None:
    said = "Ana has two coins and Ben has three books and Mia buys four pens in the shop by the river on a cold morning"
    other = (
        "The tallest of the four lighthouses on the northern coast was built by people from the nearest fishing village"
    )
    path = write({"text": said}, {"text": f"{said} again"}, {"text": other}, {"text": said})

    texts = [read(path, tokenizer, distinct=distinct) for distinct in (False, True)]

    assert [len(one.documents) for one in texts] == [4, 2]
    assert texts[0].left_out == ()
    assert {one.name for one in texts[1].documents} & {f"{path}:3"}
    assert sorted(one.reason.partition(":")[0] for one in texts[1].left_out) == [
        "it says nearly the same as another row",
        "it says the same as another row",
    ]


def test_a_row_that_stands_often_takes_no_place_of_others(write: Write, tokenizer: Any) -> None:
    path = write(*[{"text": "Ana has two coins."}] * 60, *({"text": f"Ben has {n} pens."} for n in range(8)))

    texts = read(path, tokenizer, documents=8, distinct=True)

    assert len(texts.documents) == 8
    assert len([one for one in texts.left_out if one.reason == "it says the same as another row"]) == 59
