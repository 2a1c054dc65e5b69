"""The schemas that rows may have, told by their columns, and rows read into examples.

| schema            | columns                                                    | serves                               |
|-------------------|------------------------------------------------------------|--------------------------------------|
| preference        | prompt, chosen, rejected [, system, tools]                 | DPO; texts or messages               |
|                   | conversations, chosen, rejected [, system, tools]          | DPO; as LLaMA-Factory writes them    |
|                   | chosen, rejected [, system, tools]                         | DPO; whole conversations             |
| ranked            | prompt, responses, scores [, system, tools]                | DPO                                  |
| prompt_completion | prompt, completion [, system, tools]                       | SFT; texts or messages               |
| messages          | messages [, tools]                                         | SFT                                  |
| sharegpt          | conversations [, system, tools]                            | SFT                                  |
| alpaca            | instruction, output [, input, system, history]             | SFT                                  |
| question_answer   | question, answer [, wrong_answer]                          | SFT; DPO with wrong_answer or a made one |
| text              | text                                                       | SFT                                  |

The first whose required columns are all there is taken. Turns are objects with `role` and `content`, or with `from` and
`value`, in every schema. `columns` in the recipe says what the file calls a column, or those keys; `roles` what a role of
the file means.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from hymba_align.data.reading import formats
from hymba_align.data.reading.examples import Example
from hymba_align.data.reading.json_text import MOST_LEVELS, shown
from hymba_align.data.reading.messages import CALLS, CANONICAL, TurnStyle
from hymba_align.errors import ColumnsError, DataError
from hymba_align.recipe import SchemaName, SourceSection, TrainingStage

TURN_KEYS = ("role", "content")  # what `columns` may rename besides columns
COLUMNS_SHOWN, SETS_SHOWN = 8, 3  # in a message
MAPPING, MAPPING_ENDS = "as in columns: {", "}, or name a function with convert"
"""Around an example of `columns`, so that whoever asks can say it in words of its own"""
HALF = 0.5  # of a schema's columns, found under its own names
OFTEN = {  # what files call a column that is not like its name
    "prompt": ("question", "instruction", "query"),
    "chosen": ("better", "preferred", "accepted", "good"),
    "rejected": ("worse", "dispreferred", "bad"),
}
COMMONEST = ("prompt_completion", "messages", "question_answer")  # shown where nothing found is like anything known
COMMON = TurnStyle(
    ("role", "from"),
    ("content", "value"),
    {
        **CANONICAL.roles,
        "human": "user",
        "gpt": "assistant",
        "developer": "system",
        **dict.fromkeys(("function", "observation", "function_response", "tool_response"), "tool"),
        **dict.fromkeys((CALLS, "tool_call"), CALLS),
    },
)


@dataclass(frozen=True)
class Schema:
    """The columns of one kind of row, the stages that it serves, and what reads it."""

    name: SchemaName
    required: tuple[str, ...]
    optional: tuple[str, ...]
    stages: frozenset[str]
    read: Callable[[Mapping[str, Any], TurnStyle], Example]

    def ignored(self, columns: Collection[str]) -> tuple[str, ...]:
        """Columns (by their canonical names, see `canonical_columns`) that this schema does not read, sorted."""
        return tuple(sorted(set(map(str, columns)) - {*self.required, *self.optional}))


SFT, DPO = frozenset({"sft"}), frozenset({"dpo"})
CONTEXT = ("system", "tools")
SCHEMAS = (
    Schema("preference", ("prompt", "chosen", "rejected"), CONTEXT, DPO, formats.read_preference),
    Schema("preference", ("conversations", "chosen", "rejected"), CONTEXT, DPO, formats.read_sharegpt_preference),
    Schema("ranked", ("prompt", "responses", "scores"), CONTEXT, DPO, formats.read_ranked),
    Schema("preference", ("chosen", "rejected"), CONTEXT, DPO, formats.read_implicit_preference),
    Schema("prompt_completion", ("prompt", "completion"), CONTEXT, SFT, formats.read_prompt_completion),
    Schema("messages", ("messages",), ("tools",), SFT, formats.read_messages),
    Schema("sharegpt", ("conversations",), CONTEXT, SFT, formats.read_sharegpt),
    Schema("alpaca", ("instruction", "output"), ("input", "system", "history"), SFT, formats.read_alpaca),
    Schema("question_answer", ("question", "answer"), ("wrong_answer",), SFT | DPO, formats.read_question_answer),
    Schema("text", ("text",), (), SFT, formats.read_text),
)


def detect_schema(columns: Collection[str], stage: TrainingStage | None = None) -> Schema:
    """The first schema whose required columns are all there.

    Raises: DataError naming the columns found and the accepted sets, nearest first; with a stage, of those that it takes.
    """
    schema = _first_fitting(columns, SCHEMAS)
    if schema is None:
        nearest = _nearest_schemas(columns, stage)
        sets = " nor ".join(f"({', '.join(one.required)})" for one in nearest)
        raise ColumnsError(
            f"the columns found are {_named(columns)}, neither {sets} nor another set of docs/data.md; say which is which, "
            f"{MAPPING}{_mapping(nearest[0], columns)}{MAPPING_ENDS}"
        )
    return schema


def _nearest_schemas(columns: Collection[str], stage: TrainingStage | None) -> list[Schema]:
    """The few schemas to show where none fits: the nearest, but for DPO, and where there is a better and a worse answer,
    those of preferences, unless another has more than half of its columns there.
    """
    served = [schema for schema in SCHEMAS if stage is None or stage in schema.stages]
    likeness = partial(_likeness, columns=columns)
    nearest = sorted(served, key=likeness, reverse=True)[:SETS_SHOWN]
    rated = stage is None and all(_meant(name, columns) for name in ("chosen", "rejected"))
    if (stage == "dpo" or rated) and likeness(nearest[0]) <= HALF:
        return [schema for schema in served if "dpo" in schema.stages][:SETS_SHOWN]
    if not likeness(nearest[0]):
        return [schema for schema in served if schema.name in COMMONEST]
    return nearest


def schema_of(section: SourceSection, first_row: Mapping[str, Any], stage: TrainingStage | None = None) -> Schema:
    """The schema of a source's rows: the one that the recipe names, else the one that the first row's columns tell.

    `stage`, where it is known, decides what an error offers.
    Raises: DataError where the columns do not fit, or `columns` names what is not there.
    """
    for canonical, name in section.columns.items():
        if canonical not in TURN_KEYS and name not in first_row:
            raise ColumnsError(
                f"columns says that {canonical} is called {shown(name)}, and the first row has only "
                f"{_named(first_row)}; correct the name, or give the first row that column (null will do)"
            )
    columns = canonical_columns(first_row, section)
    if section.format is None:
        schema = detect_schema(columns, stage)
    else:
        named = [schema for schema in SCHEMAS if schema.name == section.format]
        fitting = _first_fitting(columns, named)
        if fitting is None:
            raise ColumnsError(
                f"format is {section.format}, which takes {_accepted(named, columns)}, and the columns found are "
                f"{_named(columns)}; correct format, or map the columns in the recipe with columns"
            )
        schema = fitting
    for canonical in section.columns:
        if canonical not in (*schema.required, *schema.optional, *TURN_KEYS):
            taken = ", ".join((*schema.required, *schema.optional, *TURN_KEYS))
            raise ColumnsError(f"columns names {shown(canonical)}, which {schema.name} does not read; it reads {taken}")
    return schema


def canonical_columns(columns: Collection[str], section: SourceSection) -> tuple[str, ...]:
    """The file's columns as the schemas call them; those that `columns` in the recipe does not name stay."""
    renamed = {name: key for key, name in section.columns.items() if key not in TURN_KEYS and name in columns}
    kept = [column for column in columns if column not in renamed]
    mapped = [key for key, name in section.columns.items() if key not in TURN_KEYS and name in columns]
    return tuple(dict.fromkeys([*mapped, *kept]))


