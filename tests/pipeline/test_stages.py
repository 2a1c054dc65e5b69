"""Stages in order, skipped, resumed, run again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import hymba_align.eval
import hymba_align.eval.report
import hymba_align.pipeline as pipeline
import hymba_align.plan
import hymba_align.train.common
import hymba_align.train.sft
from hymba_align.errors import CheckpointError, UsageError
from hymba_align.progress import Later, Place, current_place
from hymba_align.recipe import Recipe, load_recipe
from hymba_align.run.folder import RunFolder
from hymba_align.run.metrics import append_metrics

ALL = ["score base", "sft", "score sft", "dpo", "score dpo"]


def test_stages_run_in_order_each_from_the_checkpoint_before_it(recipe_file: str, work, tmp_path: Path) -> None:
    pipeline.run_recipe(load_recipe(recipe_file))

    run = tmp_path / "run"
    assert work == [
        ("score base", f"{run}/base/final"),
        ("sft", None),
        ("score sft", f"{run}/sft/final"),
        ("dpo", f"{run}/sft/final"),
        ("score dpo", f"{run}/dpo/final"),
    ]
    assert (run / "base" / "final" / "model.safetensors").exists()
    assert RunFolder(run).read_manifest("sft")["details"] == {"metrics": {"train_loss": 1.0}}


def test_every_step_knows_its_place_in_the_run_and_what_is_told_of_those_after_it(
    recipe_file: str, work, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Place] = []
    run_step = pipeline._run_step

    def looking(*given: Any) -> None:
        seen.append(current_place())
        run_step(*given)

    monkeypatch.setattr(pipeline, "_run_step", looking)
    recipe = load_recipe(recipe_file)
    tokens = pipeline.run_recipe(recipe)["planned_tokens"]

    assert [(place.number, place.of, place.what) for place in seen] == [
        (1, 5, "score base"), (2, 5, ""), (3, 5, "score sft"), (4, 5, ""), (5, 5, "score dpo")
    ]  # fmt: skip
    assert [place.numbered("SFT") for place in seen[1:2]] == ["[2/5] SFT"]
    sft, scored, dpo, _ = seen[0].later
    assert (sft, dpo) == (Later(tokens["sft"]), Later(tokens["dpo"], at_least=True)), "DPO's reference is on top"
    assert min(tokens.values()) > 0
    assert scored == Later(), "nothing has been scored yet"
    assert [len(place.later) for place in seen] == [4, 3, 2, 1, 0]
    assert all((seen[number].later[0].seconds or 0) > 0 for number in (1, 3)), "as long as the one before"
    assert current_place() == Place()
    assert capsys.readouterr().err == "", "no library shows a bar of its own, such as for the base's weights"


def test_only_the_stages_named_are_scored(recipe_file: str, work) -> None:
    pipeline.run_recipe(load_recipe(recipe_file, ["eval.stages=[dpo]"]))

    assert work.names == ["sft", "dpo", "score dpo"]


def test_a_recipe_without_sft_aligns_its_base(recipe_file: str, work) -> None:
    pipeline.run_recipe(load_recipe(recipe_file, ["sft=null", "eval=null"]))

    assert work == [("dpo", None)]


def test_a_second_run_skips_everything_and_says_so(recipe_file: str, work, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.run_recipe(load_recipe(recipe_file))
    work.clear()
    capsys.readouterr()

    pipeline.run_recipe(load_recipe(recipe_file))

    assert work == []
    out = capsys.readouterr().out
    assert out.count("complete and unchanged, skipped") == 5
    assert "[2/5] SFT: complete and unchanged, skipped" in out


@pytest.mark.parametrize(
    ("override", "again"),
    [
        ("dpo.trainer.beta=0.2", ["dpo", "score dpo"]),
        ("sft.trainer.learning_rate=1e-4", ["sft", "score sft", "dpo", "score dpo"]),
        ("eval.limit=1", ["score base", "score sft", "score dpo"]),
        ("eval.max_new_tokens=5", ["score base", "score sft", "score dpo"]),
        ("eval.tasks=[gsm8k_nvidia]", ["score base", "score sft", "score dpo"]),
        # Settings that change no score.
        ("eval.batch_size=2", []),
        ("eval.num_processes=2", []),
        ("seed=7", ALL),
        ("base.config.mamba_dt_rank=3", ALL),
        ("sft.trainer.logging_steps=3", []),
        ("dpo.trainer={per_device_train_batch_size: 4, save_total_limit: 1, dataloader_num_workers: 1}", []),
        # What an error about memory or time advises continues where it stopped.
        ("sft.trainer.activation_checkpointing=true", []),
        ("sft.trainer.ddp_timeout=7200", []),
        ("dpo.trainer.precompute_ref_log_probs=true", []),
        ("sft.guard.on_nonfinite=skip", []),
        # Where there is a GPU, it decides about bf16 too.
        ("sft.trainer.use_cpu=true", ["sft", "score sft", "dpo", "score dpo"]),
        ("sft.trainer.max_grad_norm=0.5", ["sft", "score sft", "dpo", "score dpo"]),
    ],
)
def test_a_change_runs_again_what_it_enters_and_what_follows(
    recipe_file: str, work, override: str, again: list[str]
) -> None:
    pipeline.run_recipe(load_recipe(recipe_file))
    work.clear()

    pipeline.run_recipe(load_recipe(recipe_file, [override]))

    assert work.names == again


def test_batches_that_a_complete_stage_left_out_are_told_whatever_the_guard_is_now(
    recipe_file: str, work, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(recipe_file, ["sft.guard.on_nonfinite=skip"])
    pipeline.run_recipe(recipe)
    for step in (3, 8):
        append_metrics(
            tmp_path / "run" / "sft", {"step": step, "skipped_rows": ["train.jsonl:1"], "warning": "left out"}
        )
    capsys.readouterr()

    pipeline.run_recipe(load_recipe(recipe_file, ["sft.guard.on_nonfinite=stop"]))

    out = " ".join(capsys.readouterr().out.split())
    assert "SFT: complete and unchanged, skipped (its training left out 2 batches: sft/bad_batch.json)" in out
    assert "DPO: complete and unchanged, skipped [" in out


def test_the_global_batch_counts_and_not_how_processes_divide_it(recipe_file: str, tmp_path: Path) -> None:
    def plans(*overrides: str) -> dict[str, str]:
        return {step.name: step.fingerprint for step in pipeline.plan(load_recipe(recipe_file, overrides))}

    def batch(per_device: int, accumulated: int) -> list[str]:
        sizes = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulated}
        return [f"{stage}.trainer.{key}={value}" for stage in ("sft", "dpo") for key, value in sizes.items()]

    eight = plans(*batch(8, 1))
    ours = tmp_path / "ours.yaml"
    ours.write_text("distributed_type: MULTI_CPU\n")
    for same in (
        [*batch(1, 8)],
        [*batch(2, 1), "launch.launcher=zero2", "launch.num_processes=4"],
        [*batch(2, 1), "launch.launcher=multi_node_zero3", "launch.num_processes=4"],
        [*batch(1, 2), "launch.accelerate_config=accelerate_configs/zero2.yaml", "launch.num_processes=4"],
        [*batch(4, 1), f"launch.accelerate_config={ours}", "launch.num_processes=2"],
    ):
        assert plans(*same) == eight, same
    for other in (
        [*batch(8, 1), "launch.launcher=ddp", "launch.num_processes=2"],
        [*batch(4, 1)],
        # Which rows share a step depends on all three.
        [*batch(1, 8), "sft.trainer.train_sampling_strategy=batch_rebalance"],
    ):
        changed = plans(*other)
        assert [name for name in eight if eight[name] != changed[name]] == ["sft", "eval/sft", "dpo", "eval/dpo"], other


def test_the_batch_size_that_trainers_default_to_is_the_one_that_plans_count_with() -> None:
    from transformers import TrainingArguments

    fields = TrainingArguments.__dataclass_fields__
    assert fields["per_device_train_batch_size"].default == hymba_align.plan.BATCH_SIZE_OF_TRAINER
    assert fields["gradient_accumulation_steps"].default == 1


def test_what_a_file_of_ones_own_decides_about_the_weights_counts(recipe_file: str, tmp_path: Path) -> None:
    config, deepspeed = tmp_path / "own.yaml", tmp_path / "own.json"
    config.write_text(f"distributed_type: DEEPSPEED\ndeepspeed_config: {{deepspeed_config_file: {deepspeed}}}\n")

    def plan_with(settings: dict[str, Any]) -> str:
        deepspeed.write_text(json.dumps(settings))
        recipe = load_recipe(recipe_file, [f"launch.accelerate_config={config}"])
        return next(step.fingerprint for step in pipeline.plan(recipe) if step.name == "sft")

    stage_2 = plan_with({"zero_optimization": {"stage": 2}, "gradient_clipping": "auto", "bf16": {"enabled": "auto"}})
    assert plan_with({"zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}}) == stage_2
    assert plan_with({"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5}) != stage_2
    assert plan_with({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}) != stage_2


@pytest.mark.parametrize(("name", "again"), [("train", ALL), ("test", ["score base", "score sft", "score dpo"])])
def test_changed_bytes_of_a_data_file_count_as_a_change(
    recipe_file: str, work, row: dict[str, str], tmp_path: Path, name: str, again: list[str]
) -> None:
    pipeline.run_recipe(load_recipe(recipe_file))
    work.clear()

    with (tmp_path / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    pipeline.run_recipe(load_recipe(recipe_file))

    assert work.names == again


def test_a_new_version_of_the_package_runs_everything_again(
    recipe_file: str, work, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.run_recipe(load_recipe(recipe_file))
    work.clear()

    monkeypatch.setattr("hymba_align.__version__", "9.9.9")
    pipeline.run_recipe(load_recipe(recipe_file))

    assert work.names == ALL


def test_an_interrupted_stage_finds_its_checkpoints_unless_its_inputs_changed(
    recipe_file: str, work, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found: list[list[str]] = []
    finish = hymba_align.train.sft.train_sft

    def interrupted(recipe: Recipe, start: str | None, stage_dir: Path, judging: Any) -> dict[str, float]:
        found.append(sorted(path.name for path in stage_dir.glob("checkpoint-*")))
        (stage_dir / "checkpoint-5").mkdir(exist_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(hymba_align.train.sft, "train_sft", interrupted)
    for overrides in ([], [], ["seed=7"]):
        with pytest.raises(KeyboardInterrupt):
            pipeline.run_training_stage(load_recipe(recipe_file, overrides), "sft")
    assert found == [[], ["checkpoint-5"], []]

    monkeypatch.setattr(hymba_align.train.sft, "train_sft", finish)
    pipeline.run_training_stage(load_recipe(recipe_file, ["seed=7"]), "sft")
    assert work.names == ["sft"]


def test_a_finished_checkpoint_is_moved_aside_with_a_word(
    recipe_file: str, work, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.run_training_stage(load_recipe(recipe_file), "sft")

    pipeline.run_training_stage(load_recipe(recipe_file, ["seed=7"]), "sft")

    moved = tmp_path / "run" / "sft.previous"
    assert f"What entered sft has changed; its earlier result is now in {moved}\n" in capsys.readouterr().out
    assert (moved / "final" / "config.json").exists()


def test_a_setting_changed_and_changed_back_brings_the_first_result_back(
    recipe_file: str, work, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.run_recipe(load_recipe(recipe_file))
    pipeline.run_recipe(load_recipe(recipe_file, ["sft.trainer.learning_rate=1e-4"]))
    work.clear()
    capsys.readouterr()

    pipeline.run_recipe(load_recipe(recipe_file), dry_run=True)
    assert capsys.readouterr().out.count("back from") == 2
    pipeline.run_recipe(load_recipe(recipe_file))

    assert work.names == ["score sft", "score dpo"]
    moved = tmp_path / "run" / "sft.previous"
    assert f"sft: these inputs had a result in {moved}, which is back in its place\n" in capsys.readouterr().out


def test_dpo_alone_starts_from_the_sft_checkpoint(recipe_file: str, work, tmp_path: Path) -> None:
    pipeline.run_training_stage(load_recipe(recipe_file), "sft")
    pipeline.run_training_stage(load_recipe(recipe_file), "dpo")

    assert work == [("sft", None), ("dpo", f"{tmp_path}/run/sft/final")]


def test_a_checkpoint_that_changed_after_its_stage_is_neither_trained_on_nor_scored(
    recipe_file: str, work, tmp_path: Path
) -> None:
    pipeline.run_training_stage(load_recipe(recipe_file), "sft")
    final = tmp_path / "run" / "sft" / "final"
    (final / "config.json").write_text("{ }\n")
    work.clear()
    for command in (lambda recipe: pipeline.run_training_stage(recipe, "dpo"), pipeline.run_recipe):
        with pytest.raises(CheckpointError) as caught:
            command(load_recipe(recipe_file))
        assert str(caught.value) == (
            f"{final} is not what was saved there: config.json has 4 bytes where its manifest.json says 3; remove that "
            f"folder, and 'hymba-align run' makes {final} again"
        )
    assert f"{final}" not in [start for _, start in work]

    shutil.rmtree(final)
    work.clear()
    pipeline.run_recipe(load_recipe(recipe_file))
    assert ("sft", None) in work
    assert ("dpo", str(final)) in work


@pytest.mark.parametrize("before", [[], ["seed=7"]])
def test_dpo_alone_needs_an_sft_checkpoint_of_this_recipe(recipe_file: str, work, tmp_path: Path, before) -> None:
    if before:
        pipeline.run_training_stage(load_recipe(recipe_file, before), "sft")

    with pytest.raises(UsageError) as caught:
        pipeline.run_training_stage(load_recipe(recipe_file), "dpo")

    assert str(caught.value) == (
        f"dpo starts from {tmp_path}/run/sft, which is not complete for this recipe; "
        "run 'hymba-align sft' (or 'hymba-align run') first"
    )


def test_a_stage_that_is_trained_anew_by_itself_renews_the_report(
    recipe_file: str, work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    monkeypatch.setattr(
        hymba_align.eval.report, "write_report", lambda root: written.append(root) or root / "report.md"
    )
    pipeline.run_training_stage(load_recipe(recipe_file), "sft")
    assert written == [], "there was none to renew"

    (tmp_path / "run" / "report.md").write_text("of before")
    pipeline.run_training_stage(load_recipe(recipe_file, ["seed=8"]), "sft")
    assert written == [tmp_path / "run"]


# --- Nothing replaced -------------------------------------------------------------------------------------------------


def test_the_real_stages_make_a_loadable_checkpoint_scores_and_a_report(
    recipe_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hymba_align.checkpoint import load_model

    pipeline.run_recipe(load_recipe(recipe_file))

    run = tmp_path / "run"
    for stage in ("sft", "dpo"):
        load_model(run / stage / "final")
        assert RunFolder(run).read_manifest(stage)["details"]["metrics"]["steps"] >= 1
        assert (run / stage / "curves.png").read_bytes().startswith(b"\x89PNG")
    for stage in ("base", "sft", "dpo"):
        assert json.loads((run / "eval" / stage / "gsm8k.json").read_text())["n"] == 2
    assert (run / "report.md").exists()
    assert capsys.readouterr().out.endswith(f"Report: {run}/report.html and report.md\nNext: hymba-align show {run}\n")
