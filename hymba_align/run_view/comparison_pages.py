"""A comparison as a self-contained page or as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hymba_align.eval.report import html as report_page
from hymba_align.eval.report.charts import HEIGHT, WIDTH, Chart, chart
from hymba_align.eval.report.inert import code, words
from hymba_align.files import write_text
from hymba_align.run_view.compare import Comparison, Differing
from hymba_align.run_view.comparison_terminal import cost_rows, score_cells, score_head
from hymba_align.run_view.progress import Progress
from hymba_align.secrets import redact

PAGE = Path(__file__).with_name("comparison.html.jinja")
NOTE = (
    "± is the standard error; that of a difference is paired: over the same problems. Where two results cannot be compared, "
    "the reason stands in place of the difference."
)


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Writes report-like Markdown for a path that ends in .md, else a page that needs no other file."""
    write_text(path, markdown(comparison) if path.suffix.lower() == ".md" else html(comparison))


def markdown(comparison: Comparison) -> str:
    """The comparison with everything but its curves, of which the last values are told."""
    labels = comparison.labels
    blocks = [f"# {words(_title(comparison))}"]
    for label, view in zip(labels, comparison.views, strict=True):
        steps = "; ".join(_state(step) for step in view.steps)
        blocks.append(f"{words(label)}, {code(view.run.root)}: {words(steps or 'nothing was run yet')}.")
        blocks += [f"Problem: {words(redact(problem))}." for problem in view.problems]
    blocks += ["## Settings that differ", *_differing(comparison.settings_in_short, labels)]
    blocks += ["## Environment that differs", *_differing(comparison.environment_in_short, labels)]
    last = [
        (f"{each.stage.upper()}: {each.name}", *(_last(each.points.get(label)) for label in labels))
        for each in comparison.curves
    ]
    blocks += ["## Training, last values", _table(("what", *labels), last) if last else "Nothing was trained yet."]
    scores = [score_cells(row) for row in comparison.scores]
    blocks += ["## Scores, %", *([_table(score_head(labels), scores), NOTE] if scores else ["None yet."])]
    costs = cost_rows(comparison)
    blocks += ["## Costs", _table(("what", *labels), costs) if costs else "Nothing was run yet."]
    return "\n\n".join(blocks) + "\n"


def _title(comparison: Comparison) -> str:
    return f"Comparison of {', '.join(comparison.labels[:-1])} and {comparison.labels[-1]}"


def _state(step: Progress) -> str:
    return f"{step.title}: {step.state}"


def _differing(rows: Sequence[Differing], labels: Sequence[str]) -> list[str]:
    if not rows:
        return ["None."]
    return [_table(("key", *labels), [(row.key, *row.values) for row in rows])]


def _last(points: Sequence[tuple[float, float]] | None) -> str:
    return f"{points[-1][1]:.4g} (step {points[-1][0]:,.0f})" if points else "–"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(cell if cell == '---' else words(redact(cell)) for cell in line)} |" for line in lines
    )


def html(comparison: Comparison) -> str:
    """The comparison as a page: nothing is fetched and nothing runs; every text is escaped."""
    style = (report_page.FOLDER / "report.css").read_text(encoding="utf-8")
    labels = comparison.labels
    rendered: str = report_page.template(PAGE).render(
        title=_title(comparison),
        runs=[
            (label, str(view.run.root), [_state(step) for step in view.steps], [redact(each) for each in view.problems])
            for label, view in zip(labels, comparison.views, strict=True)
        ],
        labels=labels,
        settings=[(row.key, *row.values) for row in comparison.settings_in_short],
        environment=[(row.key, *row.values) for row in comparison.environment_in_short],
        charts=_charts(comparison),
        score_head=score_head(labels),
        scores=[score_cells(row) for row in comparison.scores],
        costs=cost_rows(comparison),
        note=NOTE,
        width=WIDTH,
        height=HEIGHT,
        style=style,
        style_digest=report_page.digest(style),
    )
    return rendered


def _charts(comparison: Comparison) -> list[Chart]:
    drawn = (chart(f"{each.stage.upper()}: {each.name}", dict(each.points)) for each in comparison.curves)
    return [each for each in drawn if each is not None]
