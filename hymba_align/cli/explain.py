"""The command that says more about an error."""

from __future__ import annotations

import difflib
import re
import sys
import textwrap
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from hymba_align.cli.options import json_option, print_json

CATALOGUE = Path(__file__).parent.parent / "errors.md"
"""A link to docs/errors.md, whose text a wheel then holds."""


def topics(catalogue: str) -> dict[str, str]:
    """The sections of the catalogue by their headings, in its order, without what only its tests read."""
    shown = re.sub(r"<!--.*?-->\n?", "", catalogue, flags=re.DOTALL)
    sections = re.split(r"^## (.+)$", shown, flags=re.MULTILINE)
    return {heading.strip(): text.strip() for heading, text in zip(sections[1::2], sections[2::2], strict=True)}


def as_text(markdown: str) -> str:
    """A section without what only Markdown needs: code is indented instead of fenced, and links are their words."""
    parts = re.split(r"^```.*\n((?:.*\n)*?)```$", _without_targets(markdown), flags=re.MULTILINE)
    parts[1::2] = [textwrap.indent(code.rstrip("\n"), "    ") for code in parts[1::2]]
    return "".join(parts)


def _without_targets(markdown: str) -> str:
    """With links as their words: the pages are not where the command runs."""
    return re.sub(r"\[([^\]]+)\]\([^)\s]+\)", r"\1", markdown)


class Topic(click.ParamType[str]):
    """A heading of the catalogue."""

    name = "topic"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        known = topics(CATALOGUE.read_text(encoding="utf-8"))
        if value not in known:
            near = difflib.get_close_matches(value, known, n=1)
            hint = f"the nearest is {near[0]}" if near else "'hymba-align explain' lists them"
            self.fail(f"'{value}' is no topic; {hint}", param, ctx)
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        known = topics(CATALOGUE.read_text(encoding="utf-8"))
        return [CompletionItem(topic) for topic in known if topic.startswith(incomplete)]


@click.command(short_help="What is behind an error, and what to do.")
@click.argument("topic", type=Topic(), required=False)
@json_option
def explain(topic: str | None, as_json: bool) -> None:
    """Say what is behind an error, and what to do.

    Every error message ends with the TOPIC that it belongs to. Without one, all topics are listed.

    \b
    Example:
      hymba-align explain rows
    """
    sections = topics(CATALOGUE.read_text(encoding="utf-8"))
    if as_json:
        print_json({"topic": topic, "text": sections[topic]} if topic else {"topics": list(sections)})
    elif topic is None:
        width = max(map(len, sections))
        for name, text in sections.items():
            click.echo(f"{name:<{width}}  {' '.join(text.split(chr(10) + chr(10))[0].split())}")
    elif sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        Console(highlight=False).print(Markdown(f"## {topic}\n\n{_without_targets(sections[topic])}"))
    else:
        click.echo(f"{topic}\n\n{as_text(sections[topic])}")
