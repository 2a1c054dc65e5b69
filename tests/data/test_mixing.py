"""Several sources, shares of them, validation, streams, and the same rows whatever the number of processes."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hymba_align.data.prepare import prepare_preferences, prepare_sft
from hymba_align.errors import DataError
from hymba_align.recipe import DataSection, SourceSection


def write(path: Path, name: str, count: int) -> str:
    rows = [{"question": f"{name} {number}", "answer": f"{name}{number}\n#### {number}"} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def places(dataset: Any) -> list[str]:
    return [Path(place).name for place in dataset["place"]]


@pytest.fixture
def two(tmp_path: Path) -> tuple[str, str]:
    return write(tmp_path / "a.jsonl", "apple", 30), write(tmp_path / "b.jsonl", "berry", 10)


def test_sources_are_counted_apart_and_mixed_by_the_seed(small: Any, two: tuple[str, str]) -> None:
    section = DataSection(sources=tuple(SourceSection(path=path) for path in two))
    prepared = prepare_sft(section, small, 512, seed=3)
    assert [(source.name, source.rows_read, source.rows_kept) for source in prepared.sources] == [
        (two[0], 30, 30),
        (two[1], 10, 10),
    ]
    order = places(prepared.dataset)
    assert sorted(order) == sorted(
        [f"a.jsonl:{line}" for line in range(1, 31)] + [f"b.jsonl:{line}" for line in range(1, 11)]
    )
    assert order != sorted(order, key=lambda place: (place[0], int(place.split(":")[1]))), "not mixed"
    assert places(prepare_sft(section, small, 512, seed=3).dataset) == order
    assert places(prepare_sft(section, small, 512, seed=4).dataset) != order
    own_seed = section.model_copy(update={"seed": 3})
    assert places(prepare_sft(own_seed, small, 512, seed=4).dataset) == order
    lines = prepared.summary().splitlines()
    assert lines[0].startswith(f"{two[0]}: 30 of 30 rows kept in 30 conversations; ")
    assert lines[-1].startswith("together: 40 conversations; ")


def test_a_repeated_source_comes_that_many_times_and_its_tokens_too(small: Any, two: tuple[str, str]) -> None:
    once = prepare_sft(DataSection(path=two[1]), small, 512, seed=0)
    section = DataSection(sources=(SourceSection(path=two[0]), SourceSection(path=two[1], repeat=3)))
    prepared = prepare_sft(section, small, 512, seed=0)
    counted = Counter(places(prepared.dataset))
    assert {counted[f"a.jsonl:{line}"] for line in range(1, 31)} == {1}
    assert {counted[f"b.jsonl:{line}"] for line in range(1, 11)} == {3}
    assert prepared.total_tokens == sum(map(len, prepared.dataset["input_ids"]))
    assert prepared.trained_tokens == sum(map(sum, prepared.dataset["assistant_masks"]))
    assert prepared.sources[1].total_tokens == once.total_tokens
    assert "10 of 10 rows kept in 10 conversations, 3 times; " in prepared.summary()


def test_keep_fraction_keeps_about_that_share_by_content_and_seed(small: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "apple", 1000)
    kept = {}
    for seed in (0, 1):
        prepared = prepare_sft(DataSection(path=path, keep_fraction=0.3), small, 512, seed=seed)
        kept[seed] = set(places(prepared.dataset))
        assert 240 < len(kept[seed]) < 360
        assert prepared.sources[0].rows_not_chosen == 1000 - len(kept[seed])
        assert f"{1000 - len(kept[seed]):,} not chosen by keep_fraction" in prepared.summary()
    assert kept[0] != kept[1]
    longer = write(tmp_path / "a.jsonl", "apple", 1300)
    more = prepare_sft(DataSection(path=longer, keep_fraction=0.3), small, 512, seed=0)
    assert {place for place in places(more.dataset) if int(place.split(":")[1]) <= 1000} == kept[0]


def test_why_nothing_is_left_is_said(small: Any, two: tuple[str, str]) -> None:
    with pytest.raises(
        DataError, match=r"a\.jsonl: none of the 30 rows is left for training: 30 not chosen by keep_fraction$"
    ):
        prepare_sft(DataSection(path=two[0], keep_fraction=1e-9), small, 512, seed=0)
    with pytest.raises(DataError, match=r"none of the 30 rows is left for training: 30 for validation$"):
        prepare_sft(DataSection(path=two[0], validation_fraction=1 - 1e-9), small, 512, seed=0)


def test_max_rows_reads_the_first_rows(small: Any, two: tuple[str, str]) -> None:
    prepared = prepare_sft(DataSection(path=two[0], max_rows=4), small, 512, seed=0)
    assert places(prepared.dataset) == [f"a.jsonl:{line}" for line in (1, 2, 3, 4)]


def test_validation_is_chosen_by_content_so_that_new_rows_move_no_old_one(small: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [json.dumps({"question": f"q {number}", "answer": f"{number}"}) + "\n" for number in range(600)]
    sides: list[dict[str, bool]] = []
    for order in (rows[:400], rows, list(reversed(rows))):
        path.write_text("".join(order))
        prepared = prepare_sft(DataSection(path=str(path), validation_fraction=0.1), small, 512, seed=len(sides))
        assert prepared.validation is not None
        side = {}
        for held_out, dataset in ((False, prepared.dataset), (True, prepared.validation)):
            side.update({small.decode(ids): held_out for ids in dataset["input_ids"]})
        assert len(side) == len(order), "a row is on both sides, or on none"
        sides.append(side)
        assert 0.05 < sum(side.values()) / len(side) < 0.15
    assert all(sides[1][text] == held_out for text, held_out in sides[0].items())
    assert sides[1] == sides[2]


def test_pairs_of_one_prompt_are_on_one_side(small: Any, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    rows = [
        {"prompt": f"p {number}", "chosen": f"c {answer}", "rejected": f"r {answer}"}
        for number in range(60)
        for answer in range(3)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = prepare_preferences(DataSection(path=str(path), validation_fraction=0.2), small, 512, seed=0)
    assert prepared.validation is not None
    prompts = [{row["prompt"][0]["content"] for row in side} for side in (prepared.dataset, prepared.validation)]
    assert not prompts[0] & prompts[1]
    assert len(prepared.dataset) + len(prepared.validation) == 180
    assert len(prompts[1]) > 3


def test_a_validation_share_that_chooses_nothing_is_an_error(small: Any, two: tuple[str, str]) -> None:
    with pytest.raises(
        DataError, match=r"validation_fraction is 1e-09, which chose none of 30 rows for validation; raise"
    ):
        prepare_sft(DataSection(path=two[0], validation_fraction=1e-9), small, 512, seed=0)


@pytest.mark.parametrize("most", [1, 4])
def test_the_same_rows_in_the_same_order_whatever_the_number_of_processes(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    import datasets

    paths = [write(tmp_path / f"{name}.jsonl", name, 2600) for name in ("a", "b")]
    results = []
    for workers in (1, 2, 3):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / f"cache{workers}")
        section = DataSection(
            sources=tuple(
                SourceSection(path=path, keep_fraction=0.9, examples_per_conversation=most) for path in paths
            ),
            workers=workers,
            validation_fraction=0.05,
        )
        prepared = prepare_sft(section, small, 256, seed=5)
        assert prepared.validation is not None
        results.append((prepared.dataset.to_list(), prepared.validation.to_list(), prepared.sources))
    assert results[0] == results[1] == results[2]


def test_a_stream_gives_the_rows_of_the_set_that_is_read_before_training(small: Any, two: tuple[str, str]) -> None:
    read = prepare_sft(DataSection(path=two[0]), small, 512, seed=0)
    stream = prepare_sft(DataSection(path=two[0], streaming=True), small, 512, seed=0)
    assert list(stream.dataset) == read.dataset.to_list()
    assert stream.sources == ()
    both = DataSection(sources=tuple(SourceSection(path=path) for path in two), streaming=True)
    mixed = [Path(row["place"]).name for row in prepare_sft(both, small, 512, seed=0).dataset]
    assert len(set(mixed)) == len(mixed) == 40
    assert [Path(row["place"]).name for row in prepare_sft(both, small, 512, seed=0).dataset] == mixed


def test_a_stream_stops_at_a_bad_row_or_counts_it(small: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "apple", 3)
    with open(path, "a") as file:
        file.write("{broken\n")
    with pytest.raises(DataError, match=r"a\.jsonl:4: malformed JSON"):
        list(prepare_sft(DataSection(path=path, streaming=True), small, 512, seed=0).dataset)
    allowed = DataSection(path=path, streaming=True, bad_rows="drop")
    prepared = prepare_sft(allowed, small, 512, seed=0)
    assert len(list(prepared.dataset)) == 3
    (counted,) = prepared.counted()
    assert (counted.rows_read, counted.rows_kept, len(counted.lost)) == (4, 3, 1)


def test_what_streams_cannot_do_is_refused(small: Any, two: tuple[str, str]) -> None:
    with pytest.raises(
        DataError, match=r"data.validation_fraction needs a set that is read before training; set it to 0, or data.str"
    ):
        prepare_sft(DataSection(path=two[0], streaming=True, validation_fraction=0.1), small, 512, seed=0)
    with pytest.raises(
        DataError, match=r"data.streaming is true, but DPO computes the reference log-probabilities before"
    ):
        prepare_preferences(DataSection(path=two[0], streaming=True), small, 512, seed=0)


LONG_TURNS = [
    {"role": role, "content": f"{role} {number} " + "word " * 12}
    for number in range(4)
    for role in ("user", "assistant")
]


def test_over_long_conversations_are_cut_or_split_at_turns_by_the_users_choice(small: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"messages": LONG_TURNS}) + "\n")

    def prepared(how: str) -> Any:
        return prepare_sft(DataSection(path=str(path), over_long=how), small, 180, seed=0)  # type: ignore[arg-type]

    whole = prepare_sft(DataSection(path=str(path)), small, 1024, seed=0)
    assert len(whole.dataset[0]["input_ids"]) > 180
    truncated, split = prepared("truncate"), prepared("split")
    ids = truncated.dataset[0]["input_ids"]
    assert ids == whole.dataset[0]["input_ids"][: len(ids)]
    assert ids[-1] == small.eos_token_id
    assert len(truncated.dataset) == truncated.kept == 1
    assert len(truncated.sources[0].cut) == 1
    assert "1 shortened (first" in truncated.summary()
    answers = "".join(small.decode(row["input_ids"]) for row in split.dataset)
    assert [answers.count(f"assistant {number} ") for number in range(4)] == [1, 1, 1, 1]
    assert all(len(row["input_ids"]) <= 180 for row in split.dataset)
    assert (split.kept, split.lost) == (1, ())
    with pytest.raises(
        DataError, match=r"m\.jsonl:1: longer than max_length=180: it has \d+ tokens; raise max_length, or set"
    ):
        prepared("refuse")


def test_the_last_turn_that_counts_is_that_of_the_row_and_not_of_its_parts(small: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"messages": LONG_TURNS}) + "\n")
    section = DataSection(path=str(path), over_long="split", loss_on="last")
    prepared = prepare_sft(section, small, 180, seed=0)
    trained = [
        token
        for row in prepared.dataset
        for token, marked in zip(row["input_ids"], row["assistant_masks"], strict=True)
        if marked
    ]
    assert small.decode(trained).startswith("assistant 3 ")
    assert trained.count(small.eos_token_id) == 1
    assert re.fullmatch(r"\d of its \d parts have no token to train on", prepared.sources[0].cut[0].reason)
    section = section.model_copy(update={"over_long": "truncate"})
    with pytest.raises(DataError, match="no token of it is trained on"):
        prepare_sft(section, small, 180, seed=0)


def test_pairs_that_are_equal_as_the_template_writes_them_are_lost(small: Any, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    rows = [{"prompt": "q", "chosen": "a ", "rejected": "a"}, {"prompt": "q", "chosen": "a", "rejected": "b"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = prepare_preferences(DataSection(path=str(path), bad_rows="drop"), small, 512, seed=0)
    assert [one.place for one in prepared.lost] == [f"{path}:1"]
    assert prepared.lost[0].reason.startswith("chosen equals rejected, so ")


def test_over_long_texts_are_cut_or_continued(small: Any, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"text": "word " * 300}) + "\n")
    whole = prepare_sft(DataSection(path=str(path)), small, 4096, seed=0).dataset[0]["input_ids"]
    truncated = prepare_sft(DataSection(path=str(path), over_long="truncate"), small, 100, seed=0)
    split = prepare_sft(DataSection(path=str(path), over_long="split"), small, 100, seed=0)
    assert truncated.dataset["input_ids"][:] == [whole[:100]]
    assert truncated.sources[0].cut[0].reason == "all but the first 100 tokens of the text were cut away"
    assert [token for row in split.dataset for token in row["input_ids"]] == whole
    assert split.sources[0].cut == ()


def test_an_over_long_prompt_loses_its_oldest_turns_and_is_never_split(small: Any, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    row = {"prompt": [*LONG_TURNS, {"role": "user", "content": "last"}], "chosen": "c", "rejected": "r"}
    path.write_text(json.dumps(row) + "\n")
    prepared = prepare_preferences(DataSection(path=str(path), over_long="truncate"), small, 180, seed=0)
    (pair,) = prepared.dataset.to_list()
    assert pair["prompt"][-1]["content"] == "last"
    assert 1 < len(pair["prompt"]) < 9
    assert [m["content"] for m in pair["prompt"]] == [m["content"] for m in row["prompt"][-len(pair["prompt"]) :]]
    assert prepared.total_tokens <= 2 * 180
    with pytest.raises(
        DataError, match=r"data.over_long is 'split', and a pair of answers cannot be split; set dpo.data"
    ):
        prepare_preferences(DataSection(path=str(path), over_long="split"), small, 180, seed=0)


def test_a_converter_may_give_several_rows_or_none_and_all_are_accounted_for(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_converter_of_test_mixing.py").write_text(
        "def convert(row):\n"
        "    if row['n'] == 0:\n        return None\n"
        "    if row['n'] == 3:\n        raise ValueError('three')\n"
        "    return [{'instruction': f'i{k}', 'output': f'o{k}'} for k in range(row['n'])]\n"
    )
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"n": number}) + "\n" for number in range(4)))
    section = DataSection(path=str(path), convert="own_converter_of_test_mixing:convert", bad_rows="drop")
    prepared = prepare_sft(section, small, 512, seed=0)
    (source,) = prepared.sources
    assert places(prepared.dataset) == ["c.jsonl:2", "c.jsonl:3", "c.jsonl:3"]
    assert (source.rows_read, source.rows_kept, source.rows_passed_over, len(source.lost)) == (4, 2, 1, 1)
    assert source.lost[0].place == f"{path}:4"
    assert "ValueError: three" in source.lost[0].reason
    with pytest.raises(
        DataError, match=r"c\.jsonl:2: the rows are of instruction, output, but DPO takes prompt, chosen, rej"
    ):
        prepare_preferences(section.model_copy(update={"bad_rows": "refuse"}), small, 512, seed=0)
