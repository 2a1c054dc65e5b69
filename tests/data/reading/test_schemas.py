from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hymba_align.data.reading.examples import Conversation, Example, PlainText, Preference, QuestionAnswer
from hymba_align.data.reading.json_text import dump_json
from hymba_align.data.reading.messages import ROLES, canonical_messages
from hymba_align.data.reading.schemas import (
    SCHEMAS,
    Schema,
    canonical_columns,
    detect_schema,
    read_examples,
    schema_of,
    unread_columns,
)
from hymba_align.data.reading.tool_calls import canonical_tools
from hymba_align.errors import DataError
from hymba_align.recipe import SourceSection

ROW = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}
EXAMPLE = Conversation(ROW["messages"])


def section(**keys: Any) -> SourceSection:
    return SourceSection(path="rows.jsonl", **keys)


def read(row: Mapping[str, Any], **keys: Any) -> list[Example]:
    return read_examples(row, schema_of(section(**keys), row), section(**keys))


def refusal(row: Mapping[str, Any], **keys: Any) -> str:
    with pytest.raises(DataError) as error:
        read(row, **keys)
    return str(error.value)


# ---- detection ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ("prompt chosen rejected", "preference"),
        ("prompt chosen rejected messages score_chosen", "preference"),
        ("conversations chosen rejected", "preference"),
        ("chosen rejected", "preference"),
        ("messages chosen rejected", "preference"),
        ("prompt responses scores", "ranked"),
        ("prompt completion", "prompt_completion"),
        ("messages tools", "messages"),
        ("messages text", "messages"),
        ("conversations tools system", "sharegpt"),
        ("instruction input output history system", "alpaca"),
        ("instruction output text", "alpaca"),
        ("question answer", "question_answer"),
        ("question answer wrong_answer", "question_answer"),
        ("text meta", "text"),
    ],
)
def test_a_schema_is_told_by_its_columns_most_specific_first(columns: str, name: str) -> None:
    assert detect_schema(columns.split()).name == name


def test_the_prompt_of_a_preference_is_its_own_column_before_any_other() -> None:
    assert detect_schema(["prompt", "conversations", "chosen", "rejected"]).required[0] == "prompt"
    assert detect_schema(["conversations", "chosen", "rejected"]).required[0] == "conversations"


@pytest.mark.parametrize(
    ("columns", "sets", "mapping"),
    [
        (
            ["questions", "answers", "id"],
            "(question, answer) nor (prompt, chosen, rejected) nor (conversations, chosen, rejected)",
            "question: 'questions', answer: 'answers'",
        ),
        (
            ["Prompt", " Completion "],
            "(prompt, completion) nor (prompt, chosen, rejected) nor (prompt, responses, scores)",
            "prompt: 'Prompt', completion: ' Completion '",
        ),
        (
            ["Ticket", "Reply"],
            "(prompt, completion) nor (messages) nor (question, answer)",
            "prompt: 'NAME', completion: 'NAME'",
        ),
    ],
)
def test_unknown_columns_are_named_beside_the_nearest_sets_and_a_mapping(
    columns: list[str], sets: str, mapping: str
) -> None:
    with pytest.raises(DataError) as error:
        detect_schema(columns)
    assert str(error.value) == (
        f"the columns found are {', '.join(map(repr, columns))}, neither {sets} nor another set of docs/data.md; say which "
        f"is which, as in columns: {{{mapping}}}, or name a function with convert"
    )


def test_odd_and_many_columns_are_named_briefly() -> None:
    with pytest.raises(DataError, match=r"^the columns found are none, neither "):
        detect_schema([])
    with pytest.raises(DataError) as error:
        detect_schema(["\ud800\n", "x" * 99, *map(str, range(20))])
    named = f"'\\ud800\\n', '{'x' * 60}…', '0', '1', '2', '3', '4', '5' and 14 more"
    assert str(error.value).startswith(f"the columns found are {named}, neither ")


def test_stages_and_ignored_columns_are_known() -> None:
    assert {schema.name: set(schema.stages) for schema in SCHEMAS} == {
        **{name: {"dpo"} for name in ("preference", "ranked")},
        **{name: {"sft"} for name in ("prompt_completion", "messages", "sharegpt", "alpaca", "text")},
        "question_answer": {"sft", "dpo"},
    }
    assert detect_schema(["messages"]).ignored(["messages", "tools", "label", "id"]) == ("id", "label")


