"""What of a model's calls may run: attacks, arbitrary texts, and every call of the ground truth."""

from __future__ import annotations

import ast
import re
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hymba_align.eval.bfcl.call_check import MAX_CHARACTERS, REFUSED, CheckedCall, check_call
from hymba_align.eval.bfcl.client import BFCLClient

NAMES = ("cd", "sort", "tail", "x07", "add")
INSTANCE = "hymba_multi_turn_base_0_GorillaFileSystem_instance"
PLAIN = "arguments must be plain values: text, numbers, True, False, None, lists, tuples and dicts"

ATTACKS = [
    # not a call of a function by its name
    "",
    "cd",
    "1",
    "cd('a'), cd('b')",
    "[cd('a')]",
    "cd('a') or cd('b')",
    "cd('a') if 1 else cd('b')",
    "cd('a').__class__",
    "cd('a')[0]",
    "cd.__globals__",
    "cd.__call__('a')",
    "cd.__self__.__init__('a')",
    "self.cd('a')",
    "os.cd('a')",
    "().cd('a')",
    "(lambda: cd)()('a')",
    "cd('a')('b')",
    "[cd][0]('a')",
    "{'f': cd}['f']('a')",
    "(f := cd)('a')",
    "(yield cd('a'))",
    "await cd('a')",
    "not cd('a')",
    "*cd('a')",
    # more than an expression
    "cd('a'); import os",
    "cd('a')\nimport os",
    "cd('a')\r\nimport os",
    "cd('a')\x0cimport os",
    "import os",
    "x = cd('a')",
    "def cd(): pass",
    "@cd\ndef f(): pass",
    "del cd",
    "cd('a') #\nimport os",
    "cd('a') \\\n; import os",
    # other functions
    "eval('1')",
    "exec('import os')",
    "__import__('os')",
    "open('/etc/passwd')",
    "getattr('a', 'b')",
    "globals()",
    "type('a')",
    "breakpoint()",
    "exit()",
    "kill(1)",
    "execute_multi_turn_func_call('a')",
    f"{INSTANCE}('a')",
    # arguments that are more than values
    "cd(cd('a'))",
    "cd(__import__('os').system('true'))",
    "cd(folder=open('/etc/passwd'))",
    "cd(folder=os)",
    "cd(folder=__builtins__)",
    "cd(folder='a'.__class__)",
    "cd(folder='{0.__class__}'.format(1))",
    "cd(folder='%s' % 1)",
    "cd(folder=f'{__import__(\"os\")}')",
    "cd(folder=f'')",
    "cd(folder=(lambda: 1)())",
    "cd(folder=lambda: 1)",
    "cd(folder=[x for x in ().__class__.__base__.__subclasses__()])",
    "cd(folder={x: 1 for x in 'a'})",
    "cd(folder=(x for x in 'a'))",
    "cd(folder=(x := 1))",
    "cd(*['a'])",
    "cd(*'a')",
    "cd(**{'folder': 'a'})",
    "cd(folder=[*'a'])",
    "cd(folder={**{}})",
    "cd(folder='a' 'b' + 'c')",
    "cd(folder='a' * 10**9)",
    "cd(9**9**9)",
    "cd(1 << 10**9)",
    "cd([0] * 10**9)",
    "cd(folder='a' if 1 else 'b')",
    "cd(folder='a' and 'b')",
    "cd(folder=not 1)",
    "cd(folder=~1)",
    "cd(folder=-'a')",
    "cd(folder=-True)",
    "cd(folder=--1)",
    "cd(folder=1 < 2)",
    "cd(folder='abc'[0])",
    "cd(folder='abc'[::-1])",
    "cd(folder={1, 2})",
    "cd(folder=b'a')",
    "cd(folder=1j)",
    "cd(folder=1+2j)",
    "cd(folder=...)",
    "cd(folder=None is None)",
    "cd(folder=yield)",
    "cd('a', folder='b', folder='c')",
    # size and depth
    f"cd({'9' * 5000})",
    f"cd({2**64})",
    f"cd(0x{'f' * 5000})",
    "cd(" + "[" * 50 + "]" * 50 + ")",
    "cd(" + "[" * 9000 + "]" * 9000 + ")",
    "cd(" + "(" * 9000 + "1" + ")" * 9000 + ")",
    "cd(" + "-" * 15000 + "1)",
    "cd(" + "1," * 9000 + ")",
    "cd({" * 3000,
    "cd(" + ",".join(f"a{number}=1" for number in range(51)) + ")",
    f"cd('{'a' * MAX_CHARACTERS}')",
    "cd(" + "{(" * 20 + "1," + "):1}" * 20 + ")",
    # text that is not what it looks like
    "ｃd('a')",
    "cd(ｆolder='a')",
    "𝖼𝖽('a')",
    "сd('a')",
    "cd(folder\u200b='a')",
    "cd\u200b('a')",
    "cd('a'\x00)",
    "cd('\x00')",
    "cd('\ud800')",
    "cd('\\ud800')",
    "cd('\\N{no such name}')",
    "cd('\\x4')",
    "cd('a\nb')",
    "cd('a",
    "cd('a')\\",
    "cd(𝟏)",
    # a key of a JSON object that is no name, as bfcl-eval writes it
    "cd(a=1, b=__import__('os').system('true'), c='x')",
    "cd(a b='x')",
    "cd(='x')",
    "cd(1='x')",
    "cd(None='x')",
    "cd(a.b='x')",
]


