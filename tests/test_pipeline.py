"""Stages in order, skipped, resumed, run again; checks before the first; several processes."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hymba_align.eval
import hymba_align.eval.report
import hymba_align.pipeline as pipeline
import hymba_align.plan
import hymba_align.processes.launch
import hymba_align.train.common
import hymba_align.train.dpo
import hymba_align.train.sft
from hymba_align.errors import CheckpointError, HymbaAlignError, Preempted, UsageError
from hymba_align.files import file_digest, write_json
from hymba_align.processes.agent import STARTED_BY_US
from hymba_align.recipe import Recipe, load_recipe
from hymba_align.run.folder import RunFolder
from hymba_align.run.manifest import seal
from hymba_align.run.metrics import append_metrics

ROW = {"question": "What is 1+1?", "answer": "<<1+1=2>>2\n#### 2", "wrong_answer": "<<1+1=3>>3\n#### 3"}


@pytest.fixture
def recipe_file(tmp_path: Path, small_base: dict[str, Any]) -> str:
    """A recipe of all stages over a handful of rows, in a folder of its own."""
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(ROW) + "\n") * 8)
    sections = {
        "name": "demo",
        "output_dir": str(tmp_path / "run"),
        "base": small_base,
        "data": {"path": str(tmp_path / "train.jsonl")},
        "sft": {"max_length": 64, "trainer": {"per_device_train_batch_size": 1}},
        "dpo": {"max_length": 64, "trainer": {"per_device_train_batch_size": 4}},
        "eval": {"max_new_tokens": 4, "gsm8k": {"num_fewshot": 1}, "limit": 2},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(sections))
    return str(path)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """What the stages would do, as (what, starting checkpoint), with files in place of the work."""
    done: list[tuple[str, str | None]] = []

    def trainer(stage: str):
        def train(recipe: Recipe, start: str | None, stage_dir: Path) -> dict[str, float]:
            done.append((stage, start))
            write_json(stage_dir / "final" / "config.json", {})
            seal(stage_dir / "final", {})
            return {"train_loss": 1.0}

        return train

    def evaluate(checkpoint: str, section: Any, out_dir: Path, *, chat_template: str) -> dict[str, None]:
        done.append((f"score {out_dir.name}", checkpoint))
        write_json(out_dir / "gsm8k.json", {})
        return {"gsm8k": None}

    monkeypatch.setattr(hymba_align.train.sft, "train_sft", trainer("sft"))
    monkeypatch.setattr(hymba_align.train.dpo, "train_dpo", trainer("dpo"))
    monkeypatch.setattr(hymba_align.processes.launch, "use_engine", lambda launch: None)  # it would outlive the test
    monkeypatch.setattr(hymba_align.eval, "evaluate", evaluate)
    monkeypatch.setattr(hymba_align.eval.report, "score_table", lambda root: "scores")
    monkeypatch.setattr(hymba_align.eval.report, "write_report", lambda root: root / "report.md")
    return done


def names(done: list[tuple[str, str | None]]) -> list[str]:
    return [name for name, _ in done]


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


def test_only_the_stages_named_are_scored(recipe_file: str, work) -> None:
    pipeline.run_recipe(load_recipe(recipe_file, ["eval.stages=[dpo]"]))

    assert names(work) == ["sft", "dpo", "score dpo"]


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

    assert names(work) == again


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
    recipe_file: str, work, tmp_path: Path, name: str, again: list[str]
) -> None:
    pipeline.run_recipe(load_recipe(recipe_file))
    work.clear()

    with (tmp_path / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(ROW) + "\n")
    pipeline.run_recipe(load_recipe(recipe_file))

    assert names(work) == again


def test_a_new_version_of_the_package_runs_everything_again(
    recipe_file: str, work, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.run_recipe(load_recipe(recipe_file))
    work.clear()

    monkeypatch.setattr("hymba_align.__version__", "9.9.9")
    pipeline.run_recipe(load_recipe(recipe_file))

    assert names(work) == ALL


def test_an_interrupted_stage_finds_its_checkpoints_unless_its_inputs_changed(
    recipe_file: str, work, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found: list[list[str]] = []
    finish = hymba_align.train.sft.train_sft

    def interrupted(recipe: Recipe, start: str | None, stage_dir: Path) -> dict[str, float]:
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
    assert names(work) == ["sft"]


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

    assert names(work) == ["score sft", "score dpo"]
    moved = tmp_path / "run" / "sft.previous"
    assert f"sft: these inputs had a result in {moved}, which is back in its place\n" in capsys.readouterr().out


def digests(root: Path) -> dict[str, str]:
    return {str(path): file_digest(path) if path.is_file() else "" for path in sorted(root.rglob("*"))}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path={tmp}/bad.jsonl"], "{tmp}/bad.jsonl:2: malformed JSON"),
        (["dpo.data.path={tmp}/bad.jsonl"], "{tmp}/bad.jsonl:2: malformed JSON"),
        (["sft.max_length=9"], "{tmp}/train.jsonl:1: longer than max_length=9: it has "),
        (
            ["sft.trainer.lr_scheduler_type=foo"],
            "sft.trainer is refused by SFTConfig: foo is not a valid SchedulerType",
        ),
        (["eval.max_new_tokens=8192"], "eval.max_new_tokens is 8192, which leaves no room"),
    ],
)
def test_bad_input_leaves_a_finished_run_as_it_is(
    recipe_file: str, work, tmp_path: Path, overrides: list[str], message: str
) -> None:
    (tmp_path / "bad.jsonl").write_text(json.dumps(ROW) + "\n{\n")
    pipeline.run_recipe(load_recipe(recipe_file))
    before = digests(tmp_path / "run")
    work.clear()

    with pytest.raises(UsageError) as caught:
        pipeline.run_recipe(load_recipe(recipe_file, [text.format(tmp=tmp_path) for text in overrides]))

    assert str(caught.value).startswith(message.format(tmp=tmp_path))
    assert digests(tmp_path / "run") == before
    assert work == []


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


# --- The plan and the checks before it --------------------------------------------------------------------------------


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    recipe_file: str, work, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))

    pipeline.run_recipe(load_recipe(recipe_file), dry_run=True)

    assert work == []
    assert sorted(tmp_path.rglob("*")) == before
    out = capsys.readouterr().out
    for text in ("score base", "random weights", "train.jsonl", "test.jsonl", "sft/final", "dpo/final", "to do"):
        assert text in out


def test_a_dry_run_of_dpo_says_that_sft_has_to_be_there_first(
    recipe_file: str, work, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.run_training_stage(load_recipe(recipe_file), "dpo", dry_run=True)
    assert "needs sft first" in capsys.readouterr().out

    pipeline.run_training_stage(load_recipe(recipe_file), "sft")
    capsys.readouterr()
    pipeline.run_training_stage(load_recipe(recipe_file), "dpo", dry_run=True)
    assert "to do" in capsys.readouterr().out


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


def test_one_override_of_the_data_path_moves_training_and_test(recipe_file: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("train", "test"):
        (other / f"{name}.jsonl").write_text(json.dumps(ROW) + "\n")

    steps = pipeline.plan(load_recipe(recipe_file, [f"data.path={other}/train.jsonl"]))

    assert {step.data for step in steps} == {f"{other}/train.jsonl", f"gsm8k: {other}/test.jsonl"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path=absent.jsonl"], "data.path is absent.jsonl, which does not exist (looked for {cwd}/"),
        (["dpo.data.path=a/b/c.csv"], "dpo.data.path is a/b/c.csv, which does not exist (looked for {cwd}/"),
        (["eval.gsm8k.test_path=absent.jsonl"], "eval.gsm8k.test_path is absent.jsonl, which does not exist (looked for {cwd}/"),
        (["sft.max_length=9000"], "sft.max_length is 9000, above the model's context of 8192; lower it"),
        (["base.config.max_position_embeddings=32", "base.config.orig_max_position_embeddings=32"], "sft.max_length is 64, above the model's context of 32; lower it"),
        (["base={model: ./absent}"], "./absent: there is no such checkpoint folder; check the path"),
        (["base.config.hidden_siz=32"], "base.config.hidden_siz is not a key of HymbaConfig; the nearest is base.config.hidden_size"),
        (["eval.max_new_tokens=8192"], "eval.max_new_tokens is 8192, which leaves no room for a prompt in the model's context of 8192 tokens; lower it"),
        (["eval.gsm8k.num_fewshot=9"], "{tmp}/train.jsonl: the file has 8 rows; eval.gsm8k.train_path needs at least 9"),
        (["data.path={tmp}/alone/train.jsonl"], "eval.gsm8k.test_path is missing: training data is also the source of few-shot examples, and no test.jsonl lies beside {tmp}/alone/train.jsonl; set the path, or leave scoring out with eval=null"),
        (["dpo.data.path={tmp}/bad.jsonl"], "{tmp}/bad.jsonl:2: malformed JSON, "),
        (["sft.trainer.lr_scheduler_type=foo"], "sft.trainer is refused by SFTConfig: foo is not a valid SchedulerType"),
        (["sft.trainer.bf16=true", "sft.trainer.use_cpu=false"], "sft.trainer is refused by SFTConfig: Your setup doesn't support bf16/gpu."),
        (["sft.trainer.fp16=true"], "sft.trainer.fp16 is true, and float16 training needs a GPU; remove it"),
        (["sft.trainer.loss_type=nil"], "sft.trainer.loss_type has the value 'nil', which TRL does not know; the nearest is 'nll'"),
        (["dpo.trainer.loss_type=[sigmoid, nope]"], "dpo.trainer.loss_type has the value 'nope', which TRL does not know; it knows sigmoid, hinge, "),
        (["dpo.trainer.betta=1"], "dpo.trainer.betta is not a field of DPOConfig; did you mean 'beta'?"),
        (["launch.accelerate_config=absent.yaml"], "launch.accelerate_config is absent.yaml, which does not exist; accelerate_configs/ holds some"),
        (
            ["launch.accelerate_config=.ci/run"],
            "launch.accelerate_config .ci/run is not an accelerate configuration",
        ),
        (
            ["launch.launcher=multi_node_zero3", "launch.num_processes=16"],
            "launch.launcher is multi_node_zero3, which is made for several machines; in Slurm submit "
            "recipes/hymba-1.5b/slurm.sh, elsewhere start on each machine 'torchrun --nnodes MACHINES --nproc_per_node GPUS "
            "--rdzv_backend c10d --rdzv_endpoint HOST_0:29500 -m hymba_align sft RECIPE' (then dpo)",
        ),
        (
            ["launch.launcher=fsdp2", "launch.num_processes=2", "sft.trainer.use_cpu=true"],
            "launch.launcher is fsdp2, and sft computes on the CPU, where accelerate trains with plain DDP instead, or with "
            "processes that never meet; take a machine with GPUs, or launch.launcher=zero3",
        ),
        (
            ["launch.accelerate_config=accelerate_configs/single.yaml", "launch.num_processes=2"],
            "launch.accelerate_config is accelerate_configs/single.yaml, which is one process (distributed_type NO), and "
            "launch.num_processes is 2; choose another file, or launch.launcher",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_the_first_stage(
    recipe_file: str, work, tmp_path: Path, overrides: list[str], message: str
) -> None:
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "train.jsonl").write_text((json.dumps(ROW) + "\n") * 8)
    (tmp_path / "bad.jsonl").write_text(json.dumps(ROW) + "\n{\n")

    with pytest.raises(UsageError) as caught:
        pipeline.run_recipe(load_recipe(recipe_file, [text.replace("{tmp}", str(tmp_path)) for text in overrides]))

    assert str(caught.value).startswith(message.format(cwd=Path.cwd(), tmp=tmp_path))
    assert work == []
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_is_said_in_a_dry_run_too(recipe_file: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(json.dumps(ROW) + "\n{\n")

    with pytest.raises(UsageError, match=r"bad\.jsonl:2: malformed JSON"):
        pipeline.run_recipe(load_recipe(recipe_file, [f"dpo.data.path={tmp_path}/bad.jsonl"]), dry_run=True)


def test_a_dry_run_asks_the_hub_for_nothing_and_a_run_asks_before_it_touches_anything(
    recipe_file: str, work, tmp_path: Path
) -> None:
    offline = ["dpo.data.path=nobody/pairs"]
    pipeline.run_recipe(load_recipe(recipe_file, offline), dry_run=True)

    with pytest.raises(UsageError, match="nobody/pairs"):
        pipeline.run_recipe(load_recipe(recipe_file, offline))
    assert work == []
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_run_stops_the_run_before_it_starts(recipe_file: str, work) -> None:
    pipeline.run_training_stage(load_recipe(recipe_file), "sft")
    work.clear()

    with pytest.raises(UsageError, match="belongs to the run 'demo', and this recipe's name is 'other'"):
        pipeline.run_recipe(load_recipe(recipe_file, ["name=other"]))
    assert work == []


def test_a_stage_that_the_recipe_lacks_cannot_run(recipe_file: str) -> None:
    with pytest.raises(UsageError) as caught:
        pipeline.run_training_stage(load_recipe(recipe_file, ["sft=null"]), "sft")

    assert str(caught.value) == "the recipe 'demo' has no section sft; add one, or run another stage"


# --- Several processes ------------------------------------------------------------------------------------------------

LAUNCH = ["launch.launcher=zero2", "launch.num_processes=2"]


class FakeLauncher:
    """Stands where the launcher would be: runs the worker's part in this process, as `RANK` 0."""

    code = 0
    report: str | None = None
    commands: list[list[str]]

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.commands = []
        self.monkeypatch = monkeypatch

    def __call__(self, command: list[str], env: dict[str, str]) -> FakeLauncher:
        self.commands.append(command)
        self.env = env
        return self

    def __enter__(self) -> FakeLauncher:
        return self

    def __exit__(self, *arguments: object) -> None:
        return None

    def wait(self) -> int:
        command = self.commands[-1]
        if self.report is not None:
            Path(command[command.index("--report") + 1]).write_text(self.report)
        if self.code == 0:
            stage, path = command[-2:]
            started = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2", STARTED_BY_US: "1"}
            with self.monkeypatch.context() as patch:
                patch.setattr(os, "environ", {**self.env, **started})
                patch.setattr(hymba_align.processes.launch, "die_with", lambda parent: None)
                pipeline.run_training_stage(load_recipe(path), stage)  # type: ignore[arg-type]
        return self.code


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> FakeLauncher:
    fake = FakeLauncher(monkeypatch)
    monkeypatch.setattr(hymba_align.processes.launch, "subprocess", SimpleNamespace(Popen=fake))
    return fake