def test_a_named_format_is_taken_where_its_columns_are_there() -> None:
    both = {**ROW, "text": "t"}
    assert read(both) == [EXAMPLE]
    assert read(both, format="text") == [PlainText("t")]
    pair = {"chosen": "Human: p\n\nAssistant: c", "rejected": "Human: p\n\nAssistant: r"}
    assert schema_of(section(format="preference"), pair).required == ("chosen", "rejected")
    assert refusal(ROW, format="preference") == (
        "format is preference, which takes prompt, chosen, rejected; or conversations, chosen, rejected; or chosen, "
        "rejected, and the columns found are 'messages'; correct format, or map the columns in the recipe with columns"
    )


# ---- columns and roles --------------------------------------------------------------------------------------------------

FOREIGN = {"dialog": [{"speaker": "me", "said": "u"}, {"speaker": "bot", "said": "a"}], "functions": [{"name": "f"}]}
COLUMNS = {"messages": "dialog", "tools": "functions", "role": "speaker", "content": "said"}


def test_columns_and_roles_map_foreign_names() -> None:
    roles = {"me": "user", "bot": "assistant"}
    assert read(FOREIGN, columns=COLUMNS, roles=roles) == [Conversation(ROW["messages"], [{"name": "f"}])]
    assert canonical_columns(FOREIGN, section(columns=COLUMNS)) == ("messages", "tools")
    assert refusal(FOREIGN, columns=COLUMNS, roles={"me": "user"}) == (
        "turn 2 has the role 'bot'; use one of system, user, assistant, tool, or say which it is with data.roles, such as roles: {NAME: assistant}"
    )


def test_a_role_of_the_recipe_comes_before_the_usual_meaning() -> None:
    turns = [{"from": "gpt", "value": "u"}, {"from": "human", "value": "a"}]
    assert read({"conversations": turns}, roles={"gpt": "user", "human": "assistant"}) == [EXAMPLE]


def test_a_mapped_column_comes_before_one_that_has_the_name_already() -> None:
    row = {"text": "id", "body": "t"}
    assert read(row, columns={"text": "body"}) == [PlainText("t")]
    assert canonical_columns(row, section(columns={"text": "body"})) == ("text",)


def test_a_column_whose_place_another_takes_is_unread_like_one_that_no_schema_knows() -> None:
    text = detect_schema(["text"])
    assert unread_columns(["text", "body", "id"], text, section(columns={"text": "body"})) == ("id", "text")
    assert unread_columns(["text", "body", "id"], text, section()) == ("body", "id")
    pair = detect_schema(["chosen", "rejected"])
    swapped = section(columns={"chosen": "rejected", "rejected": "chosen"})
    assert unread_columns(["chosen", "rejected"], pair, swapped) == ()
    turn_keys = section(columns={"messages": "dialog", "content": "said"})
    assert unread_columns(["dialog", "said"], detect_schema(["messages"]), turn_keys) == ("said",)


def test_keys_of_turns_are_unread_by_the_names_that_columns_gives_them() -> None:
    unread: set[str] = set()
    turn = {"speaker": "user", "said": "u", "from": "web", "trian": False}
    mapped = section(columns={"role": "speaker", "content": "said"})
    row = {"messages": [turn, {"speaker": "assistant", "said": "a"}]}
    assert read_examples(row, detect_schema(row), mapped, unread) == [EXAMPLE]
    assert unread == {"from", "trian"}


def test_one_column_may_be_read_as_two() -> None:
    columns = {"question": "q", "answer": "q"}
    assert read({"q": "x"}, columns=columns) == [QuestionAnswer("x", "x")]


def test_a_mapped_column_that_is_not_there_is_named_beside_those_that_are() -> None:
    assert refusal(ROW, columns={"messages": "dialog"}) == (
        "columns says that messages is called 'dialog', and the first row has only 'messages'; correct the name, or give "
        "the first row that column (null will do)"
    )
    assert refusal(ROW, columns={"tools": "functions"}).startswith("columns says that tools is called 'functions', and")


def test_a_column_may_be_missing_in_later_rows_where_the_schema_does_without_it() -> None:
    mapped = section(columns={"tools": "functions"})
    schema = schema_of(mapped, {**ROW, "functions": None})
    assert read_examples(ROW, schema, mapped) == [EXAMPLE]


