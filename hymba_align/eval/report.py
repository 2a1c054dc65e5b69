"""A run's report.md: scores by stage beside the published ones, the data, how training went, and sample answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hymba_align.eval.result import Sample, TaskResult, read_result
from hymba_align.files import read_json, write_text
from hymba_align.run.metrics import read_metrics

if TYPE_CHECKING:
    from rich.table import Table

STAGES = ("base", "sft", "dpo")
STAGE_NAMES = {"base": "base", "sft": "after SFT", "dpo": "after DPO"}
# Hymba paper, arXiv 2411.13676, table 4: Hymba-1.5B-Instruct, in percent. Shown for runs that start from these.
PUBLISHED = {"gsm8k": 58.76}
PUBLISHED_FOR = ("Hymba-1.5B-Base", "Hymba-1.5B-Instruct")
SAMPLES_PER_STAGE = 3
LONGEST_SHOWN = 600  # characters of a response

COMPARISON = (
    "The published number is that of Hymba-1.5B-Instruct (Hymba paper, table 4). It compares only with scores on the full "
    "official test set; a partial score stands beside it for orientation alone."
)


def write_report(run_root: Path) -> Path:
    """The path of report.md, written from what the run folder holds so far."""
    results = load_results(run_root)
    sections = [
        f"# {run_root.name}",
        "## Scores",
        *_score_section(results, _published(run_root)),
        "## Data",
        *_data_section(run_root),
        "## Training",
        *_training_section(run_root),
        "## Sample answers",
        *_sample_section(results),
    ]
    path = run_root / "report.md"
    write_text(path, "\n\n".join(sections) + "\n")
    return path


def score_table(run_root: Path) -> Table:
    """The same scores for the terminal."""
    from rich.table import Table

    published = _published(run_root)
    table = Table(title=f"Scores of {run_root.name}, %", caption=COMPARISON if published else None)
    for name in ("stage", "task"):
        table.add_column(name)
    for name in ("problems", "strict match", "flexible match", *(["published"] if published else [])):
        table.add_column(name, justify="right")
    for stage, task, result in load_results(run_root):
        beside = [published[task]] if task in published else []
        table.add_row(STAGE_NAMES[stage], task, _problems(result), *_scores(result), *beside)
    return table


def load_results(run_root: Path) -> list[tuple[str, str, TaskResult]]:
    """(stage, task, result) of every result file, in the order of the stages, but for those of weights that are gone."""
    found = []
    for stage in STAGES:
        if _are_of_earlier_weights(run_root, stage):
            continue
        for path in sorted((run_root / "eval" / stage).glob("*.json")):
            found.append((stage, path.stem, read_result(path)))
    return found


def _are_of_earlier_weights(run_root: Path, stage: str) -> bool:
    """Whether the stage was trained anew, on other inputs, after it was scored; folders without manifests count as whole."""
    scored, trained = run_root / "eval" / f"{stage}.manifest.json", run_root / stage / "manifest.json"
    if not scored.is_file() or not trained.is_file():
        return False
    inputs = read_json(scored).get("details", {}).get("inputs")
    return inputs is not None and inputs != read_json(trained).get("completed")


def _score_section(results: list[tuple[str, str, TaskResult]], published: dict[str, str]) -> list[str]:
    if not results:
        return ["No stage has been scored yet."]
    head = ["stage", "task", "problems", "strict match, %", "flexible match, %", "answers that end"]
    lines = [_row([*head, *(["published, %"] if published else [])])]
    lines.append(_row(["---", "---", *["---:"] * (len(head) - 2 + bool(published))]))
    for stage, task, result in results:
        beside = [published[task]] if task in published else []
        ended = f"{result.ended} of {result.n}"
        lines.append(_row([STAGE_NAMES[stage], task, _problems(result), *_scores(result), ended, *beside]))
    warnings = [f"Warning, {STAGE_NAMES[stage]}: {text}." for stage, _, result in results for text in result.warnings]
    protocol = results[-1][2].settings
    how = (
        f"Protocol: {protocol['num_fewshot']}-shot as a conversation, greedy, at most {protocol['max_new_tokens']} new "
        f"tokens, test file `{protocol['test_path']}`, lm-evaluation-harness {results[-1][2].versions['lm-eval']}. "
        "± is the standard error."
    )
    return ["\n".join(lines), *warnings, how, *([COMPARISON] if published else [])]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _problems(result: TaskResult) -> str:
    return f"{result.n} of {result.total} (partial)" if result.partial else str(result.n)


def _scores(result: TaskResult) -> tuple[str, ...]:
    cells = []
    for name in ("strict_match", "flexible_match"):
        score = result.scores[name]
        error = f" ± {100 * score.stderr:.1f}" if score.stderr is not None else ""
        cells.append(f"{100 * score.value:.1f}{error}")
    return tuple(cells)


def _published(run_root: Path) -> dict[str, str]:
    """Published scores by task, in percent, where they are of the model that this run starts from."""
    model = (_recipe(run_root).get("base") or {}).get("model") or ""
    return {task: f"{score:.2f}" for task, score in PUBLISHED.items()} if Path(model).name in PUBLISHED_FOR else {}


def _training_section(run_root: Path) -> list[str]:
    recipe = _recipe(run_root)
    blocks = []
    for stage in ("sft", "dpo"):
        records = read_metrics(run_root / stage)
        losses = [record for record in records if record.get("loss") is not None]
        if losses:
            blocks += [f"### {stage.upper()}", _stage_table(recipe.get(stage) or {}, losses, records)]
            warnings = [f"- step {record['step']}: {record['warning']}" for record in records if record.get("warning")]
            blocks += ["Warnings:\n\n" + "\n".join(warnings)] if warnings else []
    return blocks or ["No stage has trained yet."]


def _data_section(run_root: Path) -> list[str]:
    """What became of every source's rows in each stage, and how full packed rows are."""
    lines, packing = [], []
    for stage in ("sft", "dpo"):
        path = run_root / stage / "data.json"
        if not path.is_file():
            continue
        record = read_json(path)
        lines += [_row(_source_cells(stage, source)) for source in record["sources"]]
        if record["validation"]:
            packing.append(
                f"{stage.upper()}: {record['validation']:,} {'conversations' if stage == 'sft' else 'pairs'} are kept for validation."
            )
        if record["packing"]:
            packed = record["packing"]
            packing.append(
                f"{stage.upper()}: {packed['documents']:,} conversations are packed into {packed['rows']:,} rows, "
                f"which they fill to {100 * packed['fill_rate']:.1f} %."
            )
    if not lines:
        return ["No data was recorded yet."]
    head = ["stage", "source", "rows", "kept", "conversations or pairs", "tokens", "trained on", "left out"]
    return ["\n".join([_row(head), _row(["---", "---", *["---:"] * 5, "---"]), *lines]), *packing]