def unread_columns(columns: Collection[str], schema: Schema, section: SourceSection) -> tuple[str, ...]:
    """The file's columns that nothing reads, sorted: no schema knows them, or `columns` puts others in their place."""
    mapped = {key: name for key, name in section.columns.items() if key not in TURN_KEYS}
    unread = {*map(str, columns)} - {*mapped.values()}
    return tuple(sorted({*schema.ignored(unread), *unread.intersection(mapped)}))


def read_examples(
    row: Mapping[str, Any], schema: Schema, section: SourceSection, unread_keys: set[str] | None = None
) -> list[Example]:
    """What a row holds, as the file or the section's converter gives it: one example of the schema's kind.

    `unread_keys` receives the keys of turns that nothing reads.
    Raises: DataError, or RenderError for a message that cannot be rendered. Neither says where the row stands.
    """
    if not isinstance(row, Mapping):
        raise ColumnsError(f"a row must be an object with columns, not {shown(row)}")
    style = COMMON
    if section.columns or section.roles:
        style = _style(tuple(section.columns.items()), tuple(section.roles.items()))
        row = _renamed(row, section)
    if unread_keys is not None:
        style = TurnStyle(style.role_keys, style.content_keys, style.roles, unread_keys)
    for column in schema.required:
        if row.get(column) is None:
            raise ColumnsError(_missing(column, row, schema))
    try:
        return [schema.read(row, style)]
    except RecursionError:
        raise DataError(f"the row is nested more than {MOST_LEVELS} levels deep; flatten it") from None