def test_a_name_that_the_schema_does_not_read_is_refused() -> None:
    assert refusal({**ROW, "x": 1}, columns={"anwser": "x"}) == (
        "columns names 'anwser', which messages does not read; it reads messages, tools, role, content"
    )


def test_a_role_or_content_key_that_turns_do_not_have_is_named() -> None:
    assert refusal(ROW, columns={"role": "speaker"}).startswith("turn 1 has no role; give it, as 'speaker', one of")
    assert refusal(ROW, columns={"content": "said"}) == "the content of turn 1 must be text, not nothing"


# ---- rows ---------------------------------------------------------------------------------------------------------------


def test_a_row_without_a_column_that_it_needs_is_refused() -> None:
    schema = detect_schema(["question", "answer"])
    for row in ({"question": "q"}, {"question": "q", "answer": None}):
        with pytest.raises(DataError) as error:
            read_examples(row, schema, section())
        assert str(error.value) == "the column 'answer' is missing; every row needs question, answer"
    with pytest.raises(DataError, match=r"^the column 'answer' is missing \(there is 'anwser'\); every row needs"):
        read_examples({"question": "q", "anwser": "a"}, schema, section())


def test_a_row_of_another_schema_than_the_first_is_told_apart() -> None:
    with pytest.raises(DataError) as error:
        read_examples({"question": "q", "answer": "a"}, detect_schema(["messages"]), section())
    assert str(error.value) == (
        "the row has the columns of question_answer (question, answer), and the first row those of messages (messages); "
        "put rows of each kind into a file of their own and name both files in sources, or make all rows one kind with convert"
    )


@pytest.mark.parametrize(
    ("columns", "stage", "sets", "example"),
    [
        (
            ("question", "better", "worse"),
            "dpo",
            "(prompt, chosen, rejected) nor (conversations, chosen, rejected) nor (prompt, responses, scores)",
            "prompt: 'question', chosen: 'better', rejected: 'worse'",
        ),
        (
            ("question", "better", "worse"),
            None,
            "(prompt, chosen, rejected) nor (conversations, chosen, rejected) nor (prompt, responses, scores)",
            "prompt: 'question', chosen: 'better', rejected: 'worse'",
        ),
        (
            ("question", "first", "second"),
            "dpo",
            "(prompt, chosen, rejected) nor (conversations, chosen, rejected) nor (prompt, responses, scores)",
            "prompt: 'question', chosen: 'NAME', rejected: 'NAME'",
        ),
        (
            ("question", "better", "worse"),
            "sft",
            "(question, answer) nor (prompt, completion) nor (messages)",
            "question: 'question', answer: 'NAME'",
        ),
        (
            ("question", "anwser"),
            "dpo",
            "(question, answer) nor (prompt, chosen, rejected) nor (conversations, chosen, rejected)",
            "question: 'question', answer: 'anwser'",
        ),
    ],
)
def test_columns_of_no_schema_are_told_with_those_that_the_stage_takes(
    columns: tuple[str, ...], stage: Any, sets: str, example: str
) -> None:
    with pytest.raises(DataError) as error:
        schema_of(section(), dict.fromkeys(columns, "x"), stage)
    assert str(error.value) == (
        f"the columns found are {', '.join(map(repr, columns))}, neither {sets} nor another set of docs/data.md; say which is "
        f"which, as in columns: {{{example}}}, or name a function with convert"
    )


@pytest.mark.parametrize(
    ("row", "what"), [(7, "7"), ([1], "a list"), (None, "None"), ("x" * 99, "'" + "x" * 60 + "…'")]
)
def test_a_row_is_an_object(row: Any, what: str) -> None:
    with pytest.raises(DataError) as error:
        read_examples(row, SCHEMAS[0], section())
    assert str(error.value) == f"a row must be an object with columns, not {what}"


# ---- whatever stands in a row ------------------------------------------------------------------------------------------

