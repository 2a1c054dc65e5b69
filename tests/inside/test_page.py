"""inspect.html: one file, nothing fetched, nothing run, nothing that a text can script; and what reports take from it."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import runpy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hymba_align.inside.findings import findings
from hymba_align.inside.page import html
from hymba_align.inside.page_tables import tables
from hymba_align.inside.plots import Plot
from hymba_align.inside.result import Finding, Inspection, Measured, PairText, Removal
from hymba_align.inside.summary import MOST_FINDINGS, summary
from hymba_align.inside.wording import size_in_bytes

MADE_UP = runpy.run_path(str(Path(__file__).with_name("made_up.py")))
make: Callable[..., Inspection] = MADE_UP["inspection"]
HOSTILE = (
    "</p></section><script>alert(1)</script>",
    "\"' onload=alert(1) x='\"><img src=//evil>",
    "<!-- <style>*{display:none}</style> -->{{ 7*7 }}{% raw %}",
    "\u202eevil\u202c\x00\x1b[31m &lt;b&gt;",
)
PNG = b"\x89PNG not opened here"
PLOTS = tuple(
    Plot(f"plot_{part}", part, f"Title {part}", f"Caption {part}.", f"Alternative {part}.", PNG, 1170, 400)
    for part in ("attention", "importance", "fusion", "meta_tokens", "alignment", "cost")
)  # fmt: skip
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """The elements of a page; fails where one is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def shape(self) -> Counter[tuple[str, tuple[str, ...]]]:
        return Counter((tag, tuple(sorted(attributes))) for tag, attributes in self.elements)


@pytest.fixture(scope="module")
def inspection() -> Inspection:
    made = make()
    return replace(made, findings=findings(made))


@pytest.fixture(scope="module")
def source(inspection: Inspection) -> str:
    return html(inspection, PLOTS)


def test_nothing_is_fetched_and_nothing_runs(source: str) -> None:
    page = Page(source)
    assert not [tag for tag, _ in page.elements if tag in ("script", "link", "iframe", "object", "form", "base")]
    addresses = [
        value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")
    ]
    assert all(value and value.startswith(("data:image/png;base64,", "#")) for value in addresses)
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert "url(" not in source


def test_the_policy_allows_its_own_style_and_pictures_inside_it_alone(source: str) -> None:
    policy = next(a["content"] for tag, a in Page(source).elements if a.get("http-equiv") == "Content-Security-Policy")
    style = re.search(r"<style>(.*?)</style>", source, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    )


def test_pictures_are_inside_with_their_words(source: str) -> None:
    images = [attributes for tag, attributes in Page(source).elements if tag == "img"]
    assert [image["alt"] for image in images] == [plot.alt for plot in PLOTS]
    assert {image["src"] for image in images} == {f"data:image/png;base64,{base64.b64encode(PNG).decode()}"}


def test_every_finding_is_there_and_signs_are_marked(inspection: Inspection, source: str) -> None:
    text = Page(source).text
    assert all(" ".join(one.text.split()) in text for one in inspection.findings)
    short = summary(inspection)
    signs = sum(one.sign for one in inspection.findings) + sum(one.sign for one in short.findings)
    assert source.count('<p class="note">') == signs
    assert text.count("! Sign: ") == signs  # not by colour alone


def test_what_marks_mean_is_said_where_there_are_some(inspection: Inspection, source: str) -> None:
    assert (
        "Marked sentences are signs that something may be wrong; changes of less than 0.01 nats are none, but for a loss that "
        "rose by 1 % of itself and by 0.001 nats. Differences in losses"
    ) in source
    calm = replace(inspection, findings=tuple(one for one in inspection.findings if not one.sign))
    assert "Marked sentences" not in html(calm, ())


def test_rounding_is_told_where_numbers_are_rounded(inspection: Inspection, source: str) -> None:
    assert "whose rounding is in them" not in source
    rounded = html(replace(inspection, dtype="bfloat16"), ())
    assert (
        "They were computed in bfloat16, whose rounding is in them; what training changed was computed in float32."
    ) in rounded
    alone = html(replace(inspection, dtype="bfloat16", alignment=None), ())
    assert "They were computed in bfloat16, whose rounding is in them." in alone


def test_tables_say_how_changes_per_token_are_weighed_and_in_which_numbers(source: str) -> None:
    assert "so that a long answer weighs more; their standard errors are between pairs." in source
    assert source.count("oth checkpoints were computed in float32") == 2
    assert "Weights were compared in float32." in source


