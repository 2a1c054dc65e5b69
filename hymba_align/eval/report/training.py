"""How training went, from a stage's metrics.jsonl and data.json: facts, warnings, what became of every source's rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hymba_align.secrets import redact

LONGEST_LOG = 100  # warnings that are shown
MOST_STEPS = 12  # of each prompt that was continued while training
LONGEST_TEXT = 2000  # characters of a prompt and of what was written
LAST_VALUES = (
    ("mean_token_accuracy", "token accuracy at the end"),
    ("rewards/accuracies", "pairs preferred rightly at the end"),
    ("rewards/margins", "reward margin at the end"),
)


@dataclass(frozen=True)
class Continued:
    """A held-out prompt, and what the model wrote after it."""

    prompt: str
    reference: str
    texts: tuple[tuple[int, str, bool, bool | None], ...]
    """Step, text, whether it was cut off, whether it is right where that is known"""


def continued(records: list[dict[str, Any]]) -> list[Continued]:
    """Samples by prompt; of many steps the first, the last and some between. What samples.jsonl should not hold is left out."""
    by_prompt: dict[tuple[str, str], dict[int, tuple[str, bool, bool | None]]] = {}
    for record in records:
        prompt, reference, text = (record.get(key) for key in ("prompt", "reference", "text"))
        if isinstance(prompt, str) and isinstance(reference, str) and isinstance(text, str):
            right = record.get("right")
            said = (_short(text), bool(record.get("cut_off")), right if isinstance(right, bool) else None)
            by_prompt.setdefault((prompt, reference), {})[record["step"]] = said
    found = []
    for (prompt, reference), texts in by_prompt.items():
        steps = sorted(texts)
        last = max(len(steps) - 1, 1)
        kept = sorted(
            {
                steps[place * (len(steps) - 1) // min(last, MOST_STEPS - 1)]
                for place in range(min(len(steps), MOST_STEPS))
            }
        )
        found.append(Continued(_short(prompt), _short(reference), tuple((step, *texts[step]) for step in kept)))
    return found


def _short(text: str) -> str:
    text = redact(text)
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}…"


def facts(section: dict[str, Any], records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Name and value of how a stage was set, and how it went; empty where nothing was logged."""
    losses = [record for record in records if _is_number(record.get("loss"))]
    if not losses:
        return []
    first, last = losses[0], losses[-1]
    rows = [
        ("loss at the start", f"{first['loss']:.4f} (step {first['step']})"),
        ("loss at the end", f"{last['loss']:.4f} (step {last['step']})"),
    ]
    rates = [record["learning_rate"] for record in losses if _is_number(record.get("learning_rate"))]
    rows += [("highest learning rate", f"{max(rates):.2e}")] if rates else []
    rows += [("epochs", f"{last['epoch']:.2f}")] if _is_number(last.get("epoch")) else []
    rows += [(name, f"{last[key]:.3f}") for key, name in LAST_VALUES if _is_number(last.get(key))]
    validated = [record for record in records if _is_number(record.get("eval_loss"))]
    for name, record in (("first", validated[0]), ("last", validated[-1])) if validated else ():
        rows.append((f"validation loss, {name}", f"{record['eval_loss']:.4f} (step {record['step']})"))
    if validated and _is_number(validated[-1].get("eval_rewards/accuracies")):
        rows.append(("validation pairs preferred rightly", f"{validated[-1]['eval_rewards/accuracies']:.3f}"))
    if section.get("max_length"):
        rows.append(("max_length", str(section["max_length"])))
    trainer = section.get("trainer")
    return rows + [
        (f"trainer.{key}", f"{value}") for key, value in (trainer if isinstance(trainer, dict) else {}).items()
    ]


def log(records: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """Step and words of every warning of a guard, the last `LONGEST_LOG` of them."""
    found = [(record["step"], redact(str(record["warning"]))) for record in records if record.get("warning")]
    return found[-LONGEST_LOG:]


def source_rows(stage: str, record: dict[str, Any]) -> list[list[str]]:
    """Stage, name, rows, kept, conversations, tokens, trained on, left out: one row per source."""
    return [_source_cells(stage, source) for source in record.get("sources", ())]


def left_out(source: dict[str, Any]) -> list[str]:
    """Each reason why rows of a source are not trained on as they are, with their number."""
    told = [f"{count:,} {reason}" for reason, count in source["lost"].items()]
    for key, words in (("rows_not_chosen", "not chosen"), ("rows_passed_over", "passed over by the converter")):
        told += [f"{source[key]:,} {words}"] if source[key] else []
    return told + ([f"{source['shortened']:,} shortened"] if source["shortened"] else [])


def _source_cells(stage: str, source: dict[str, Any]) -> list[str]:
    lost = "; ".join(left_out(source)) or "nothing"
    times = f" (each {source['repeat']} times)" if source["repeat"] > 1 else ""
    numbers = [
        f"{source[key]:,}" for key in ("rows_read", "rows_kept", "conversations", "total_tokens", "trained_tokens")
    ]
    cells = [stage.upper(), redact(source["name"]), *numbers, lost]
    cells[4] += times
    return cells


def data_words(stage: str, record: dict[str, Any]) -> list[str]:
    """What is kept for validation, and how full packed rows are."""
    words = []
    if record.get("validation"):
        unit = "conversations" if stage == "sft" else "pairs"
        words.append(f"{stage.upper()}: {record['validation']:,} {unit} are kept for validation.")
    if record.get("packing"):
        packed = record["packing"]
        words.append(
            f"{stage.upper()}: {packed['documents']:,} conversations are packed into {packed['rows']:,} rows, "
            f"which they fill to {100 * packed['fill_rate']:.1f} %."
        )
    return words


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
