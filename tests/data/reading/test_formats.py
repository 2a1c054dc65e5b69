"""Every schema's reader, through `read_examples`, as the pipeline calls it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hymba_align.data.reading.examples import Conversation, Example, PlainText, Preference, QuestionAnswer
from hymba_align.data.reading.schemas import detect_schema, read_examples, schema_of
from hymba_align.errors import DataError
from hymba_align.recipe import SourceSection

Row = dict[str, Any]


def read(row: Row, **keys: Any) -> Example:
    section = SourceSection(path="rows.jsonl", **keys)
    (example,) = read_examples(row, schema_of(section, row), section)
    return example


def refusal(row: Row, **keys: Any) -> str:
    with pytest.raises(DataError) as error:
        read(row, **keys)
    return str(error.value)


def user(content: str) -> Row:
    return {"role": "user", "content": content}


def assistant(content: str, *calls: tuple[str, str], **keys: Any) -> Row:
    made = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    return {"role": "assistant", "content": content, **({"tool_calls": made} if made else {}), **keys}


def system(content: str) -> Row:
    return {"role": "system", "content": content}


def tool(content: str) -> Row:
    return {"role": "tool", "content": content}


def said(speaker: str, value: Any, **keys: Any) -> Row:
    return {"from": speaker, "value": value, **keys}


# ---- messages -----------------------------------------------------------------------------------------------------------


def test_messages_are_a_conversation_with_its_tools() -> None:
    messages = [
        system("s"),
        user("u"),
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "name": "f", "arguments": {"a": 1}}]},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
        assistant("a"),
    ]
    expected = [system("s"), user("u"), assistant("", ("f", '{"a": 1}')), tool("3"), assistant("a")]
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert read({"messages": messages, "tools": tools}) == Conversation(expected, tools)
    assert read({"messages": messages, "tools": json.dumps(tools)}) == Conversation(expected, tools)
    assert read({"messages": messages, "tools": None}) == Conversation(expected)


def test_the_old_function_calls_of_openai_are_read() -> None:
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}}
    result = {"role": "function", "name": "f", "content": "3"}
    assert read({"messages": [user("u"), call, result, assistant("a")]}) == Conversation(
        [user("u"), assistant("", ("f", '{"a": 1}')), tool("3"), assistant("a")]
    )


def test_turns_that_nobody_answers_are_kept_at_the_end() -> None:
    messages = [user("u"), assistant("a"), user("thanks"), user("bye")]
    assert read({"messages": messages}) == Conversation(messages)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "the conversation has no messages"),
        ([user("u")], "the conversation has no assistant turn, so there is nothing to train on"),
        ([user("u"), assistant(" ")], "turn 2, the assistant's, is empty; give it content or tool_calls"),
        (
            [user("u"), assistant("a"), system("s")],
            "turn 3 is a system message after other turns; move it to the start",
        ),
        (
            [user("u"), tool("3"), assistant("a")],
            "turn 2 is a tool's result, and no turn before it calls a tool; add the assistant's tool_calls",
        ),
        ("hi", "messages must be a list, not text"),
    ],
)
def test_conversations_that_cannot_be_trained_on_are_refused(messages: Any, message: str) -> None:
    assert refusal({"messages": messages}) == message


# ---- ShareGPT -----------------------------------------------------------------------------------------------------------


def test_sharegpt_turns_become_messages() -> None:
    row = {
        "system": "s",
        "conversations": [said("human", "u"), said("gpt", "a", weight=0), said("human", "v"), said("gpt", "b")],
    }
    assert read(row) == Conversation(
        [system("s"), user("u"), assistant("a", train=False), user("v"), assistant("b")],
    )
    assert read({**row, "system": None}) == read({**row, "system": " "})
    assert read({**row, "conversations": [said("system", "s"), *row["conversations"]]}) == read(row)


def test_function_calls_in_a_row_are_parallel_calls_of_one_message() -> None:
    row = {
        "conversations": [
            said("human", "u"),
            said("function_call", '{"name": "f", "arguments": {"a": 1}}'),
            said("function_call", {"name": "g", "arguments": {}}),
            said("observation", '[{"r": 1}, {"r": 2}]'),
            said("gpt", "Now h."),
            said("function_call", '[{"name": "h", "arguments": {}}, {"name": "i", "arguments": {}}]'),
            said("observation", [{"r": 3}, {"r": 4}]),
            said("gpt", "a"),
        ],
        "tools": '[{"name": "f", "description": "d", "parameters": {}}]',
    }
    assert read(row) == Conversation(
        [
            user("u"),
            assistant("", ("f", '{"a": 1}'), ("g", "{}")),
            tool('[{"r": 1}, {"r": 2}]'),
            assistant("Now h.", ("h", "{}"), ("i", "{}")),
            tool('[{"r": 3}, {"r": 4}]'),
            assistant("a"),
        ],
        [{"name": "f", "description": "d", "parameters": {}}],
    )


def test_results_of_sharegpt_follow_the_ids_of_the_calls() -> None:
    calls = [said("function_call", json.dumps({"id": name, "name": name, "arguments": {}})) for name in "fg"]
    answers = [said("observation", name, tool_call_id=name) for name in "gf"]
    turns = [said("human", "u"), *calls, *answers, said("gpt", "a")]
    assert read({"conversations": turns}) == Conversation(
        [user("u"), assistant("", ("f", "{}"), ("g", "{}")), tool("f"), tool("g"), assistant("a")]
    )
    unknown = [*turns[:3], said("observation", "3", tool_call_id="h"), turns[-1]]
    assert refusal({"conversations": unknown}) == (
        "turn 4 is the result of the call 'h', which no turn before it makes; correct tool_call_id"
    )


def test_a_turn_is_named_as_the_file_numbers_it_where_calls_were_joined() -> None:
    call = said("function_call", '{"name": "f", "arguments": {}}')
    turns = [said("human", "u"), call, call, said("observation", "3"), said("gpt", "")]
    assert refusal({"conversations": turns}).startswith("turn 5, the assistant's, is empty")


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (said("function_call", "f(1)"), "the tool_calls of turn 2 are not valid JSON: Expecting value"),
        (
            said("function_call", ""),
            "turn 2 calls a tool without saying which; write {'name': ..., 'arguments': {...}}",
        ),
        (said("function_call", "7"), "the tool_calls of turn 2 must be a list, not a number"),
        (
            said("alien", "a"),
            "turn 2 has the role 'alien'; use one of system, user, assistant, tool, or say which it is",
        ),
        ({"value": "a"}, "turn 2 has no role; give it, as 'role' or 'from', one of system, user, assistant, tool"),
    ],
)
def test_bad_sharegpt_turns_are_refused(turn: Row, message: str) -> None:
    assert refusal({"conversations": [said("human", "u"), turn]}).startswith(message)


def test_either_style_of_turns_may_stand_in_either_column() -> None:
    expected = Conversation([user("u"), assistant("a")])
    assert read({"conversations": [user("u"), assistant("a")]}) == expected
    assert read({"messages": [said("human", "u"), said("gpt", "a")]}) == expected


# ---- Alpaca -------------------------------------------------------------------------------------------------------------


def test_alpaca_rows_are_an_exchange_after_the_system_message_and_the_history() -> None:
    row = {"instruction": "i", "output": "o"}
    assert read(row) == Conversation([user("i"), assistant("o")])
    assert read({**row, "input": "", "system": None, "history": []}) == read(row)
    whole = {**row, "input": "in", "system": "s", "history": [["q1", "a1"], ["q2", "a2"]]}
    assert read(whole) == Conversation(
        [system("s"), user("q1"), assistant("a1"), user("q2"), assistant("a2"), user("i\nin"), assistant("o")]
    )
    assert read({**whole, "history": json.dumps(whole["history"])}) == read(whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": " "}, "the column 'output' is empty; fill it in or remove the row"),
        ({"instruction": 7}, "the column 'instruction' must be text, not 7"),
        ({"input": ["x"]}, "the column 'input' must be text, not a list"),
        ({"system": 7}, "the column 'system' must be text, not 7"),
        ({"history": "x"}, "the column 'history' must be a list of [user, assistant] pairs, not text"),
        ({"history": [["q"]]}, "entry 1 of the column 'history' must be a pair [user, assistant] of texts"),
        ({"history": [["q", "a"], ["q", None]]}, "entry 2 of the column 'history' must be text, not None"),
    ],
)
def test_bad_alpaca_columns_are_refused(change: Row, message: str) -> None:
    assert refusal({"instruction": "i", "output": "o", **change}) == message


# ---- prompt and completion, question and answer, text ----------------------------------------------------------------


def test_only_the_completion_of_a_prompt_is_trained_on() -> None:
    assert read({"prompt": "p", "completion": "c"}) == Conversation([user("p"), assistant("c")])
    prompt = [user("p"), assistant("a"), user("q")]
    expected = Conversation([user("p"), assistant("a", train=False), user("q"), assistant("c")])
    assert read({"prompt": prompt, "completion": [assistant("c")]}) == expected
    assert read({"prompt": prompt, "completion": assistant("c")}) == expected
    assert read({"prompt": prompt, "completion": [*prompt, assistant("c")]}) == expected
    assert read({"prompt": "p", "completion": "c", "system": "s"}) == Conversation(
        [system("s"), user("p"), assistant("c")]
    )


def test_a_completion_is_the_assistants() -> None:
    assert refusal({"prompt": "p", "completion": [user("c")]}) == (
        "the column 'completion' must begin with the assistant's turn, or repeat 'prompt' before it"
    )
    assert (
        refusal({"prompt": "p", "completion": ""}) == "the column 'completion' is empty; fill it in or remove the row"
    )
    assert refusal({"prompt": [user("p"), assistant("a")], "completion": "c"}) == (
        "the column 'prompt' must end with a turn that the assistant answers"
    )


def test_questions_and_answers_and_texts_stay_as_they_are() -> None:
    assert read({"question": " q ", "answer": "a", "wrong_answer": None}) == QuestionAnswer(" q ", "a")
    assert read({"question": "q", "answer": "a", "wrong_answer": "w"}) == QuestionAnswer("q", "a", "w")
    assert read({"text": " t\x00 "}) == PlainText(" t\x00 ")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "answer": 7}, "the column 'answer' must be text, not 7"),
        ({"question": "q", "answer": float("nan")}, "the column 'answer' must be text, not nan"),
        ({"question": " ", "answer": "a"}, "the column 'question' is empty; fill it in or remove the row"),
        (
            {"text": "ab\ud800"},
            "character 3 of the column 'text' is the lone surrogate U+D800, which stands for nothing; replace or remove it",
        ),
        ({"text": ["t"]}, "the column 'text' must be text, not a list"),
    ],
)
def test_bad_texts_are_refused(row: Row, message: str) -> None:
    assert refusal(row) == message


# ---- preferences --------------------------------------------------------------------------------------------------------

PAIR = Preference([user("p")], [assistant("c")], [assistant("r")])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        {"prompt": [user("p")], "chosen": [assistant("c")], "rejected": assistant("r")},
        {"prompt": user("p"), "chosen": assistant("c"), "rejected": "r"},
        {"prompt": "p", "chosen": [user("p"), assistant("c")], "rejected": [user("p"), assistant("r")]},
        {"prompt": [said("human", "p")], "chosen": said("gpt", "c"), "rejected": said("gpt", "r")},
        {"conversations": [said("human", "p")], "chosen": said("gpt", "c"), "rejected": said("gpt", "r")},
        {"chosen": [user("p"), assistant("c")], "rejected": [user("p"), assistant("r")]},
        {"chosen": "\n\nHuman: p\n\nAssistant: c", "rejected": "\n\nHuman: p\n\nAssistant: r"},
        {"prompt": "p", "responses": ["c", "m", "r"], "scores": [2, 1.5, -1]},
        {"prompt": [user("p")], "responses": [[assistant("r")], assistant("c")], "scores": [0.1, 0.2]},
        {"prompt": "p", "responses": '["c", "r"]', "scores": "[1, 0]"},
    ],
)
def test_a_preference_is_one_however_it_is_written(row: Row) -> None:
    assert read(row) == PAIR
    assert read({**row, "system": "s", "tools": [{"name": "f"}]}) == Preference(
        [system("s"), user("p")], [assistant("c")], [assistant("r")], [{"name": "f"}]
    )


def test_the_turns_of_a_prompt_may_say_that_they_are_not_trained_on_whoever_speaks() -> None:
    prompt = [{**system("s"), "train": False}, {**user("p"), "train": False}]
    row = {"prompt": prompt, "chosen": "c", "rejected": "r", "system": "s"}
    assert read(row) == Preference([system("s"), user("p")], [assistant("c")], [assistant("r")])


def test_a_prompt_of_many_turns_keeps_them_and_what_was_left_out_of_a_loss_does_not_count() -> None:
    prompt = [system("s"), user("p"), assistant("a", train=False), user("q")]
    row = {"prompt": prompt, "chosen": [*prompt, assistant("c")], "rejected": [assistant("r")]}
    assert read(row) == Preference(
        [system("s"), user("p"), assistant("a"), user("q")], [assistant("c")], [assistant("r")]
    )


def test_a_reply_may_call_tools() -> None:
    call = assistant("", ("f", "{}"), ("g", "{}"))
    assert read({"prompt": "p", "chosen": [call], "rejected": "r"}) == Preference([user("p")], [call], [assistant("r")])


def goes_on(where: str, role: str) -> str:
    return (
        f"{where} goes on after the assistant's answer, and DPO would train on the {role}'s text too; end it at that "
        "answer, or move the turns before it into the prompt"
    )


@pytest.mark.parametrize(
    ("turns", "role"),
    [
        ([assistant("c"), user("x")], "user"),
        ([assistant("c"), user("x"), assistant("d")], "user"),
        ([assistant("", ("f", "{}")), tool("3"), assistant("c")], "tool"),
        ([assistant("c"), assistant("", ("f", "{}")), tool("3")], "tool"),
    ],
)
def test_a_reply_that_goes_on_is_refused_since_its_other_turns_would_be_trained_on(turns: list[Row], role: str) -> None:
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    assert refusal({**row, "chosen": turns}) == goes_on("the column 'chosen'", role)
    assert refusal({**row, "rejected": [user("p"), *turns]}) == goes_on("the column 'rejected'", role)
    assert refusal({"prompt": "p", "responses": ["r", turns], "scores": [1, 2]}) == goes_on("response 2", role)
    shares = {"conversations": [said("human", "p")], "chosen": turns, "rejected": "r"}
    assert refusal(shares) == goes_on("the column 'chosen'", role)
    whole = {"chosen": [user("p"), assistant("k")], "rejected": [user("p"), *turns]}
    assert refusal(whole) == goes_on("the column 'rejected'", role)


def test_turns_of_the_assistants_in_a_row_are_refused_since_the_header_between_would_be_trained_on() -> None:
    in_a_row = (
        "the column 'chosen' has 2 turns of the assistant's in a row, and DPO would train on the header between them too; "
        "join them into one"
    )
    turns = [assistant("a"), assistant("c")]
    assert refusal({"prompt": "p", "chosen": turns, "rejected": "r"}) == in_a_row
    assert refusal({"chosen": [user("p"), *turns], "rejected": [user("p"), assistant("r")]}) == in_a_row
    assert refusal({"chosen": [user("p"), *turns], "rejected": [user("p"), turns[0], assistant("r")]}) == in_a_row


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": 1}, "in the column 'rejected', messages must be a list, not a number"),
        ({"rejected": " "}, "the column 'rejected' is empty; fill it in or remove the row"),
        ({"prompt": []}, "the column 'prompt' must end with a turn that the assistant answers"),
        ({"prompt": [system("s")]}, "the column 'prompt' must end with a turn that the assistant answers"),
        (
            {"chosen": [user("x")]},
            "the column 'chosen' must begin with the assistant's turn, or repeat 'prompt' before it",
        ),
        (
            {"chosen": [assistant("c"), user("x"), assistant("")]},
            "in the column 'chosen', turn 3, the assistant's, is empty; give it content or tool_calls",
        ),
        (
            {"rejected": [user("p"), assistant("r", train=False)]},
            "in the column 'rejected', turn 2 says train: false, but a preference counts whole replies; remove it",
        ),
        (
            {"chosen": [said("alien", "c")]},
            "in the column 'chosen', turn 1 has the role 'alien'; use one of system, user",
        ),
        (
            {"prompt": [tool("3")]},
            "in the column 'prompt', turn 1 is a tool's result, and no turn before it calls a tool",
        ),
    ],
)
def test_bad_preferences_are_refused(change: Row, message: str) -> None:
    assert refusal({"prompt": "p", "chosen": "c", "rejected": "r", **change}).startswith(message)


# ---- preferences without a prompt ---------------------------------------------------------------------------------------


def test_the_prompt_is_what_two_conversations_share_many_turns_included() -> None:
    shared = [system("s"), user("p"), assistant("a"), user("q")]
    assert read({"chosen": [*shared, assistant("c")], "rejected": [*shared, assistant("r")]}) == Preference(
        shared, [assistant("c")], [assistant("r")]
    )
    call, result = assistant("", ("f", "{}")), tool("3")
    chosen, rejected = [user("p"), call, result, assistant("c")], [user("p"), call, result, assistant("r")]
    assert read({"chosen": chosen, "rejected": rejected}) == Preference(
        [user("p"), call, result], [assistant("c")], [assistant("r")]
    )


def test_conversations_that_part_before_their_last_answers_are_refused() -> None:
    chosen = [user("p"), assistant("c"), user("x"), assistant("d")]
    rejected = [user("p"), assistant("r"), user("x"), assistant("e")]
    assert refusal({"chosen": chosen, "rejected": rejected}) == goes_on("the column 'chosen'", "user")
    assert refusal({"chosen": chosen[:2], "rejected": rejected}) == goes_on("the column 'rejected'", "user")
    texts = [f"\n\nHuman: p\n\nAssistant: {first}\n\nHuman: x\n\nAssistant: {last}" for first, last in ("cd", "re")]
    assert refusal({"chosen": texts[0], "rejected": texts[1]}) == goes_on("the column 'chosen'", "user")
    assert read({"chosen": texts[0], "rejected": texts[0][:-1] + "e"}) == Preference(
        chosen[:3], chosen[3:], rejected[3:]
    )


def test_equal_conversations_are_a_pair_of_equal_replies_for_later_stages_to_report() -> None:
    both = [user("p"), assistant("a"), user("q"), assistant("c")]
    assert read({"chosen": both, "rejected": both}) == Preference(both[:3], both[3:], both[3:])


def test_dialogues_in_one_text_are_split_at_their_speakers() -> None:
    begun = "\n\nHuman: Who?\n\nAssistant: Me.\n\nAs in: Human: nature.\n\nHuman: Really?\n\nAssistant:"
    assert read({"chosen": begun + " Yes.", "rejected": begun + " No."}) == Preference(
        [user("Who?"), assistant("Me.\n\nAs in: Human: nature."), user("Really?")],
        [assistant("Yes.")],
        [assistant("No.")],
    )


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        (
            [user("p"), assistant("c")],
            [user("q"), assistant("c")],
            "the columns 'chosen' and 'rejected' part at turn 1, which is not the assistant's in both; only replies may",
        ),
        (
            [user("p"), assistant("a")],
            [user("p"), assistant("a"), user("q"), assistant("r")],
            "the column 'chosen' is only the beginning of the other; end it with another reply",
        ),
        (
            [assistant("c")],
            [assistant("r")],
            "the columns 'chosen' and 'rejected' share no turn that is answered; begin both with the same prompt, or add",
        ),
        (
            "c",
            "r",
            "the column 'chosen' holds one text that is no dialogue; begin its turns with 'Human:' and 'Assistant:', write",
        ),
        (
            "\n\nHuman: p\n\nAssistant: c",
            "\n\nHuman: p\n\nAssistant:",
            "in the column 'rejected', turn 2, the assistant's, is empty; give it content or tool_calls",
        ),
        (7, [user("p")], "in the column 'chosen', messages must be a list, not a number"),
    ],
)
def test_conversations_that_are_no_pair_are_refused(chosen: Any, rejected: Any, message: str) -> None:
    assert refusal({"chosen": chosen, "rejected": rejected}).startswith(message)


# ---- ranked -------------------------------------------------------------------------------------------------------------


def test_of_equal_scores_the_first_response_counts() -> None:
    row = {"prompt": "p", "responses": ["r", "c", "d", "s"], "scores": [1, 2, 2, 1]}
    assert read(row) == PAIR
    assert read({**row, "scores": [1, 10**400, 2.5, 1]}) == PAIR


@pytest.mark.parametrize(
    ("responses", "scores", "message"),
    [
        (["a", "b"], [1], "there are 2 responses and 1 scores; give each response its score"),
        (["a"], [1, 2], "there are 1 responses and 2 scores; give each response its score"),
        (["a"], [1], "the column 'responses' has 1; a preference needs two or more"),
        ([], [], "the column 'responses' has 0; a preference needs two or more"),
        (["a", "b"], [1, None], "score 2 is None; every score must be a finite number"),
        (["a", "b"], [float("nan"), 1], "score 1 is nan; every score must be a finite number"),
        (["a", "b"], [True, 0], "score 1 is True; every score must be a finite number"),
        (["a", "b"], ["9", 1], "score 1 is '9'; every score must be a finite number"),
        (["a", "b", "c"], [2, 2.0, 2], "all 3 scores are 2, so no response is better; remove the row"),
        ("a", [1], "the column 'responses' must be a list, not text"),
        (["a", "b"], 7, "the column 'scores' must be a list, not a number"),
        (["a", 7], [1, 2], "in response 2, messages must be a list, not a number"),
        (["", "b"], [1, 2], "response 1 is empty; fill it in or remove the row"),
    ],
)
def test_responses_that_cannot_be_ranked_are_refused(responses: Any, scores: Any, message: str) -> None:
    assert refusal({"prompt": "p", "responses": responses, "scores": scores}) == message


# ---- CSV files hold lists as texts --------------------------------------------------------------------------------------


def test_lists_may_be_written_as_json_texts() -> None:
    messages = [user("u"), assistant("a")]
    assert read({"messages": json.dumps(messages)}) == Conversation(messages)
    assert read({"conversations": json.dumps([said("human", "u"), said("gpt", "a")])}) == Conversation(messages)
    pair = {"chosen": [user("p"), assistant("c")], "rejected": [user("p"), assistant("r")]}
    assert read({column: json.dumps(turns) for column, turns in pair.items()}) == PAIR
    assert refusal({"messages": "[{"}).startswith("the contents of the column 'messages' are not valid JSON: Expecting")


# ---- real sets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "schema", "count"),
    [
        ("llamafactory/dpo_en_demo.json", "preference", 300),
        ("llamafactory/kto_en_demo.json", "messages", 300),
        ("llamafactory/glaive_toolcall_en_demo.json", "sharegpt", 300),
        ("llamafactory/reason_tool_use_demo_50.jsonl", "messages", 50),
    ],
)
def test_real_sets_are_read_whole(shared: Path, name: str, schema: str, count: int) -> None:
    text = (shared / "data" / name).read_text(encoding="utf-8")
    load: Callable[[str], Any] = json.loads
    rows = load(text) if name.endswith(".json") else list(map(load, text.splitlines()))
    found = detect_schema(rows[0])
    section = SourceSection(path=name)
    examples = [example for row in rows for example in read_examples(row, found, section)]
    assert (found.name, len(examples)) == (schema, count)
    for row, example in zip(rows, examples, strict=True):
        assert isinstance(example, (Conversation, Preference))
        assert list(example.tools) == json.loads(row.get("tools") or "[]")
        messages = example.messages if isinstance(example, Conversation) else [*example.prompt, *example.chosen]
        calls = sum(len(message.get("tool_calls", ())) for message in messages)
        assert calls == json.dumps(row).count('"function_call"') + json.dumps(row).count('"type": "tool_call"')