def _renamed(row: Mapping[str, Any], section: SourceSection) -> Mapping[str, Any]:
    renamed = {key: name for key, name in section.columns.items() if key not in TURN_KEYS}
    if not renamed:
        return row
    taken = set(renamed.values())
    kept = {column: value for column, value in row.items() if column not in taken}
    return {**kept, **{key: row.get(name) for key, name in renamed.items()}}


@lru_cache(maxsize=64)
def _style(columns: tuple[tuple[str, str], ...], roles: tuple[tuple[str, str], ...]) -> TurnStyle:
    keys = dict(columns)
    return TurnStyle(
        (keys["role"],) if "role" in keys else COMMON.role_keys,
        (keys["content"],) if "content" in keys else COMMON.content_keys,
        {**COMMON.roles, **dict(roles)},
    )


def _missing(column: str, row: Mapping[str, Any], schema: Schema) -> str:
    there = [name for name, value in row.items() if value is not None]
    other = _first_fitting(there, SCHEMAS)
    if other is not None and other is not schema and column not in row:
        return (
            f"the row has the columns of {other.name} ({', '.join(other.required)}), and the first row those of "
            f"{schema.name} ({', '.join(schema.required)}); put rows of each kind into a file of their own and name both files "
            "in sources, or make all rows one kind with convert"
        )
    near = _nearest(column, [name for name in there if name not in schema.required])
    hint = f" (there is {shown(near)})" if near and column not in row else ""
    return f"the column {column!r} is missing{hint}; every row needs {', '.join(schema.required)}"


def _first_fitting(columns: Collection[str], schemas: Collection[Schema]) -> Schema | None:
    found = set(columns)
    return next((schema for schema in schemas if found.issuperset(schema.required)), None)


def _accepted(schemas: Collection[Schema], columns: Collection[str]) -> str:
    """The sets of required columns, those most like the ones found first."""
    ordered = sorted(schemas, key=partial(_likeness, columns=columns), reverse=True)
    return "; or ".join(", ".join(schema.required) for schema in ordered)


def _likeness(schema: Schema, columns: Collection[str]) -> float:
    """How much the required columns are like some of those found, from 0 to 1."""
    near = {required: _nearest(required, columns) for required in schema.required}
    ratios = [difflib.SequenceMatcher(None, name, found.lower()).ratio() for name, found in near.items() if found]
    return sum(ratios) / len(schema.required)


def _nearest(required: str, columns: Collection[str]) -> str | None:
    """The column found whose name is like the required one's, whatever its case."""
    found = {str(column).lower(): str(column) for column in list(columns)[:100]}
    near = difflib.get_close_matches(required, found, n=1, cutoff=0.75)
    return found[near[0]] if near else None


def _mapping(schema: Schema, columns: Collection[str]) -> str:
    """An example of `columns` for the schema, with the names found where they are alike or mean the same."""
    return ", ".join(f"{name}: {shown(_meant(name, columns) or 'NAME')}" for name in schema.required)


def _meant(required: str, columns: Collection[str]) -> str | None:
    """The column found that is like the required one, or is often called so."""
    often = OFTEN.get(required, ())
    return _nearest(required, columns) or next((str(one) for one in columns if str(one).lower() in often), None)


def _named(columns: Collection[str]) -> str:
    """Names of columns in quotes and in the file's order, as they may stand in a message."""
    names = [shown(str(name)) for name in columns]
    rest = f" and {len(names) - COLUMNS_SHOWN} more" if len(names) > COLUMNS_SHOWN else ""
    return ", ".join(names[:COLUMNS_SHOWN]) + rest if names else "none"


def message_feature(*, tool_calls: bool = True) -> Any:
    """The dataset type of a list of messages."""
    from datasets import List, Value

    text = Value("string")
    call = {"type": text, "function": {"name": text, "arguments": text}}
    return List({"role": text, "content": text, **({"tool_calls": List(call)} if tool_calls else {})})
