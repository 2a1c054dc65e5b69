"""Templates that write a turn otherwise once later turns are there, or mark nothing, are found; ours never does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hymba_align.data.inspection import check
from hymba_align.data.inspection.findings import CheckReport
from hymba_align.data.reading.examples import Conversation
from hymba_align.data.reading.messages import canonical_messages
from hymba_align.data.rendering import prefix_is_rewritten, render
from hymba_align.data.template import template_text
from tests.data.inspection.checked_rows import GOOD, GOOD_PAIR, SIMPLE_TEMPLATE, messages, with_template

ROWS_FOR_PREFIXES = (
    messages(("user", "hi"), ("assistant", "hm yes"), ("user", "so"), ("assistant", "no")),
    messages(("user", "hi"), ("assistant", "hm yes")),
    messages(("user", "hi"), ("assistant", "yes"), ("user", "so"), ("assistant", "hm no")),
)


def test_rows_that_a_template_writes_otherwise_once_a_reply_is_there_are_found(
    report: Callable[..., CheckReport], small: Any, tmp_path: Path
) -> None:
    # Headers tell whether the last reply hesitates, which no prompt can know.
    rewriting = SIMPLE_TEMPLATE.replace(
        "{{ message['role'] ~ ': ' }}",
        "{{ message['role'] ~ ('+: ' if messages[-1]['role'] == 'assistant' and 'hm' in messages[-1]['content'] else ': ') }}",
    )
    good = messages(("user", "hi"), ("assistant", "yes"), ("user", "so"), ("assistant", "no"))
    found = report(*ROWS_FOR_PREFIXES, good, tokenizer=with_template(small, rewriting), max_length=200)
    assert {(one.kind, one.place.rpartition(":")[2]) for one in found.findings} == {
        ("prefix rewritten", "1"),
        ("prefix rewritten", "2"),
        ("prefix rewritten", "3"),
    }
    assert found.findings[0].message == ("the chat template writes a turn otherwise once later turns are there")
    assert found.findings[0].fix == "use base.chat_template: hymba, or correct the template"
    assert found.allowed


def test_a_foreign_template_that_keeps_prefixes_gives_no_finding(
    report: Callable[..., CheckReport], small: Any
) -> None:
    found = report(*ROWS_FOR_PREFIXES, tokenizer=with_template(small, SIMPLE_TEMPLATE), max_length=200)
    assert found.findings == ()


def test_a_pair_whose_prompt_the_template_rewrites_is_lost(
    report: Callable[..., CheckReport], small: Any, tmp_path: Path
) -> None:
    rewriting = SIMPLE_TEMPLATE.replace(
        "{{ message['role'] ~ ': ' }}", "{{ message['role'] ~ (': ' if add_generation_prompt else '! ') }}"
    )
    found = report(GOOD_PAIR, GOOD_PAIR | {"prompt": "hello"}, tokenizer=with_template(small, rewriting))
    lost = found.of_kind("prefix rewritten")
    assert [(one.place.rpartition(":")[2], one.message, one.fix, one.loses_row) for one in lost] == [
        (line, "the chat template rewrites the prompt when a reply follows", "use chat_template: hymba", True)
        for line in "12"
    ]
    assert found.of_kind("cannot be prepared")  # since none is left
    assert found.exit_code == 1


def test_the_template_s_own_text_is_not_checked_row_by_row(
    report: Callable[..., CheckReport], small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> bool:
        raise AssertionError("the property is proven below")

    monkeypatch.setattr(check, "prefix_is_rewritten", never)
    assert small.chat_template == template_text()
    assert report(*ROWS_FOR_PREFIXES, max_length=200).findings == ()


def test_a_template_without_marks_cannot_be_trained_with(report: Callable[..., CheckReport], small: Any) -> None:
    unmarked = SIMPLE_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    (one,) = report(GOOD, tokenizer=with_template(small, unmarked)).findings
    assert one.kind == "cannot be prepared"
    assert one.message == (
        "the chat template does not mark what the assistant writes ({% generation %}), so nothing would be trained"
    )
    assert one.fix == "use chat_template: hymba"


# ---- the property that spares our template the check -----------------------------------------------------------------


PIECES = ["a", "7", " ", "\n", "</s>", "<s>", "<extra_id_1>", "Assistant", "é", "\u2581", "["]
SAID = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
CALL = st.builds(
    lambda name, value: {"type": "function", "function": {"name": name, "arguments": json.dumps({"x": value})}},
    st.sampled_from(["f", "</toolcall>"]),
    SAID,
)  # fmt: skip
TURN = st.one_of(
    st.builds(lambda said: {"role": "user", "content": said}, SAID),
    st.builds(lambda said: {"role": "tool", "content": said}, SAID),
    st.builds(lambda said: {"role": "assistant", "content": said or "x"}, SAID.map(str.strip)),
    st.builds(
        lambda said, calls: {"role": "assistant", "content": said, "tool_calls": calls},
        SAID,
        st.lists(CALL, min_size=1, max_size=2),
    ),
)
TOOLS = st.lists(st.builds(lambda said: {"name": "f", "description": said}, SAID), max_size=2)


@pytest.mark.parametrize("name", ["small", "released"])
def test_this_package_s_template_never_rewrites_a_prefix(load: Callable[[str], Any], name: str) -> None:
    tokenizer = load(name)

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(SAID, max_size=2), st.lists(TURN, min_size=1, max_size=7), TOOLS)
    def holds(systems: list[str], turns: list[dict[str, Any]], tools: list[dict[str, Any]]) -> None:
        whole = [*({"role": "system", "content": said} for said in systems), *turns]
        whole.append({"role": "assistant", "content": "end"})
        conversation = Conversation(canonical_messages(whole), tools)
        rendered = render(tokenizer, whole, tools)
        assert not prefix_is_rewritten(tokenizer, conversation, rendered)

    holds()