def test_training_stages_are_launched_with_the_resolved_recipe(
    recipe_file: str, work, launcher: FakeLauncher, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    pipeline.run_recipe(load_recipe(recipe_file, LAUNCH))

    assert [command[:3] for command in launcher.commands] == [[sys.executable, "-m", "hymba_align.processes.agent"]] * 2
    assert launcher.commands[0][3:5] == ["--parent", str(os.getpid())]
    assert launcher.commands[0][5] == "--report"
    assert launcher.commands[0][7:] == ["--processes", "2", "sft", f"{run}/recipe.yaml"]
    assert work[1] == ("sft", None)
    assert work[3] == ("dpo", f"{run}/sft/final")
    assert names(work) == ALL


def test_a_dry_run_prints_the_launch_command(
    recipe_file: str, work, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.run_recipe(load_recipe(recipe_file, LAUNCH), dry_run=True)

    assert (
        f"sft trains with zero2: torchrun --nproc_per_node 2 -m hymba_align sft {tmp_path}/run/recipe.yaml\n"
    ) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "passed_on", "how"),
    [
        (1, 1, "ended with exit code 1; its message is above"),
        (137, 137, "ended with exit code 137; its message is above"),
        (
            -9,
            137,
            "was killed by SIGKILL, which the system also sends when memory is full; the same command continues from the "
            "last checkpoint",
        ),
    ],
)
def test_the_exit_code_of_launched_processes_is_passed_on(
    recipe_file: str, work, launcher: FakeLauncher, code: int, passed_on: int, how: str
) -> None:
    launcher.code = code

    with pytest.raises(HymbaAlignError) as caught:
        pipeline.run_training_stage(load_recipe(recipe_file, LAUNCH), "sft")

    assert caught.value.exit_code == passed_on
    assert str(caught.value) == f"sft failed: its launcher {how}"
    assert not RunFolder(Path(load_recipe(recipe_file).output_dir or "")).read_manifest("sft").get("completed")


