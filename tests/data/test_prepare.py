from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hymba_align.data import prepare
from hymba_align.data.convert import conversation, final_number
from hymba_align.data.prepare import Prepared, prepare_preferences, prepare_sft
from hymba_align.data.template import load_tokenizer, render
from hymba_align.errors import DataError, RenderError
from hymba_align.recipe import DataSection

SHIPPED = Path(__file__).resolve().parents[2] / "data" / "arithmetic" / "train.jsonl"
LONG = "word " * 200


def section(path: Path, *rows: dict[str, Any], **settings: Any) -> DataSection:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DataSection(path=str(path), **settings)


def qa(number: int, length: int = 3) -> dict[str, str]:
    return {"question": f"q{number} " + "w " * length, "answer": f"a{number}\n#### {number}"}


def questions(row_messages: list[dict[str, Any]]) -> list[str]:
    return [message["content"].split()[0] for message in row_messages if message["role"] == "user"]


def test_shipped_rows_become_ids_and_masks_with_every_token_counted(small: Any) -> None:
    prepared = prepare_sft(DataSection(path=str(SHIPPED), max_rows=50), small, 512, seed=0)
    rows = [json.loads(line) for line in SHIPPED.read_text().splitlines()[:50]]
    rendered = [render(small, conversation([row])) for row in rows]
    assert prepared.dataset["input_ids"][:] == [one.input_ids for one in rendered]
    assert prepared.dataset["assistant_masks"][:] == [one.assistant_mask for one in rendered]
    assert prepared.dataset.column_names == ["input_ids", "assistant_masks"]
    assert prepared.trained_tokens == sum(sum(one.assistant_mask) for one in rendered)
    assert prepared.total_tokens == sum(len(one.input_ids) for one in rendered)
    assert (prepared.rows_read, prepared.kept, prepared.dropped) == (50, 50, {})


@pytest.mark.parametrize("name", ["small", "released"])
@pytest.mark.parametrize("most", [1, 3, 6])
def test_conversations_join_as_many_rows_as_fit_in_order(
    load: Callable[[str], Any], tmp_path: Path, name: str, most: int
) -> None:
    tokenizer, rng = load(name), random.Random(0)
    rows = [qa(number, rng.choice((1, 5, 20, 60))) for number in range(60)]
    prepared = prepare_sft(section(tmp_path / "d.jsonl", *rows, examples_per_conversation=most), tokenizer, 150, seed=0)
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
    assert prepared.dropped == ({"longer than max_length=150": 60 - prepared.kept} if prepared.kept < 60 else {})


def test_rows_that_are_too_long_are_counted_with_the_reason(small: Any, tmp_path: Path) -> None:
    data = section(tmp_path / "d.jsonl", qa(1), {"question": LONG, "answer": "x\n#### 1"}, {**qa(2), "id": "x"}, qa(3))
    for prepared in (prepare_sft(data, small, 100, seed=0), prepare_preferences(data, small, 100, seed=0)):
        assert (prepared.rows_read, prepared.kept, prepared.dropped) == (4, 3, {"longer than max_length=100": 1})
        place = f"{data.path}:2"
        assert prepared.first_dropped == {"longer than max_length=100": place}
        assert (
            f"3 of 4 rows kept in 3 conversations; 1 dropped (longer than max_length=100, first {place}); "
            in prepared.summary()
        )


def test_the_summary_names_columns_that_nothing_reads() -> None:
    class Sized:
        def __len__(self) -> int:
            return 2

    prepared = Prepared(Sized(), 1200, 1100, {"too odd": 100}, 30, 90, ("id",))  # type: ignore[arg-type]
    assert prepared.summary() == (
        "1,100 of 1,200 rows kept in 2 conversations; 100 dropped (too odd); 30 of 90 tokens trained on; "
        "columns not used: id"
    )


def test_nothing_left_is_an_error(small: Any, tmp_path: Path) -> None:
    data = section(tmp_path / "d.jsonl", qa(1), qa(2))
    for prepare_stage in (prepare_sft, prepare_preferences):
        with pytest.raises(
            DataError, match=r"none of the 2 rows is left: 2 dropped \(longer than max_length=9, first .*:1\); raise"
        ):
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
    with pytest.raises(RenderError, match=r"d\.jsonl:2: turn 2, the assistant's, is empty"):
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


def on_the_hub(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], **settings: Any) -> DataSection:
    """A section whose hub data set has these rows."""
    import datasets

    table = datasets.Dataset.from_list(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: table)
    return DataSection(path="someone/data", **settings)


