"""inspect.html: one file that holds all it needs, its plots too.

Nothing is fetched and nothing runs: the policy in its head allows its own style, by its digest, and pictures inside it.
Every text goes through jinja2's escaping with control characters made visible, because models and data wrote them.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hymba_align.eval.report import html as report_page
from hymba_align.eval.report.words import duration, moment
from hymba_align.inside.evidence import ERROR_RATE, FEWEST
from hymba_align.inside.findings_training import LOSS_FLOOR, LOSS_NOTICED, NOTICED
from hymba_align.inside.page_tables import Table, tables
from hymba_align.inside.plots import Plot
from hymba_align.inside.result import Finding, Inspection
from hymba_align.inside.summary import summary
from hymba_align.inside.wording import PART_NAMES, listed
from hymba_align.inspect_choices import PARTS, Part

PAGE = Path(__file__).with_name("inspect.html.jinja")
STYLE = Path(__file__).with_name("inspect.css")
RULE = (
    f"Differences in losses, scores, divergences and log-probabilities count as more than chance at {100 * ERROR_RATE:.0f} %, "
    f"divided among those that a sentence chooses from, and from {FEWEST} documents on; ± is the standard error of a mean over "
    "documents, pairs or problems. Shares of attention, sizes and movements are exact for the texts that were read."
)


TERMS: dict[Part, str] = {
    "attention": "Every token spreads an attention of 100 % over what it sees. Meta tokens are learned vectors in front of "
    "every text; global layers see all of it, local ones a window. Entropy says over how much attention is spread.",
    "importance": "A branch is removed by setting its normalised output to zero; nothing else changes. Loss is in nats per "
    "scored token, lower is better; random guessing is the logarithm of the vocabulary's size. A percentage point is a "
    "hundredth of all problems.",
    "fusion": "A layer's output is the mean of its two branches, each behind a norm and a learned scale. Sizes are root mean "
    "squares per channel; the squared size of a branch is what it adds to the sum of squares.",
    "meta_tokens": "Compared is the share that each meta token has of the attention on all of them; 1.05 times as much is 5 % "
    "of that share more, while the plot shows the difference itself in percentage points of that attention.",
    "alignment": "A part of the weights moved by the length (Frobenius norm) of its difference, beside its length before. KL "
    "is how far the next-token distributions are apart, in nats. The margin is the log-probability of the chosen answer minus "
    "that of the rejected one.",
    "cost": "The cache is what generation keeps of one sequence: keys, values, and the states of the SSM heads. Speeds are of "
    "both models in turn; a claim needs every round to agree.",
}


@dataclass(frozen=True)
class Section:
    """One part of the page."""

    id: str
    name: str
    terms: str
    """What its words mean"""
    findings: tuple[Finding, ...]
    plots: tuple[Plot, ...]
    tables: tuple[Table, ...]


def html(inspection: Inspection, plots: Sequence[Plot]) -> str:
    """The text of inspect.html.

    Args:
        plots: of this inspection, as `plots.draw` makes them.
    """
    style = (report_page.FOLDER / "report.css").read_text(encoding="utf-8") + STYLE.read_text(encoding="utf-8")
    short = summary(inspection)
    rendered: str = report_page.template(PAGE).render(
        inspection=inspection,
        created=moment(inspection.created),
        read=inspection.data.partition("\n")[0],
        rows_left_out=inspection.data.split("\n")[1:],
        summary=short,
        signs=any(one.sign for one in inspection.findings),
        rule=_rule(inspection),
        noticed=f"{NOTICED} nats are none, but for a loss that rose by {100 * LOSS_NOTICED:.0f} % of itself and by {LOSS_FLOOR} nats",
        sections=_sections(inspection, plots),
        encoded=_encoded,
        left_out=_left_out(inspection),
        how=_how(inspection),
        style=style,
        style_digest=report_page.digest(style),
    )
    return rendered


def _rule(inspection: Inspection) -> str:
    """How to read the numbers; that they are rounded, where they are."""
    alignment = inspection.alignment
    if inspection.dtype == "float32":
        return RULE
    rounded = f"{RULE} They were computed in {inspection.dtype}, whose rounding is in them"
    return (
        f"{rounded}; what training changed was computed in {alignment.dtype}."
        if alignment is not None
        else f"{rounded}."
    )


def _encoded(plot: Plot) -> str:
    return base64.b64encode(plot.png).decode()


def _sections(inspection: Inspection, plots: Sequence[Plot]) -> list[Section]:
    """The parts that were measured."""
    found = tables(inspection)
    sections = []
    for part in PARTS:
        section = Section(
            part.replace("_", "-"),
            PART_NAMES[part],
            TERMS[part],
            tuple(one for one in inspection.findings if one.part == part),
            tuple(plot for plot in plots if plot.part == part),
            tuple(found.get(part, ())),
        )
        if section.findings or section.plots or section.tables:
            sections.append(section)
    return sections


def _left_out(inspection: Inspection) -> list[tuple[str, str]]:
    """Parts that are not there, those with one reason together."""
    parts: dict[str, list[str]] = {}
    for part, why in inspection.left_out.items():
        parts.setdefault(why, []).append(_name(part))
    return [(listed(names), why) for why, names in parts.items()]


def _how(inspection: Inspection) -> list[tuple[str, list[tuple[str, str]]]]:
    """Facts about the checkpoint, the machine and the time it took, each list with its title."""
    with_attention = {"fusion"} if "attention" in inspection.seconds else set()
    seconds = [
        (_name(part), "seen with attention" if part in with_attention else duration(value))
        for part, value in inspection.seconds.items()
    ]
    lists = [
        ("Checkpoint", [*_facts(inspection.shape), ("computed in", f"{inspection.dtype} on {inspection.device}")]),
        ("Time", seconds),
        ("Machine", _facts(inspection.hardware)),
        ("Versions", _facts(inspection.versions)),
    ]
    return [(title, facts) for title, facts in lists if facts]


def _name(part: str) -> str:
    """A part as the page calls it; what is none of the parts as it is."""
    return next((name for known, name in PART_NAMES.items() if known == part), part)


def _facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (
            name.replace("_", " "),
            f"{value:,}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value),
        )
        for name, value in values.items()
        if value is not None
    ]