@pytest.mark.parametrize("text", ATTACKS, ids=range(len(ATTACKS)))
def test_anything_but_a_plain_call_is_refused(text: str) -> None:
    call = check_call(text, NAMES)
    assert call.text == REFUSED
    assert call.refusal.startswith("Error during execution: ")


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("rm('a')", "name 'rm' is not defined"),
        ("cd(f('a'))", PLAIN),
        ("cd('a') + 1", "not a call of a function by its name"),
        ("cd('a'", "invalid syntax"),
        ("cd(**{})", "keyword arguments must be named, each once, and at most 50"),
        ("ｃd('a')", "names must be written in ASCII"),
        ("cd(18446744073709551616)", "an integer of more than 64 bits"),
        ("cd('\\ud800')", "half of a surrogate pair in a text"),
        ("cd(" + "[" * 20 + "]" * 20 + ")", "values are nested more than 12 deep"),
        ("cd([" + "1," * 2000 + "])", "the call has more than 2,000 values"),
        ("cd('" + "a" * 20_000 + "')", "the call has 20,006 characters, above the limit of 20,000"),
    ],
)
def test_the_model_reads_why_its_call_was_refused(text: str, refusal: str) -> None:
    assert check_call(text, NAMES) == CheckedCall("refused_call()", f"Error during execution: {refusal}")


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("cd('a')", "cd('a')"),
        ('  cd ( folder = "a" ) # there', "cd(folder='a')"),
        ("(cd)('a' 'b')", "cd('ab')"),
        ("cd('''a\nb''')", "cd('a\\nb')"),
        ("sort(-1, +2, 1.5, x=[True, None, {'a': (1, 'b')}])", "sort(-1, +2, 1.5, x=[True, None, {'a': (1, 'b')}])"),
        ("cd('\\x63d(\\u0041)')", "cd('cd(A)')"),
        ("cd(1e999)", "cd(1e309)"),
        ("cd('\\q')", "cd('\\\\q')"),
    ],
)
def test_a_plain_call_is_written_anew(text: str, canonical: str) -> None:
    assert check_call(text, NAMES) == CheckedCall(canonical)


values = st.recursive(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"])),
        st.integers(-(2**64) + 1, 2**64 - 1),
        st.floats(allow_nan=False, allow_infinity=False),
        st.booleans(),
        st.none(),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text("ab'\\\n(", max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
# What the official regular expression changes within strings, and what could end one.
spiteful = st.lists(
    st.sampled_from(
        [
            *NAMES,
            "ail",
            "(",
            ")",
            " ",
            "\n",
            "\t",
            "\\",
            "'",
            '"',
            "'''",
            "x",
            "u",
            "N{",
            "\x07",
            "é",
            "\u2028",
            "#",
            ",",
        ]
    )
).map("".join)


@given(st.sampled_from(NAMES), st.dictionaries(st.sampled_from(["a", "b", "folder"]), values))
def test_values_come_through_unchanged(name: str, arguments: dict[str, Any]) -> None:
    text = f"{name}({','.join(f'{key}={value!r}' for key, value in arguments.items())})"
    call = check_call(text, NAMES)
    assert call.refusal == ""
    assert eval(call.text, {name: lambda **given: given}) == arguments
    assert check_call(call.text, NAMES) == call


@given(
    st.one_of(
        st.text(), spiteful, spiteful.map(lambda inner: f"cd({inner})"), spiteful.map(lambda s: f"cd({s!r}, a=[{s!r}])")
    )
)
def test_whatever_passes_is_one_call_with_literals_before_and_after_names_are_replaced(text: str) -> None:
    call = check_call(text, NAMES)
    if call.refusal:
        assert call.text == REFUSED
        return
    assert_plain(call.text, ast.Name)
    assert_plain(as_the_official_executor_has_it(call.text), ast.Attribute)


def assert_plain(text: str, function: type[ast.expr]) -> None:
    with warnings.catch_warnings(action="ignore"):  # a name put after a backslash makes '\h', which is no escape
        call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call)
    assert isinstance(call.func, function)
    for value in [*call.args, *(keyword.value for keyword in call.keywords)]:
        ast.literal_eval(value)


def as_the_official_executor_has_it(text: str) -> str:
    """The object's name before each function's, as bfcl_eval's `_process_method_calls` puts it; test_sandbox.py compares."""
    return re.sub(
        r"\b([a-zA-Z_]\w*)\s*(?=\()",
        lambda found: f"{INSTANCE}.{found[1]}" if found[1] in NAMES else found[1],
        text,
    )


def test_every_call_of_the_ground_truth_passes(client: BFCLClient) -> None:
    count = 0
    for category in ("base", "miss_func", "miss_param", "long_context"):
        for entry in client.entries(f"multi_turn_{category}"):
            later = [tool for tools in entry.get("missed_tools", {}).values() for tool in tools]
            names = {tool["name"] for tool in [*entry["tools"], *later]}
            for call in [call for turn in entry["target"] for call in turn]:
                assert check_call(call, names).refusal == ""
                count += 1
    assert count == 4625
