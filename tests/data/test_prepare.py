from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hymba_align.data import convert
from hymba_align.data.convert import final_number
from hymba_align.data.counts import describe_losses, losses_by_reason
from hymba_align.data.prepare import prepare_preferences, prepare_sft
from hymba_align.data.reading.examples import Lost, QuestionAnswer
from hymba_align.data.rendering import render
from hymba_align.data.template import load_tokenizer
from hymba_align.errors import DataError
from hymba_align.recipe import DataSection

SHIPPED = Path(__file__).resolve().parents[2] / "data" / "arithmetic" / "train.jsonl"
LONG = "word " * 200


def section(path: Path, *rows: dict[str, Any], **settings: Any) -> DataSection:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DataSection(path=str(path), **settings)


def qa(number: int, length: int = 3) -> dict[str, str]:
    return {"question": f"q{number} " + "w " * length, "answer": f"a{number}\n#### {number}"}


def conversation(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return convert.conversation([QuestionAnswer(row["question"], row["answer"]) for row in rows])


def questions(row_messages: list[dict[str, Any]]) -> list[str]:
    return [message["content"].split()[0] for message in row_messages if message["role"] == "user"]


def test_shipped_rows_become_ids_and_masks_with_every_token_counted(small: Any) -> None:
    prepared = prepare_sft(DataSection(path=str(SHIPPED), max_rows=50), small, 512, seed=0)
    rows = [json.loads(line) for line in SHIPPED.read_text().splitlines()[:50]]
    rendered = [render(small, conversation([row])) for row in rows]
    assert prepared.dataset["input_ids"][:] == [one.input_ids for one in rendered]
    assert prepared.dataset["assistant_masks"][:] == [one.assistant_mask for one in rendered]
    assert prepared.dataset.column_names == ["input_ids", "assistant_masks", "place"]
    assert prepared.dataset["place"][:3] == [f"{SHIPPED}:{line}" for line in (1, 2, 3)]
    assert prepared.trained_tokens == sum(sum(one.assistant_mask) for one in rendered)
    assert prepared.total_tokens == sum(len(one.input_ids) for one in rendered)
    assert (prepared.rows_read, prepared.kept, prepared.lost) == (50, 50, ())


@pytest.mark.parametrize("name", ["small", "released"])
@pytest.mark.parametrize("most", [1, 3, 6])
def test_conversations_join_as_many_rows_as_fit_in_order(
    load: Callable[[str], Any], tmp_path: Path, name: str, most: int
) -> None:
    tokenizer, rng = load(name), random.Random(0)
    rows = [qa(number, rng.choice((1, 5, 20, 60))) for number in range(60)]
    data = section(tmp_path / "d.jsonl", *rows, examples_per_conversation=most, over_long="drop")
    prepared = prepare_sft(data, tokenizer, 150, seed=0)
    start, expected = 0, []
    while start < len(rows):
        fitting = [
            ids
            for count in range(1, min(most, len(rows) - start) + 1)
            if len(ids := render(tokenizer, conversation(rows[start : start + count])).input_ids) <= 150
        ]
        expected += fitting[-1:]
        start += max(len(fitting), 1)
    assert prepared.dataset["input_ids"][:] == expected
    alone = [len(render(tokenizer, conversation([row])).input_ids) for row in rows]
    assert prepared.kept == sum(length <= 150 for length in alone)
    assert [one.place for one in prepared.lost] == [
        f"{data.path}:{line}" for line, length in enumerate(alone, start=1) if length > 150
    ]


def test_rows_that_are_too_long_stop_the_run_unless_they_may_be_dropped(small: Any, tmp_path: Path) -> None:
    rows = [qa(1), {"question": LONG, "answer": "x\n#### 1"}, {**qa(2), "id": "x"}, qa(3)]
    data = section(tmp_path / "d.jsonl", *rows, over_long="drop")
    for prepare_stage in (prepare_sft, prepare_preferences):
        prepared = prepare_stage(data, small, 100, seed=0)
        assert (prepared.rows_read, prepared.kept, len(prepared.lost)) == (4, 3, 1)
        (lost,) = prepared.lost
        assert (lost.place, lost.overlong) == (f"{data.path}:2", True)
        assert re.search(
            r"^longer than max_length=100: .* has \d{3} tokens; raise max_length, or set data.over_long to say",
            lost.reason,
        )
        unit = "conversations" if prepare_stage is prepare_sft else "pairs"
        told, why = prepared.summary().splitlines()
        assert told.startswith(f"{data.path}: 3 of 4 rows kept in 3 {unit}; ")
        assert told.endswith(" tokens trained on; columns not used: id")
        assert why == f"  1 lost (longer than max_length=100, first {data.path}:2)"
        with pytest.raises(DataError, match=r"d\.jsonl:2: longer than max_length=100: "):
            prepare_stage(section(tmp_path / "d.jsonl", *rows), small, 100, seed=0)


def test_nothing_left_is_an_error(small: Any, tmp_path: Path) -> None:
    data = section(tmp_path / "d.jsonl", qa(1), qa(2), over_long="drop")
    for prepare_stage in (prepare_sft, prepare_preferences):
        with pytest.raises(DataError, match=r"none of the 2 rows is left for training: 2 lost \(.*, first .*:1\)"):
            prepare_stage(data, small, 9, seed=0)


def test_messages_with_tools_are_prepared_as_they_render(small: Any, tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": 1}}]}
    row = {"messages": [{"role": "user", "content": "u"}, call], "tools": [{"name": "f"}]}
    prepared = prepare_sft(section(tmp_path / "d.jsonl", row), small, 512, seed=0)
    assert prepared.dataset[0]["input_ids"] == render(small, row["messages"], row["tools"]).input_ids  # type: ignore[arg-type]


def test_a_row_that_cannot_be_rendered_is_named(small: Any, tmp_path: Path) -> None:
    data = section(
        tmp_path / "d.jsonl",
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": ""}]},
    )
    with pytest.raises(DataError, match=r"d\.jsonl:2: turn 2, the assistant's, is empty"):
        prepare_sft(data, small, 512, seed=0)


USER, REPLY = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
EMPTY = {"role": "assistant", "content": " "}
CONVERSATIONS = [
    [USER, REPLY],
    [USER],
    [USER, EMPTY],
    [USER, REPLY, USER, EMPTY],
    [USER, REPLY, {"role": "system", "content": "s"}],
    [USER, {"role": "bot", "content": "b"}],
    [],
    [USER, REPLY],
]


def test_rows_that_cannot_be_used_stop_the_run_unless_they_may_be_dropped(small: Any, tmp_path: Path) -> None:
    rows = [{"messages": messages} for messages in CONVERSATIONS]
    for number, row in enumerate(rows[1:-1], start=1):
        with pytest.raises(DataError, match=rf"{number}\.jsonl:2: .*; data.bad_rows: drop leaves such rows out$"):
            prepare_sft(section(tmp_path / f"{number}.jsonl", rows[0], row), small, 512, seed=0)
    with pytest.raises(DataError, match=r"d\.jsonl:2: .* \(5 more rows would be lost; 'hymba-align data check' lists"):
        prepare_sft(section(tmp_path / "d.jsonl", *rows), small, 512, seed=0)
    data = section(tmp_path / "d.jsonl", *rows, bad_rows="drop")
    prepared = prepare_sft(data, small, 512, seed=0)
    assert (prepared.rows_read, prepared.kept) == (8, 2)
    assert sorted(one.place for one in prepared.lost) == [f"{data.path}:{line}" for line in range(2, 8)]
    assert not any(one.overlong for one in prepared.lost)
    assert {reason: len(lost) for reason, lost in losses_by_reason(prepared.lost)}[
        "a turn, the assistant's, is empty"
    ] == 2


def test_rows_of_a_list_on_one_line_are_told_apart(small: Any, tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps([qa(0), {"question": "q"}, qa(2)]))
    prepared = prepare_sft(DataSection(path=str(path), bad_rows="drop"), small, 512, seed=0)
    assert (prepared.rows_read, prepared.kept) == (3, 2)
    assert prepared.dataset["place"][:] == [f"{path}:1", f"{path}:1 (row 3)"]
    assert prepared.lost[0].place == f"{path}:1 (row 2)"


def test_rows_of_the_hub_are_prepared_like_those_of_a_file(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    rows = [{"messages": messages} for messages in CONVERSATIONS]
    table = datasets.Dataset.from_list(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: table)
    of_the_hub = prepare_sft(DataSection(path="someone/data", bad_rows="drop"), small, 512, seed=0)
    of_a_file = prepare_sft(section(tmp_path / "d.jsonl", *rows, bad_rows="drop"), small, 512, seed=0)
    assert of_the_hub.dataset["input_ids"][:] == of_a_file.dataset["input_ids"][:]
    assert [one.reason for one in of_the_hub.lost] == [one.reason for one in of_a_file.lost]
    assert of_the_hub.lost[0].place == "someone/data: row 2"


def test_pairs_with_an_empty_reply_are_lost_with_the_reason(small: Any, tmp_path: Path) -> None:
    reply, empty = [REPLY], [EMPTY]
    other = [{"role": "assistant", "content": "b"}]
    pairs = [(reply, empty), (reply, other), (empty, other), ([], other)]
    rows = [{"prompt": [USER], "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    prepared = prepare_preferences(section(tmp_path / "d.jsonl", *rows, bad_rows="drop"), small, 512, seed=0)
    assert [one.place.rpartition(":")[2] for one in prepared.lost] == ["1", "3", "4"]
    assert [row["rejected"][0]["content"] for row in prepared.dataset] == ["b"]


def test_joined_rows_are_those_that_can_be_used(small: Any, tmp_path: Path) -> None:
    rows: list[Any] = [qa(0), {"question": "q", "answer": None}, qa(1), {"question": "q", "answer": ""}, qa(2), qa(3)]
    settings = {"examples_per_conversation": 2, "bad_rows": "drop"}
    prepared = prepare_sft(section(tmp_path / "d.jsonl", *rows, **settings), small, 512, seed=0)
    assert prepared.dataset["input_ids"][:] == [
        render(small, conversation(pair)).input_ids for pair in ([qa(0), qa(1)], [qa(2), qa(3)])
    ]
    assert [one.place.rpartition(":")[2] for one in prepared.lost] == ["2", "4"]
    rows[2] = {"question": "q", "answer": "blue"}
    prepared = prepare_preferences(section(tmp_path / "d.jsonl", *rows, **settings), small, 512, seed=0)
    assert [questions(row["prompt"]) for row in prepared.dataset] == [["q0"], ["q0", "q2"], ["q2", "q3"]]
    assert len(prepared.lost) == 3


def test_the_summary_sums_up_rare_reasons() -> None:
    lost = [Lost(f"d:{number}", f"reason {kind}") for kind in range(9) for number in range(10 - kind)]
    described = describe_losses(lost)
    assert described[:2] == ["10 lost (reason 0, first d:0)", "9 lost (reason 1, first d:0)"]
    assert described[-1] == "9 lost for other reasons"


def test_the_summary_never_sums_up_rows_that_are_too_long() -> None:
    lost = [Lost(f"d:{number}", f"reason {kind}") for kind in range(9) for number in range(2)]
    described = describe_losses([*lost, Lost("d:99", "longer than max_length=64: it has 90 tokens", overlong=True)])
    assert described[6:] == ["1 lost (longer than max_length=64, first d:99)", "6 lost for other reasons"]


def test_schemas_are_refused_where_they_do_not_serve(small: Any, tmp_path: Path) -> None:
    messages = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}
    with pytest.raises(
        DataError,
        match=r"the rows are of messages, but DPO takes prompt, chosen, rejected; or .*; or question, answer$",
    ):
        prepare_preferences(section(tmp_path / "m.jsonl", messages), small, 512, seed=0)
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    with pytest.raises(DataError, match=r"the rows are of prompt, chosen, rejected, but SFT takes .*messages; or "):
        prepare_sft(section(tmp_path / "p.jsonl", pair), small, 512, seed=0)
    with pytest.raises(DataError, match="examples_per_conversation is 2, but only rows of question and answer can be"):
        prepare_sft(section(tmp_path / "m.jsonl", messages, examples_per_conversation=2), small, 512, seed=0)


def test_a_template_without_generation_markers_cannot_train(shared: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(shared / "hymba_1_5b"), chat_template="released")
    with pytest.raises(DataError, match="does not mark what the assistant writes"):
        prepare_sft(section(tmp_path / "d.jsonl", qa(1)), tokenizer, 512, seed=0)


def test_preferences_differ_in_the_final_number_and_depend_on_the_seed_alone(small: Any, tmp_path: Path) -> None:
    data = section(tmp_path / "d.jsonl", *map(qa, range(30)))
    first, again, other = (prepare_preferences(data, small, 512, seed=seed).dataset.to_list() for seed in (1, 1, 2))
    assert first == again != other
    for row in first:
        assert final_number(row["chosen"][0]["content"]) != final_number(row["rejected"][0]["content"])


def test_preference_prompts_carry_the_rows_before_as_far_as_they_fit(small: Any, tmp_path: Path) -> None:
    rows = [qa(0), qa(1), qa(2, 40), qa(3), qa(4), qa(5)]
    data = section(tmp_path / "d.jsonl", *rows, examples_per_conversation=3)
    prepared = prepare_preferences(data, small, 150, seed=0)
    asked = [questions(row["prompt"]) for row in prepared.dataset]
    for place, seen in enumerate(asked):
        names = [f"q{number}" for number in range(place + 1)][-3:]
        fitting = [
            names[-count:]
            for count in range(1, len(names) + 1)
            if len(render(small, conversation(rows[place - count + 1 : place + 1])).input_ids) <= 150
        ]
        assert seen == fitting[-1]
    assert {len(seen) for seen in asked} == {1, 2, 3}


def test_equal_replies_are_lost_with_the_reason(small: Any, tmp_path: Path) -> None:
    pairs = [{"prompt": "p", "chosen": "c", "rejected": rejected} for rejected in ("c", "r")]
    prepared = prepare_preferences(section(tmp_path / "d.jsonl", *pairs, bad_rows="drop"), small, 512, seed=0)
    assert (prepared.kept, prepared.lost[0].reason.split(",")[0]) == (1, "chosen equals rejected")


def test_an_answer_from_which_no_wrong_one_can_be_made_is_named(small: Any, tmp_path: Path) -> None:
    data = section(tmp_path / "d.jsonl", qa(1), {"question": "q", "answer": "blue"})
    with pytest.raises(DataError, match=r"d\.jsonl:2: the answer does not end in a line '#### <number>'"):
        prepare_preferences(data, small, 512, seed=0)


def test_trl_tokenizes_preferences_into_what_we_render(small: Any, tmp_path: Path) -> None:
    from trl.data_utils import is_conversational
    from trl.trainer.dpo_trainer import DPOTrainer

    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"b": 1, "a": "é"}}]}
    pair = {"prompt": "p", "chosen": [call], "rejected": "r", "tools": [{"name": "f"}]}
    joined = section(tmp_path / "q.jsonl", *map(qa, range(5)), examples_per_conversation=3)
    for data in (joined, section(tmp_path / "p.jsonl", pair, {**pair, "tools": None})):
        prepared = prepare_preferences(data, small, 512, seed=0)
        assert is_conversational(prepared.dataset[0])
        settings = SimpleNamespace(dataset_num_proc=None, max_length=512, truncation_mode="keep_start")
        trainer: Any = SimpleNamespace(_tokenizer=small)
        tokenized = DPOTrainer._prepare_dataset(trainer, prepared.dataset, small, settings, "train")
        for row, ids in zip(prepared.dataset, tokenized, strict=True):
            tools = json.loads(row.get("tools") or "[]")
            assert ids["prompt_ids"] == render(small, row["prompt"], tools, add_generation_prompt=True).input_ids
            for side in ("chosen", "rejected"):
                whole = render(small, [*row["prompt"], *row[side]], tools).input_ids
                assert ids["prompt_ids"] + ids[f"{side}_ids"] == whole
        total = sum(2 * len(ids["prompt_ids"]) + len(ids["chosen_ids"]) + len(ids["rejected_ids"]) for ids in tokenized)
        assert prepared.total_tokens == total
        assert prepared.trained_tokens == total - 2 * sum(len(ids["prompt_ids"]) for ids in tokenized)


def test_real_gsm8k_goes_through(small: Any, shared: Path) -> None:
    data = DataSection(path=str(shared / "data" / "gsm8k" / "train.jsonl"), max_rows=400, examples_per_conversation=3)
    assert prepare_sft(data, small, 2048, seed=0).kept == 400
    assert prepare_preferences(data, small, 2048, seed=0).kept == 400