def test_what_scrolls_can_be_focused_and_has_a_name(source: str) -> None:
    scrolling = [one for _, one in Page(source).elements if one.get("class") in ("scroll", "picture")]
    assert len(scrolling) == 17 + len(PLOTS)
    assert all(one["tabindex"] == "0" and one["role"] == "group" and one["aria-label"] for one in scrolling)


def test_every_link_leads_to_a_part_of_the_page(source: str) -> None:
    page = Page(source)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert [a["href"] for tag, a in page.elements if tag == "a"] == [f"#{one}" for one in ids]
    assert len(ids) == len(set(ids)) == 8


def test_the_numbers_are_in_tables(source: str, inspection: Inspection) -> None:
    assert inspection.importance[0].layers[0].ssm.score == pytest.approx(6.392)
    page = Page(source)
    titles = [tag for tag, _ in page.elements if tag == "details"]
    assert len(titles) == 17
    assert "6.392" in page.text
    assert "2026-11-22 04:30 UTC" in page.text


def test_numbers_stand_under_their_heads(inspection: Inspection) -> None:
    """One row of each table whose neighbouring columns hold alike numbers."""
    found = {one.title: one for each in tables(inspection).values() for one in each}

    def row(title: str, at: int = 0) -> dict[str, str]:
        return dict(zip(found[title].head, found[title].rows[at], strict=True))

    def shown(value: float, digits: int) -> str:
        return f"{value:.{digits}f}".replace("-", "−")

    alignment, meta, cost = inspection.alignment, inspection.meta_tokens, inspection.cost
    assert inspection.fusion is not None
    assert alignment is not None
    assert alignment.divergence is not None
    assert meta is not None
    assert meta.movement is not None
    assert cost is not None
    loss, size, moved = inspection.importance[0].layers[0], inspection.fusion.layers[0], meta.movement[0]
    assert row("Loss without a branch")["without attention heads"] == shown(loss.attention.score, 3)
    assert row("Loss without a branch")["without SSM heads"] == shown(loss.ssm.score, 3)
    assert row("Sizes at the fusion")["attention before its norm"] == shown(size.attention.before, 3)
    assert row("Sizes at the fusion")["SSM scale to"] == shown(size.ssm.scale_max, 3)
    means = dict(found["Divergence, nats per token"].rows)
    for name, measured in (
        ("KL (checkpoint from the other)", alignment.divergence.kl),
        ("loss before", alignment.divergence.loss_before),
        ("loss after", alignment.divergence.loss_after),
        ("entropy before", alignment.divergence.entropy_before),
    ):
        assert means[name].startswith(shown(measured.mean, 3)), name
    assert row("How far meta tokens moved")["of its length, %"] == shown(100 * moved.relative, 2)
    assert row("Preferences")["share there, %"] == shown(100 * meta.preferences[0].share, 2)
    assert row("Cache of one sequence")["keys and values"] == size_in_bytes(cost.cache[0].keys_values)
    assert row("Decoding")["lowest round"] == shown(cost.decode[0].ratio_low, 2)
    assert row("Decoding")["highest round"] == shown(cost.decode[0].ratio_high, 2)


def test_before_stands_left_of_after(inspection: Inspection) -> None:
    alignment = inspection.alignment
    assert alignment is not None
    assert alignment.pairs is not None
    assert alignment.attention_before is not None
    layer, *others = alignment.attention_before.layers
    before = replace(layer, mean=replace(layer.mean, meta=0.125, self=0.0625))
    assert inspection.attention is not None
    now = replace(inspection.attention.layers[0], mean=replace(layer.mean, meta=0.25, self=0.5))
    after = replace(inspection.attention, layers=(now, *inspection.attention.layers[1:]))
    pair = replace(
        alignment.pairs.pairs[0], chosen_before=-4.0, chosen_after=-3.0, rejected_before=-6.0, rejected_after=-8.5
    )
    changed = replace(
        alignment,
        attention_before=replace(alignment.attention_before, layers=(before, *others)),
        pairs=replace(alignment.pairs, pairs=(pair,)),
    )
    found = {one.title: one for one in tables(replace(inspection, alignment=changed, attention=after))["alignment"]}
    pairs = found["Pairs, log-probabilities of whole answers"]
    assert dict(zip(pairs.head[2:], pairs.rows[0][2:], strict=True)) == {
        "chosen, change": "+1.00",
        "rejected, tokens": str(pair.rejected_tokens),
        "rejected, change": "−2.50",
        "margin before": "2.00",
        "margin now": "5.50",
    }
    shares = found["Attention before and after"]
    cells = dict(zip(shares.head, shares.rows[0], strict=True))
    assert (cells["meta tokens before, %"], cells["meta tokens now, %"]) == ("12.500", "25.000")
    assert (cells["itself before, %"], cells["itself now, %"]) == ("6.250", "50.000")