def test_what_the_launcher_saw_is_said(recipe_file: str, work, launcher: FakeLauncher) -> None:
    launcher.code, launcher.report = 137, "process 1 (pid 12) was killed by SIGKILL"

    with pytest.raises(HymbaAlignError) as caught:
        pipeline.run_training_stage(load_recipe(recipe_file, LAUNCH), "sft")

    assert str(caught.value) == "sft failed: process 1 (pid 12) was killed by SIGKILL"


def test_preemption_of_the_processes_is_preemption_of_the_command(
    recipe_file: str, work, launcher: FakeLauncher
) -> None:
    launcher.code, launcher.report = 75, "it was preempted"

    with pytest.raises(Preempted) as caught:
        pipeline.run_training_stage(load_recipe(recipe_file, LAUNCH), "sft")

    assert str(caught.value) == "sft: it was preempted; the same command continues it"
    assert caught.value.exit_code == 75


def test_fewer_processes_than_asked_for_is_an_error(recipe_file: str, work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STARTED_BY_US, "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(hymba_align.processes.launch, "die_with", lambda parent: None)

    with pytest.raises(HymbaAlignError) as caught:
        pipeline.run_training_stage(load_recipe(recipe_file, LAUNCH), "sft")

    assert str(caught.value) == (
        "launch.num_processes is 2, but 1 were started; "
        "run 'hymba-align sft' itself, which starts as many as the recipe asks for"
    )
    assert work == []


def test_inside_torchrun_a_stage_uses_the_processes_that_are_there(
    recipe_file: str, work, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(recipe_file, LAUNCH)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("RANK", "0")
    pipeline.run_training_stage(recipe, "sft")
    assert work == [("sft", None)]
    assert RunFolder(tmp_path / "run").read_manifest("sft")["completed"]

    capsys.readouterr()
    monkeypatch.setenv("RANK", "1")
    pipeline.run_training_stage(recipe, "sft")
    assert capsys.readouterr().out == ""
    assert work == [("sft", None)]


def test_other_ranks_wait_until_rank_0_has_prepared_the_folder(
    recipe_file: str, work, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(pipeline, "WAIT_FOR_RANK_0_S", 0.3)
    monkeypatch.setattr(pipeline, "NOTICE_S", 0.1)

    with pytest.raises(UsageError) as caught:
        pipeline.run_training_stage(load_recipe(recipe_file), "sft")

    assert str(caught.value) == (
        f"rank 1 waited 0 s for rank 0 to start sft in {tmp_path}/run; set output_dir to a folder that all machines share"
    )
    assert capsys.readouterr().err == (
        f"rank 1 waits for rank 0 to start sft in {tmp_path}/run, which all machines have to share\n"
    )
    assert work == []


def test_only_rank_0_judges_the_run_folder_which_others_may_see_half_made(
    recipe_file: str, work, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "run" / "sft").mkdir(parents=True)
    recipe = load_recipe(recipe_file)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(pipeline, "WAIT_FOR_RANK_0_S", 0.1)

    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UsageError, match="rank 1 waited"):
        pipeline.run_training_stage(recipe, "sft")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="is not empty and holds no run"):
        pipeline.run_training_stage(recipe, "sft")


def test_another_rank_trains_nothing_where_rank_0_brought_the_result_back(
    recipe_file: str, work, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = load_recipe(recipe_file)
    pipeline.run_training_stage(recipe, "sft")
    pipeline.run_training_stage(load_recipe(recipe_file, ["seed=7"]), "sft")
    work.clear()
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    inputs = next(step.fingerprint for step in pipeline.plan(recipe) if step.name == "sft")

    def rank_0(seconds: float) -> None:
        RunFolder(tmp_path / "run").restore("sft", inputs)

    monkeypatch.setattr(pipeline.time, "sleep", rank_0)
    pipeline.run_training_stage(recipe, "sft")

    assert work == []


def fake_gpus(monkeypatch: pytest.MonkeyPatch, calls: list[str], work: list[tuple[str, str | None]]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: "score base" in names(work))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(f"freed after {names(work)[-1]}"))


def test_one_process_takes_one_gpu_before_anything_touches_it(
    recipe_file: str, work, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpus(monkeypatch, [], work)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6,7,8")

    pipeline.run_recipe(load_recipe(recipe_file))

    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"


def test_processes_to_come_get_all_gpus_and_the_memory_that_scoring_used(
    recipe_file: str, work, launcher: FakeLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fake_gpus(monkeypatch, calls, work)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")

    pipeline.run_recipe(load_recipe(recipe_file, LAUNCH))

    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5,6"
    assert calls == ["freed after score base", "freed after score sft"]


def test_run_refuses_to_be_one_of_many(recipe_file: str, work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")

    with pytest.raises(UsageError) as caught:
        pipeline.run_recipe(load_recipe(recipe_file))

    assert str(caught.value) == (
        "'run' starts its processes itself (launch.num_processes), and is one process; start it without torchrun, "
        "accelerate or srun, or start 'sft' and 'dpo' with them, and 'run' afterwards, which scores what they made"
    )
    assert work == []


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
    for stage in ("base", "sft", "dpo"):
        assert json.loads((run / "eval" / stage / "gsm8k.json").read_text())["n"] == 2
    assert (run / "report.md").exists()
    assert f"Report: {run}/report.md" in capsys.readouterr().out