def test_rows_of_the_hub_that_cannot_be_rendered_are_dropped_and_counted_where_a_files_are_errors(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"messages": messages} for messages in CONVERSATIONS]
    for number, row in enumerate(rows[1:-1], start=1):
        data = section(tmp_path / f"{number}.jsonl", rows[0], row)
        with pytest.raises(RenderError, match=rf"{number}\.jsonl:2: "):
            prepare_sft(data, small, 512, seed=0)
    prepared = prepare_sft(on_the_hub(monkeypatch, rows), small, 512, seed=0)
    assert (prepared.rows_read, prepared.kept) == (8, 2)
    assert prepared.dropped == {
        "the conversation has no assistant turn, so there is nothing to train on": 2,
        "a turn, the assistant's, is empty": 2,
        "a turn is a system message after other turns": 1,
        "a turn has the role 'bot'": 1,
    }
    assert "; 2 dropped (a turn, the assistant's, is empty, first someone/data: row 3); " in prepared.summary()
    with pytest.raises(
        DataError, match=r"^someone/data: none of the 1 rows is left: 1 dropped .the conversation has no"
    ):
        prepare_sft(on_the_hub(monkeypatch, rows[1:2]), small, 512, seed=0)


def test_pairs_of_the_hub_with_an_empty_reply_are_dropped_and_counted(
    small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply, empty = [REPLY], [EMPTY]
    other = [{"role": "assistant", "content": "b"}]
    pairs = [(reply, empty), (reply, other), (empty, other), ([], other)]
    rows = [{"prompt": [USER], "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    prepared = prepare_preferences(on_the_hub(monkeypatch, rows), small, 512, seed=0)
    assert prepared.dropped == {
        "a turn, the assistant's, is empty": 2,
        "the column 'chosen' must begin with the assistant's turn, or repeat 'prompt' before it": 1,
    }
    assert [row["rejected"][0]["content"] for row in prepared.dataset] == ["b"]


def test_joined_rows_of_the_hub_are_those_that_can_be_used(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [qa(0), {"question": "q", "answer": None}, qa(1), {"question": "q", "answer": ""}, qa(2), qa(3)]
    joined = on_the_hub(monkeypatch, rows, examples_per_conversation=2)
    prepared = prepare_sft(joined, small, 512, seed=0)
    assert prepared.dataset["input_ids"][:] == [
        render(small, conversation(pair)).input_ids for pair in ([qa(0), qa(1)], [qa(2), qa(3)])
    ]
    assert prepared.dropped == {"the column 'answer' is missing": 1, "the column 'answer' is empty": 1}
    rows[2] = {"question": "q", "answer": "blue"}
    prepared = prepare_preferences(on_the_hub(monkeypatch, rows, examples_per_conversation=2), small, 512, seed=0)
    assert [questions(row["prompt"]) for row in prepared.dataset] == [["q0"], ["q0", "q2"], ["q2", "q3"]]
    assert sum(prepared.dropped.values()) == 3


def test_the_summary_sums_up_rare_reasons() -> None:
    dropped = {f"reason {number}": 10 - number for number in range(9)}
    summary = Prepared([], 100, 46, dropped, 1, 2, (), {"reason 0": "d:7"}).summary()  # type: ignore[arg-type]
    assert "; 10 dropped (reason 0, first d:7); 9 dropped (reason 1); " in summary
    assert "; 5 dropped (reason 5); 9 dropped for other reasons; " in summary


def test_schemas_are_refused_where_they_do_not_serve(small: Any, tmp_path: Path) -> None:
    messages = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}
    with pytest.raises(
        DataError, match="the rows are of messages, but DPO takes prompt, chosen, rejected; or question, answer"
    ):
        prepare_preferences(section(tmp_path / "m.jsonl", messages), small, 512, seed=0)
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    with pytest.raises(
        DataError, match="the rows are of prompt, chosen, rejected, but SFT takes messages; or question, answer"
    ):
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


def test_equal_replies_are_dropped_and_counted(small: Any, tmp_path: Path) -> None:
    pairs = [{"prompt": "p", "chosen": "c", "rejected": rejected} for rejected in ("c", "r")]
    prepared = prepare_preferences(section(tmp_path / "d.jsonl", *pairs), small, 512, seed=0)
    assert (prepared.kept, prepared.dropped) == (1, {"chosen equals rejected": 1})


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


def test_what_was_prepared_once_is_not_rendered_again(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = section(tmp_path / "d.jsonl", *map(qa, range(10)), {"question": LONG, "answer": "a"})
    first = prepare_sft(data, small, 100, seed=0)
    monkeypatch.setattr(prepare, "render", lambda *_, **__: pytest.fail("rendered again"))
    again = prepare_sft(data, small, 100, seed=0)
    assert again.dataset.to_list() == first.dataset.to_list()
    assert again.dropped == first.dropped == {"longer than max_length=100": 1}


def test_real_gsm8k_goes_through(small: Any, shared: Path) -> None:
    data = DataSection(path=str(shared / "data" / "gsm8k" / "train.jsonl"), max_rows=400, examples_per_conversation=3)
    assert prepare_sft(data, small, 2048, seed=0).kept == 400
    assert prepare_preferences(data, small, 2048, seed=0).kept == 400