def test_parts_that_were_left_out_are_named_with_the_reason(inspection: Inspection) -> None:
    page = Page(html(replace(inspection, cost=None, left_out={"cost": "not asked for"}, findings=()), ()))
    assert "Left out: Cost, not asked for." in page.text
    reasons = {"attention": "not asked for", "alignment": "there is no other", "cost": "not asked for"}
    page = Page(html(replace(inspection, left_out=reasons, findings=()), ()))
    assert (
        "Left out: Attention and Cost, not asked for. Left out: What training changed, there is no other." in page.text
    )


def test_why_rows_are_left_out_stands_at_the_end_and_not_in_the_heading(inspection: Inspection) -> None:
    told = replace(inspection, data="3 documents of my.jsonl; 1 row left out\n1 lost (it is <empty>, first my.jsonl:2)")

    page = html(told, [])

    assert "Read: 3 documents of my.jsonl; 1 row left out (" in page.partition("</header>")[0]
    assert "1 lost" not in page.partition('<h2 id="how">')[0]
    assert "<li>1 lost (it is &lt;empty&gt;, first my.jsonl:2)</li>" in page.partition('<h2 id="how">')[2]
    assert summary(told).read == (
        "Read: 3 documents of my.jsonl; 1 row left out. Compared with runs/arithmetic/sft/final."
    )


def test_a_plot_that_is_wider_than_the_screen_says_that_it_scrolls(source: str) -> None:
    assert source.count('Wider than this screen: scroll it sideways →</p>\n<div class="picture"') == source.count(
        '<figure class="plot">'
    )
    narrow_screens = source.partition("@media (max-width: 40rem)")[2]
    assert ".sideways { display: none;" in source
    assert ".sideways:not(.narrow) { display: block; }" in narrow_screens


def test_an_inspection_of_nothing_is_a_page(inspection: Inspection) -> None:
    bare = replace(
        inspection,
        attention=None,
        importance=(),
        fusion=None,
        meta_tokens=None,
        alignment=None,
        cost=None,
        against=None,
    )
    assert "Compared with" not in Page(html(replace(bare, findings=()), ())).text


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 0.0, 1e300])
def test_numbers_of_a_diverged_model_have_a_page(inspection: Inspection, number: float) -> None:
    broken = replace(MADE_UP["filled"](inspection, number), seconds={})
    html(replace(broken, findings=findings(broken)), PLOTS)


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_acts(inspection: Inspection, source: str, text: str) -> None:
    """Wherever a checkpoint, a data set, a token or a user puts a text: the page has the same elements as without it."""
    alignment, meta, cost = inspection.alignment, inspection.meta_tokens, inspection.cost
    assert alignment is not None
    assert alignment.divergence is not None
    assert alignment.pairs is not None
    assert meta is not None
    assert cost is not None
    shifts = tuple(
        replace(one, document=text, before=text, token=text, was_likeliest=text, is_likeliest=text)
        for one in alignment.divergence.largest
    )
    pairs = replace(alignment.pairs, source=text, pairs=tuple(replace(one, name=text) for one in alignment.pairs.pairs))
    weights = tuple(replace(one, part=text) for one in alignment.weights)
    hostile = replace(
        inspection,
        checkpoint=text,
        against=text,
        data=text,
        created=text,
        versions=dict.fromkeys((text, "torch"), text),
        hardware={text: text, "cpu": text, "memory": text},
        shape={(text if name == "layers" else name): text for name in inspection.shape},
        importance=tuple(replace(one, metric=text, unit=text) for one in inspection.importance),
        meta_tokens=replace(meta, domains=tuple(replace(one, domain=text, source=text) for one in meta.domains)),
        alignment=replace(
            alignment,
            against=text,
            weights=weights,
            pairs=pairs,
            divergence=replace(alignment.divergence, source=text, largest=shifts),
        ),
        cost=replace(cost, transformer=replace(cost.transformer, name=text), not_timed=text, device=text, dtype=text),
        findings=tuple(replace(one, text=f"{text} {at}") for at, one in enumerate(inspection.findings)),
    )
    plots = tuple(replace(plot, title=text, caption=text, alt=text) for plot in PLOTS)
    rendered = html(hostile, plots)
    assert Page(rendered).shape == Page(source).shape
    assert not {"\x00", "\x1b", "\u202e"} & set(rendered)


# ---- the summary -----------------------------------------------------------------------------------------------------


