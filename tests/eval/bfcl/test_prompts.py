"""What a model reads of a BFCL problem: its chat template's tools block, as in training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hymba_align.data.template import load_tokenizer
from hymba_align.errors import RenderError
from hymba_align.eval.bfcl.categories import SINGLE_TURN
from hymba_align.eval.bfcl.client import BFCLClient
from hymba_align.eval.bfcl.prompts import prompts_of, question_of

RELEASED = Path(__file__).resolve().parents[4] / "shared" / "hymba_1_5b"
TOOL = re.compile(r"^<tool> (.*) </tool>$", re.MULTILINE)


def test_the_first_problem_reads_so(client: BFCLClient, tokenizer: Any) -> None:
    (ids,) = prompts_of(tokenizer, client.entries("simple_python")[:1])
    assert tokenizer.decode(ids) == (
        '<extra_id_0>System\n<tool> {"name": "calculate_triangle_area", "description": "Calculate the area of a triangle '
        'given its base and height. Note that the provided function is in Python 3 syntax.", "parameters": {"type": '
        '"object", "properties": {"base": {"type": "integer", "description": "The base of the triangle."}, "height": '
        '{"type": "integer", "description": "The height of the triangle."}, "unit": {"type": "string", "description": '
        '"The unit of measure (defaults to \'units\' if not specified)"}}, "required": ["base", "height"]}} </tool>'
        "\n\n<extra_id_1>User\nFind the area of a triangle with a base of 10 units and height of 5 units.\n"
        "<extra_id_1>Assistant\n"
    )


@pytest.mark.parametrize("category", SINGLE_TURN)
def test_prompts_are_what_the_chat_template_writes(client: BFCLClient, tokenizer: Any, category: str) -> None:
    entries = client.entries(category)[::40]
    for entry, ids in zip(entries, prompts_of(tokenizer, entries), strict=True):
        text = tokenizer.apply_chat_template(
            entry["question"][0], tools=entry["tools"] or None, add_generation_prompt=True, tokenize=False
        )
        assert tokenizer.decode(ids) == text


def test_every_function_is_a_json_schema_with_its_own_name(client: BFCLClient, tokenizer: Any) -> None:
    entries = client.entries("multiple")
    for entry, ids in zip(entries, prompts_of(tokenizer, entries), strict=True):
        tools = [json.loads(text) for text in TOOL.findall(tokenizer.decode(ids))]
        assert tools == entry["tools"]
        names = [name for call in entry["target"] for name in call]
        assert set(names) <= {tool["name"] for tool in tools}
        for tool in tools:
            assert set(tool) == {"name", "description", "parameters"}
            assert tool["parameters"]["type"] == "object"
            kinds = {values["type"] for values in tool["parameters"]["properties"].values()}
            assert kinds <= {"string", "integer", "number", "boolean", "array", "object"}
    dotted = [name for entry in entries for call in entry["target"] for name in call if "." in name]
    assert len(dotted) > 50  # the package's conversion for OpenAI makes underscores of them


@pytest.mark.parametrize(("category", "language"), [("simple_java", "Java"), ("simple_javascript", "JavaScript")])
def test_parameters_of_other_languages_are_asked_for_as_strings(
    client: BFCLClient, category: str, language: str
) -> None:
    for entry in client.entries(category):
        for parameter in entry["tools"][0]["parameters"]["properties"].values():
            assert parameter["type"] == "string"
            assert f"{language} " in parameter["description"]
            assert parameter["description"].find("in string representation") > 0


def test_a_problems_own_system_message_stands_before_the_tools(client: BFCLClient, tokenizer: Any) -> None:
    entries = [entry for entry in client.entries("live_simple") if entry["question"][0][0]["role"] == "system"]
    (ids,) = prompts_of(tokenizer, entries[:1])
    system = entries[0]["question"][0][0]["content"].strip()
    assert tokenizer.decode(ids).startswith(f"<extra_id_0>System\n{system}\n\n<tool> ")
    assert len(entries) == 11


def test_the_released_template_is_used_where_a_checkpoint_asks_for_it(client: BFCLClient) -> None:
    if not RELEASED.is_dir():
        pytest.skip("the released tokenizer is not beside the repository")
    tokenizer = load_tokenizer(str(RELEASED), chat_template="released")
    (entry,) = client.entries("multiple")[:1]
    (ids,) = prompts_of(tokenizer, [entry])
    assert [json.loads(text) for text in TOOL.findall(tokenizer.decode(ids))] == entry["tools"]


def test_a_problem_that_the_template_refuses_is_named(client: BFCLClient, tmp_path: Path) -> None:
    template = tmp_path / "refuses.jinja"
    template.write_text("{{ raise_exception('no tools here') }}")
    tokenizer = load_tokenizer("data/arithmetic/tokenizer", chat_template=str(template))
    with pytest.raises(RenderError) as raised:
        prompts_of(tokenizer, client.entries("multiple")[:1])
    assert str(raised.value) == ("BFCL's problem multiple_0: the chat template refuses the conversation: no tools here")


def test_ground_truth_is_no_part_of_a_prompt(client: BFCLClient, tokenizer: Any) -> None:
    (entry,) = client.entries("simple_python")[:1]
    changed = {**entry, "target": "something else"}
    assert prompts_of(tokenizer, [entry]) == prompts_of(tokenizer, [changed])


def test_people_read_what_the_user_says_and_who_else_speaks() -> None:
    turns = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        [{"role": "user", "content": "And?"}],
    ]
    assert question_of({"question": turns}) == "system: Be brief.\n\nHello\n\nAnd?"