TEXTS = st.one_of(
    st.text(max_size=5),
    st.sampled_from(
        [
            "user",
            "assistant",
            "human",
            "gpt",
            "function_call",
            "observation",
            "tool",
            "system",
            "",
            " ",
            "\ud800",
            "[",
            "{",
        ]
    ),
    st.sampled_from(['{"name": "f", "arguments": {}}', "[]", '[{"role": "user", "content": "x"}]', "NaN", "\x00"]),
    st.sampled_from(["Human: p\n\nAssistant: c", "\n\nHuman: p\n\nAssistant: r", "</s>", "<extra_id_1>Assistant\n"]),
)
TURN_KEYS = ("role", "content", "from", "value", "train", "weight", "tool_calls", "function_call", "tool_call_id")
CALL_KEYS = ("function", "name", "arguments", "id", "type", "text", "reasoning", "thinking", "x")
KEYS = st.sampled_from((*TURN_KEYS, *CALL_KEYS))
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.just(10**400), st.floats(), TEXTS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=12,
)
CALLS = st.fixed_dictionaries({"name": TEXTS, "arguments": VALUES}, optional={"id": TEXTS, "function": VALUES})
TURNS = st.fixed_dictionaries(
    {"role": TEXTS, "content": st.one_of(TEXTS, VALUES)},
    optional={
        "from": TEXTS,
        "value": VALUES,
        "train": st.one_of(st.booleans(), VALUES),
        "weight": VALUES,
        "tool_calls": st.one_of(st.lists(CALLS, max_size=2), VALUES),
        "tool_call_id": SCALARS,
        "function_call": VALUES,
        "reasoning_content": VALUES,
    },
)
CELLS = st.one_of(
    VALUES, TEXTS, st.lists(TURNS, max_size=4), st.lists(TEXTS, max_size=3), st.lists(SCALARS, max_size=3)
)
ANYTHING = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@st.composite
def rows(draw: st.DrawFn, schema: Schema) -> dict[str, Any]:
    needed = {column: draw(CELLS) for column in schema.required}
    return needed | draw(st.dictionaries(st.sampled_from([*schema.optional, "x"]), CELLS, max_size=2))


def check_messages(messages: Sequence[dict[str, Any]]) -> None:
    for message in messages:
        assert message["role"] in ROLES
        assert isinstance(message["content"], str)
        assert set(message) <= {"role", "content", "tool_calls", "train"}
        assert message.get("train", False) is False
        assert message["role"] == "assistant" or "tool_calls" not in message
        assert message.get("tool_calls", [True])
    assert canonical_messages(messages) == list(messages)
    dump_json(messages).encode()


def check_example(example: Example) -> None:
    """Canonical, and fit for UTF-8 and for JSON."""
    if isinstance(example, Conversation):
        check_messages(example.messages)
        assert any(message["role"] == "assistant" for message in example.messages)
    elif isinstance(example, Preference):
        assert example.prompt[-1]["role"] in ("user", "tool")
        for reply in (example.chosen, example.rejected):
            check_messages([*example.prompt, *reply])
            assert [message["role"] for message in reply] == ["assistant"]
            assert not any("train" in message for message in reply)
    else:
        texts = [value for value in vars(example).values() if value is not None]
        assert all(isinstance(text, str) and text.strip() for text in texts)
        "".join(texts).encode()
    if isinstance(example, (Conversation, Preference)):
        assert canonical_tools(list(example.tools)) == list(example.tools)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: "-".join(schema.required))
@ANYTHING
@given(data=st.data())
def test_whatever_a_row_holds_gives_canonical_examples_or_a_data_error(schema: Schema, data: st.DataObject) -> None:
    row = data.draw(rows(schema))
    message = ""
    try:
        examples = read_examples(row, schema, section())
    except DataError as error:
        message, examples = str(error), []
    assert bool(message) != (len(examples) == 1)
    assert message.isprintable()
    for example in examples:
        check_example(example)


@ANYTHING
@given(messages=st.lists(TURNS, max_size=5), tools=CELLS)
def test_whatever_turns_hold_gives_canonical_messages_or_a_data_error(messages: list[Any], tools: Any) -> None:
    row = {"messages": messages, "tools": tools}
    try:
        (example,) = read_examples(row, detect_schema(row), section(roles={"x": "assistant"}))
    except DataError:
        return
    check_example(example)


@ANYTHING
@given(row=VALUES)
def test_whatever_a_row_is_gives_examples_or_a_data_error(row: Any) -> None:
    for schema in SCHEMAS:
        try:
            read_examples(row, schema, section())
        except DataError:
            continue


def test_a_row_nested_out_of_all_bounds_is_a_data_error() -> None:
    value: Any = "x"
    for _ in range(20_000):
        value = [value]
    for schema in SCHEMAS:
        with pytest.raises(DataError):
            read_examples(dict.fromkeys([*schema.required, *schema.optional], value), schema, section())
