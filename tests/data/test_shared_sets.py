"""Public sets in the forms that people have them in, as they are or through a converter: every row is accounted for.

They lie beside the repository and are skipped where absent; shared_converters.py holds the converters. GPQA is not among
them: it is for the contamination check only.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hymba_align.data.prepare import Prepared, prepare_preferences, prepare_sft
from hymba_align.recipe import DataSection

MAX_LENGTH = 8192

# name: file, keys of the data section, stage, rows in the file, rows passed over, conversations or pairs
SETS: dict[str, tuple[str, dict[str, Any], str, int, int, int]] = {
    "gsm8k train": ("gsm8k/train.jsonl", {}, "sft", 7473, 0, 7473),
    "gsm8k test": ("gsm8k/test.jsonl", {}, "sft", 1319, 0, 1319),
    "gsm8k with made wrong answers": ("gsm8k/test.jsonl", {}, "dpo", 1319, 0, 1319),
    "preferences in ShareGPT's turns": ("llamafactory/dpo_en_demo.json", {}, "dpo", 300, 0, 300),
    "the same, converted": ("llamafactory/dpo_en_demo.json", {"convert": "sharegpt_pair"}, "dpo", 300, 0, 300),
    "ShareGPT with tools": ("llamafactory/glaive_toolcall_en_demo.json", {}, "sft", 300, 0, 299),
    "labelled answers, all of them": ("llamafactory/kto_en_demo.json", {}, "sft", 300, 0, 300),
    "labelled answers, the good ones": (
        "llamafactory/kto_en_demo.json",
        {"convert": "good_answers"},
        "sft",
        300,
        150,
        150,
    ),
    "typed parts with reasoning": ("llamafactory/reason_tool_use_demo_50.jsonl", {}, "sft", 50, 0, 50),
    "typed parts, without reasoning": (
        "llamafactory/reason_tool_use_demo_50.jsonl",
        {"convert": "typed_parts"},
        "sft",
        50,
        0,
        50,
    ),
    "trees as ranked answers": ("oasst/en_100_tree.jsonl", {"convert": "ranked_replies"}, "dpo", 100, 0, 212),
    "trees as conversations": ("oasst/en_100_tree.jsonl", {"convert": "conversations"}, "sft", 100, 0, 546),
    "messages with replies as ranked answers": (
        "oasst/en_100_message.jsonl",
        {"convert": "ranked_replies"},
        "dpo",
        100,
        0,
        212,
    ),
    "messages with replies as conversations": (
        "oasst/en_100_message.jsonl",
        {"convert": "conversations"},
        "sft",
        100,
        0,
        546,
    ),
    "seed tasks": ("self-instruct/seed_tasks.jsonl", {"convert": "alpaca_rows"}, "sft", 175, 0, 175),
    "user instructions": (
        "self-instruct/user_oriented_instructions.jsonl",
        {"convert": "alpaca_rows"},
        "sft",
        252,
        0,
        252,
    ),
    "calls of real APIs": ("toolalpaca/eval_real.json", {"convert": "toolalpaca_calls"}, "sft", 11, 0, 110),
    "calls of simulated APIs": ("toolalpaca/eval_simulated.json", {"convert": "toolalpaca_calls"}, "sft", 10, 0, 70),
}

# The row whose answer goes on with thousands of zeros, each a token: longer than MAX_LENGTH.
ZEROS = 243

Prepare = Callable[[str], Prepared]


@pytest.fixture
def prepare(shared: Path, load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """A set by its name in SETS, prepared with the released tokenizer."""
    tokenizer = load("released")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))

    def prepared(name: str) -> Prepared:
        file, keys, stage, *_ = SETS[name]
        if "convert" in keys:
            keys = {"convert": f"shared_converters:{keys['convert']}"}
        section = DataSection(path=str(shared / "data" / file), bad_rows="drop", over_long="drop", workers=1, **keys)
        return {"sft": prepare_sft, "dpo": prepare_preferences}[stage](section, tokenizer, MAX_LENGTH, seed=0)

    return prepared


def trained_text(tokenizer: Any, record: dict[str, Any]) -> str:
    """The text of the tokens under the loss."""
    pairs = zip(record["input_ids"], record["assistant_masks"], strict=True)
    # Decoding drops a leading space piece, which a reply's first token never is: put a line break before it.
    line_break = tokenizer.convert_tokens_to_ids("<0x0A>")
    return tokenizer.decode([line_break, *(token for token, trained in pairs if trained)]).removeprefix("\n")


def rows_of(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("name", SETS)
def test_every_row_of_a_public_set_is_accounted_for(name: str, prepare: Prepare, shared: Path) -> None:
    file, _, stage, rows, passed_over, records = SETS[name]
    prepared = prepare(name)
    (counts,) = prepared.sources
    assert len(rows_of(shared / "data" / file)) == counts.rows_read == rows
    lost = [one.reason.split(";")[0] for one in counts.lost]
    assert lost == (["longer than max_length=8192: it has 11,641 tokens"] if name == "ShareGPT with tools" else [])
    assert counts.cut == ()
    assert counts.rows_passed_over == passed_over
    assert counts.rows_read == counts.rows_kept + len(lost) + passed_over
    assert len(prepared.dataset) == counts.conversations == records
    assert 0 < prepared.trained_tokens < prepared.total_tokens
    if stage == "sft":
        assert max(map(len, prepared.dataset["input_ids"])) <= MAX_LENGTH


def test_every_answer_of_a_tool_conversation_is_trained_on_and_nothing_else(
    prepare: Prepare, shared: Path, load: Callable[[str], Any]
) -> None:
    tokenizer = load("released")
    dataset = prepare("ShareGPT with tools").dataset
    rows = rows_of(shared / "data/llamafactory/glaive_toolcall_en_demo.json")
    assert rows.pop(ZEROS)["conversations"][-1]["value"].count("0") > 4000
    for row, record in zip(rows, dataset, strict=True):
        said = []
        for turn in row["conversations"]:
            if turn["from"] == "gpt":
                said.append(turn["value"].strip() + "</s>")
            elif turn["from"] == "function_call":
                call = json.loads(turn["value"])
                said.append(f"<toolcall> {json.dumps(call, ensure_ascii=False)} </toolcall></s>")
        assert trained_text(tokenizer, record) == "".join(said)


def test_parallel_calls_of_typed_parts_are_kept_in_order(
    prepare: Prepare, shared: Path, load: Callable[[str], Any]
) -> None:
    tokenizer = load("released")
    rows = rows_of(shared / "data/llamafactory/reason_tool_use_demo_50.jsonl")
    for name, reasons in (("typed parts with reasoning", True), ("typed parts, without reasoning", False)):
        for row, record in zip(rows, prepare(name).dataset, strict=True):
            parts = [part for message in row["messages"] for part in message["content"]]
            calls = [json.loads(part["value"])["name"] for part in parts if part["type"] == "tool_call"]
            trained = trained_text(tokenizer, record)
            found = [json.loads(text.split(" </toolcall>")[0])["name"] for text in trained.split("<toolcall> ")[1:]]
            assert found == calls
            assert ("<think>" in trained) == reasons


def test_the_best_reply_of_a_tree_is_preferred_to_the_worst(prepare: Prepare, shared: Path) -> None:
    (first, *_) = prepare("trees as ranked answers").dataset
    tree = rows_of(shared / "data/oasst/en_100_tree.jsonl")[0]["prompt"]
    by_rank = sorted(tree["replies"], key=lambda reply: reply["rank"])
    assert [(message["role"], message["content"]) for message in first["prompt"]] == [("user", tree["text"])]
    assert first["chosen"][0]["content"] == by_rank[0]["text"]
    assert first["rejected"][0]["content"] == by_rank[-1]["text"]


def test_ignoring_the_label_of_a_labelled_set_is_reported(prepare: Prepare) -> None:
    (counts,) = prepare("labelled answers, all of them").sources
    assert counts.ignored_columns == ("label",)


def test_what_the_converter_of_tool_calls_passes_over_is_what_is_no_json(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    converters = importlib.import_module("shared_converters")
    for file, expected in (("eval_real.json", 4), ("eval_simulated.json", 30)):
        rows = rows_of(shared / "data/toolalpaca" / file)
        answers = [answer for row in rows for answer in row["Golden_Answers"]]
        broken = [one for one in answers if not all(converters.is_object(call["Action_Input"]) for call in one)]
        assert len(broken) == expected
        assert all("$" in call["Action_Input"] or "{" in call["Action_Input"] for one in broken for call in one)
        kept = sum(len(converters.toolalpaca_calls(row)) for row in rows)
        assert kept == len(answers) - expected