def _source_cells(stage: str, source: dict[str, Any]) -> list[str]:
    left_out = [f"{count:,} {reason}" for reason, count in source["lost"].items()]
    for key, words in (("rows_not_chosen", "not chosen"), ("rows_passed_over", "passed over by the converter")):
        left_out += [f"{source[key]:,} {words}"] if source[key] else []
    left_out += [f"{source['shortened']:,} shortened"] if source["shortened"] else []
    times = f" (each {source['repeat']} times)" if source["repeat"] > 1 else ""
    numbers = [
        f"{source[key]:,}" for key in ("rows_read", "rows_kept", "conversations", "total_tokens", "trained_tokens")
    ]
    cells = [stage.upper(), f"`{source['name']}`", *numbers, "; ".join(left_out) or "nothing"]
    cells[4] += times
    return [cell.replace("|", "\\|") for cell in cells]


def _stage_table(section: dict[str, Any], losses: list[dict[str, Any]], records: list[dict[str, Any]]) -> str:
    """A two-column table: how a stage was set, and how it went."""
    first, last = losses[0], losses[-1]
    peak = max(record["learning_rate"] for record in losses)
    rows: list[tuple[str, str]] = [
        ("loss at the start", f"{first['loss']:.4f} (step {first['step']})"),
        ("loss at the end", f"{last['loss']:.4f} (step {last['step']})"),
        ("highest learning rate", f"{peak:.2e}"),
        ("epochs", f"{last.get('epoch', 0):.2f}"),
    ]
    for key, name in (
        ("mean_token_accuracy", "token accuracy at the end"),
        ("rewards/accuracies", "pairs preferred rightly at the end"),
        ("rewards/margins", "reward margin at the end"),
    ):
        if isinstance(last.get(key), (int, float)):
            rows.append((name, f"{last[key]:.3f}"))
    validated = [record for record in records if record.get("eval_loss") is not None]
    for name, record in (("first", validated[0]), ("last", validated[-1])) if validated else ():
        rows.append((f"validation loss, {name}", f"{record['eval_loss']:.4f} (step {record['step']})"))
    if validated and validated[-1].get("eval_rewards/accuracies") is not None:
        rows.append(("validation pairs preferred rightly", f"{validated[-1]['eval_rewards/accuracies']:.3f}"))
    if last.get("tokens"):
        rows.append(("tokens", f"{last['tokens']:,}"))
    runtimes = [record["train_runtime"] for record in records if record.get("train_runtime")]
    if runtimes:
        rows.append(("training time of the last session", f"{runtimes[-1]:.0f} s"))
    if section.get("max_length"):
        rows.append(("max_length", str(section["max_length"])))
    rows += [(f"trainer.{key}", f"`{value}`") for key, value in (section.get("trainer") or {}).items()]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _recipe(run_root: Path) -> dict[str, Any]:
    path = run_root / "recipe.yaml"
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.exists() else {}


def _sample_section(results: list[tuple[str, str, TaskResult]]) -> list[str]:
    blocks = []
    for stage, task, result in results:
        blocks.append(f"### {task}, {STAGE_NAMES[stage]}")
        blocks += [_sample(sample) for sample in result.samples[:SAMPLES_PER_STAGE]]
    return blocks or ["None yet."]


def _sample(sample: Sample) -> str:
    """A question, the model's answer in a fence that the answer cannot close, and the verdict."""
    response = sample.response.strip() or "(empty)"
    if len(response) > LONGEST_SHOWN:
        response = response[:LONGEST_SHOWN] + " …"
    response = response.replace("```", "'''")
    expected = sample.target.split("####")[-1].strip()
    verdict = "right" if sample.correct["strict_match"] else "wrong"
    if verdict == "wrong" and sample.correct["flexible_match"]:
        verdict = "right by flexible match only"
    question = " ".join(sample.question.split())
    return f"**{question}**\n\n```text\n{response}\n```\n\n{verdict}; expected {expected}"