def test_a_summary_has_signs_first_and_few_lines(inspection: Inspection) -> None:
    short = summary(inspection)
    assert len(short.findings) == MOST_FINDINGS
    assert [one.sign for one in short.findings] == sorted((one.sign for one in short.findings), reverse=True)
    assert {one for one in inspection.findings if one.sign} <= set(short.findings)
    assert all(len(row) == len(short.head) == 2 for row in short.rows)
    assert dict(short.rows)["KL, nats per token"] == "0.0310 ± 0.0040"
    assert dict(short.rows)["loss, nats per token"] == "0.412 ± 0.031; without the first layer's SSM heads 6.392"


def test_a_summary_has_each_task_and_what_was_read_and_compared(inspection: Inspection) -> None:
    short = summary(inspection)
    assert [one.text for one in short.findings if "the score on gsm8k" in one.text] == [
        next(one.text for one in inspection.findings if "the score on gsm8k" in one.text)
    ]
    assert short.read == (
        "Read: 40 of 200 conversations of data/arithmetic/test.jsonl. Compared with runs/arithmetic/sft/final."
    )
    rows = dict(short.rows)
    assert rows["decoding at 8,192 tokens"] == (
        "280.0 tokens per second; beside a transformer faster in every round, 4.60 times (4.20 to 4.90 over 5 rounds)"
    )
    assert rows["attention on meta tokens"].endswith(" percentage points by training")
    assert rows["margin, nats per pair"].startswith("+")
    assert "(median of 23 parts)" in rows["parts of the weights moved by"]


def test_pairs_are_shown_as_they_read_with_how_many_answers_were_made(inspection: Inspection) -> None:
    alignment = inspection.alignment
    assert alignment is not None
    assert alignment.pairs is not None
    text = "<b>5 + 3</b>"
    shown = replace(alignment.pairs, made_rejected=32, examples=(PairText("test.jsonl:1", text, "8", "9"),))
    page = Page(html(replace(inspection, alignment=replace(alignment, pairs=shown)), ()))
    assert f"test.jsonl:1 {text} 8 9" in page.text
    assert "32 of the rejected answers were made from the right ones, as for DPO" in page.text
    assert (
        "made from the right ones"
        in dict(summary(replace(inspection, alignment=replace(alignment, pairs=shown))).rows).__str__()
    )
    assert "b" not in {tag for tag, _ in page.elements}


def test_equal_verdicts_have_laplaces_error_in_the_table_too(inspection: Inspection) -> None:
    task = inspection.importance[1]
    gone = Removal(0.0, Measured(-100.0, 0.0))
    alike = replace(task, layers=(replace(task.layers[0], ssm=gone),), documents=8, whole=Measured(100.0, 0.0))
    _, table = tables(replace(inspection, importance=(inspection.importance[0], alike)))["importance"]
    assert table.rows[0][4] == "−100 ± 11"
    assert "the whole model has 100 ± 11;" in table.note


def test_the_line_of_all_weights_says_which_part_it_is_mostly_about(inspection: Inspection) -> None:
    alignment = inspection.alignment
    assert alignment is not None
    weights = tuple(
        replace(one, distance=1.0, relative=0.001 if one.part == "ssm" else 0.1) for one in alignment.weights[:5]
    )
    whole = replace(alignment.whole, distance=5**0.5, relative=(5 / (1e6 + 4e2)) ** 0.5)

    def note(**changes: object) -> str:
        changed = replace(alignment, whole=whole, weights=weights, pairs=None, divergence=None, **changes)
        return tables(replace(inspection, alignment=changed))["alignment"][0].note

    assert note().startswith(
        "Weights were compared in float32. The last line says mostly how far the SSM branches moved: "
    )
    assert "they make up 99.96 % of the squared length of all" in note()
    alike = tuple(replace(one, relative=0.1) for one in weights)
    whole = replace(whole, relative=0.1)
    weights = alike
    assert note() == "Weights were compared in float32."


def test_signs_of_every_part_come_before_a_second_one_of_a_part(inspection: Inspection) -> None:
    many = (*(Finding("alignment", f"a{number}", True) for number in range(9)), Finding("cost", "c", True))
    assert Finding("cost", "c", True) in summary(replace(inspection, findings=many)).findings


def test_a_summary_of_nothing_is_empty(inspection: Inspection) -> None:
    bare = replace(
        inspection, attention=None, importance=(), fusion=None, meta_tokens=None, alignment=None, cost=None, findings=()
    )
    assert (summary(bare).rows, summary(bare).findings) == ((), ())
