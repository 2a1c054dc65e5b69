"""What a perfect model, and useless ones, get of BFCL through our decoding and the official checker."""

from __future__ import annotations

from types import ModuleType

import pytest

from hymba_align.eval.bfcl.categories import SINGLE_TURN
from hymba_align.eval.bfcl.client import BFCLClient
from hymba_align.eval.bfcl.score import NEVER_CALLS

# Right of all, as toolcalls and as a plain list. What is missing is wrong in the data: ground truth with arguments that
# the function does not have, or without one that it requires (parallel_multiple 12 and 26, live_simple 106 and 112,
# live_multiple 862 and 964), lists of mixed values whose numbers the official reader of Java makes text (36, 65), and a
# text where the possible values should be listed, of which the checker accepts single letters (simple_java_64).
# JavaScript 5 has a quote inside a string, which the plain list escapes and the official reader leaves escaped.
RIGHT = {
    "simple_python": (400, 400, 400),
    "simple_java": (97, 97, 100),
    "simple_javascript": (50, 49, 50),
    "multiple": (200, 200, 200),
    "parallel": (200, 200, 200),
    "parallel_multiple": (198, 198, 200),
    "live_simple": (256, 256, 258),
    "live_multiple": (1051, 1051, 1053),
    "live_parallel": (16, 16, 16),
    "live_parallel_multiple": (24, 24, 24),
}
# What the package itself gives to its own ground truth.
OFFICIAL = {
    "simple_python": 400,
    "multiple": 200,
    "parallel": 200,
    "parallel_multiple": 198,
    "live_simple": 256,
    "live_multiple": 1050,
    "live_parallel": 16,
    "live_parallel_multiple": 24,
}
PROSE = (
    "I would call the function with the values that you gave me.",
    "Sure! Here is the answer: 42",
    "None",
    "",
    "[]",
    "```json\n{}\n```",
    "<toolcall> I cannot do that </toolcall>",
    '<toolcall> {"name": "f", "arguments": {"a": 1}}',
    "def f(a):\n    return a",
)


def right(client: BFCLClient, category: str, answers: dict[str, str]) -> int:
    return sum(grade.correct for grade in client.grade(category, answers))


@pytest.mark.parametrize("category", RIGHT)
def test_the_ground_truth_scores_what_the_package_gives_it_in_both_formats(
    client: BFCLClient, oracle: ModuleType, category: str
) -> None:
    calls = {entry["id"]: oracle.right_calls(entry) for entry in client.entries(category)}
    toolcalls = right(client, category, {name: oracle.as_toolcalls(one) for name, one in calls.items()})
    plain = right(client, category, {name: oracle.as_plain_list(one) for name, one in calls.items()})
    assert (toolcalls, plain, len(calls)) == RIGHT[category]
    assert min(toolcalls, plain) >= OFFICIAL.get(category, 0)


@pytest.mark.parametrize("category", RIGHT)
def test_wrong_function_names_score_nothing_in_either_format(
    client: BFCLClient, oracle: ModuleType, category: str
) -> None:
    calls = {
        entry["id"]: [(f"{name}2", arguments) for name, arguments in oracle.right_calls(entry)]
        for entry in client.entries(category)
    }
    assert right(client, category, {name: oracle.as_toolcalls(one) for name, one in calls.items()}) == 0
    assert right(client, category, {name: oracle.as_plain_list(one) for name, one in calls.items()}) == 0


@pytest.mark.parametrize("category", [*RIGHT, "live_relevance"])
def test_prose_scores_nothing(client: BFCLClient, category: str) -> None:
    identifiers = [entry["id"] for entry in client.entries(category)]
    answers = {name: PROSE[place % len(PROSE)] for place, name in enumerate(identifiers)}
    assert right(client, category, answers) == 0


@pytest.mark.parametrize("category", ["irrelevance", "live_irrelevance"])
def test_a_model_that_never_calls_gets_all_of_irrelevance(client: BFCLClient, category: str) -> None:
    identifiers = [entry["id"] for entry in client.entries(category)]
    answers = {name: [*PROSE, NEVER_CALLS][place % (len(PROSE) + 1)] for place, name in enumerate(identifiers)}
    assert right(client, category, answers) == len(identifiers) > 200


@pytest.mark.parametrize(
    ("category", "expected"), [("irrelevance", 0), ("live_irrelevance", 0), ("live_relevance", 16)]
)
def test_any_call_is_wrong_for_irrelevance_and_right_for_relevance(
    client: BFCLClient, category: str, expected: int
) -> None:
    call = '<toolcall> {"name": "made_up", "arguments": {}} </toolcall>'
    entries = client.entries(category)
    assert right(client, category, {entry["id"]: call for entry in entries}) == expected


def test_the_categories_have_their_official_sizes(client: BFCLClient) -> None:
    sizes = {category: len(client.entries(category)) for category in SINGLE_TURN}
    others = {"irrelevance": 240, "live_irrelevance": 884, "live_relevance": 16}
    assert sizes == {**{category: counts[2] for category, counts in RIGHT.items()}, **others}
