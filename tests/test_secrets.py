"""Passwords, tokens and keys that tests plant stay where they were put: no log, run folder, cache or model card has them."""

from __future__ import annotations

import base64
import functools
import http.server
import io
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from hymba_align import secrets
from hymba_align.cli import main
from hymba_align.data.reading.sources import open_source
from hymba_align.errors import DataError, RecipeError
from hymba_align.plan import plan
from hymba_align.processes.launch import secrets_for
from hymba_align.recipe import Recipe, SourceSection, load_recipe
from hymba_align.recipe_loading import dump_yaml
from hymba_align.secrets import (
    RedactingStream,
    first_mask,
    redact,
    secrets_variable,
    shown,
    with_secrets,
    without_secrets,
)

ROOT = Path(__file__).resolve().parent.parent

PASSWORD = "pa55-of-the-url"
SIGNATURE = "f00d5ignature0123456789"
BEARER = "b34rer-in-the-options"
HUB_TOKEN = "hf_plantedPLANTEDplanted0123456789"
WANDB_KEY = "wandb0123456789planted0123456789planted"
ACCESS = "planted-access-key-of-s3"
PLANTED = (PASSWORD, SIGNATURE, BEARER, HUB_TOKEN, WANDB_KEY, ACCESS)


@pytest.fixture(autouse=True)
def _forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test plants, another does not know."""
    monkeypatch.setattr(secrets, "_remembered", set())


def leaks(text: str) -> list[str]:
    coded = [base64.b64encode(f"user:{PASSWORD}".encode()).decode()]
    return [secret for secret in (*PLANTED, *coded) if secret in text]


def leaking_files(folder: Path) -> list[str]:
    """Files below a folder that hold a planted secret, in their names too."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes().decode("utf-8", "replace")
            found += [f"{path.relative_to(folder)}: {secret}" for secret in leaks(content + str(path))]
    return found


# ---- texts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        (f"GET https://user:{PASSWORD}@host/a.jsonl failed", "GET https://***@host/a.jsonl failed"),
        (f"https://{PASSWORD}@host/a", "https://***@host/a"),
        (
            f"s3://b/a.jsonl?X-Amz-Algorithm=AWS4&X-Amz-Credential=AKIA%2Fx&X-Amz-Signature={SIGNATURE}&X-Amz-Date=2026",
            "s3://b/a.jsonl?X-Amz-Algorithm=AWS4&X-Amz-Credential=***&X-Amz-Signature=***&X-Amz-Date=2026",
        ),
        (f"https://h/a?sig={SIGNATURE}#x", "https://h/a?sig=***#x"),
        (f"401: Authorization: Bearer {BEARER}", "401: Authorization: Bearer ***"),
        (f"token {HUB_TOKEN} is wrong", "token *** is wrong"),
        ("AKIAABCDEFGHIJKLMNOP", "***"),
        (f"override 'sft.trainer.hub_token={HUB_TOKEN}'", "override 'sft.trainer.hub_token=***'"),
        ("override 'data.storage_options.key=short'", "override 'data.storage_options.key=***'"),
        ("password = hunter22", "password = ***"),
    ],
)
def test_a_secret_is_masked_by_its_shape_or_place(text: str, safe: str) -> None:
    assert redact(text) == safe


@pytest.mark.parametrize(
    "text",
    [
        "sft.trainer.eos_token=</s> cannot be set",
        "sft.max_length=1024 tokens=123456",
        "https://huggingface.co/nvidia/Hymba-1.5B-Base?download=true",
        "loss=0.1234 pad_token_id=32000",
        "123 of 456 tokens trained on",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_values_of_the_environment_are_known_by_their_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOME_SERVICE_API_KEY", "planted-in-the-environment")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", ACCESS)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    (tmp_path / "token").write_text("planted-in-the-token-file\n")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))

    text = redact(f"a planted-in-the-environment b {ACCESS} c planted-in-the-token-file d false")

    assert text == "a *** b *** c *** d false"


def test_a_stream_masks_what_is_written_to_it_and_is_the_stream_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", HUB_TOKEN)
    inner = io.StringIO()
    stream = RedactingStream(inner)
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("planted")
    logger.addHandler(handler)

    print("a", HUB_TOKEN, file=stream, flush=True)
    try:
        raise RuntimeError(f"https://user:{PASSWORD}@host")
    except RuntimeError:
        logger.exception("failed")

    text = inner.getvalue()
    assert text.startswith("a ***\nfailed\nTraceback")
    assert "RuntimeError: https://***@host" in text
    assert not leaks(text)
    assert stream.isatty() == inner.isatty()


# ---- recipes --------------------------------------------------------------------------------------------------------


def values_of(base: dict[str, Any], **data: Any) -> dict[str, Any]:
    return {
        "name": "planted",
        "base": base,
        "data": data,
        "sft": {"max_length": 64, "trainer": {"max_steps": 1, "per_device_train_batch_size": 1}},
    }


SECRET_DATA = {
    "path": f"https://user:{PASSWORD}@host/a.jsonl?X-Amz-Signature={SIGNATURE}&version=7",
    "storage_options": {
        "key": "AK",
        "secret": ACCESS,
        "anon": False,
        "client_kwargs": {"region_name": "eu", "x": BEARER},
    },
}


def test_the_recipe_of_a_run_folder_has_masks_and_everything_else(small_base: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(values_of(small_base, **SECRET_DATA))

    written = yaml.safe_load(recipe.dump_yaml())

    assert not leaks(recipe.dump_yaml())
    assert written["data"]["path"] == "https://***@host/a.jsonl?X-Amz-Signature=***&version=7"
    options = written["data"]["storage_options"]
    assert options == {"key": "***", "secret": "***", "anon": False, "client_kwargs": {"region_name": "eu", "x": "***"}}
    assert written["base"]["config"] == small_base["config"]


def test_processes_of_a_run_read_its_recipe_with_the_secrets_put_back(
    small_base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [SECRET_DATA, {"path": "b.jsonl"}, {**SECRET_DATA, "path": "s3://bucket/b.jsonl"}]
    values = values_of(small_base, sources=sources)
    (tmp_path / "recipe.yaml").write_text(dump_yaml(values))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    (tmp_path / "run.yaml").write_text(recipe.dump_yaml())

    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "run.yaml")
    for name, value in secrets_for(recipe).items():
        monkeypatch.setenv(name, value)
    again = load_recipe(tmp_path / "run.yaml")

    assert str(caught.value) == (
        f"{tmp_path / 'run.yaml'}: data.sources.0.path holds ***, which stands for a secret that run folders leave out; start "
        "from the recipe that has it, or give it as an override"
    )
    assert again.data == recipe.data
    assert again.data_for("sft") == recipe.data_for("sft")


def test_masks_and_secrets_are_inverse(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"data": {"sources": [SECRET_DATA]}, "name": "x"}
    masked = without_secrets(values)
    assert not leaks(json.dumps(masked))
    assert first_mask(masked) == "data.sources.0.path"
    for name, value in secrets_variable(values).items():
        monkeypatch.setenv(name, value)
    assert with_secrets(masked) == values
    assert first_mask(with_secrets(masked)) is None
    assert secrets_variable({"name": "x", "data": {"path": "a.jsonl"}}) == {}


def test_a_new_signature_of_the_same_url_does_not_train_again(small_base: dict[str, Any]) -> None:
    def fingerprint(**data: Any) -> str:
        recipe = Recipe.model_validate(values_of(small_base, **data))
        return next(step.fingerprint for step in plan(recipe))

    missing = "nope://user:{}@host/a.jsonl?sig={}"
    first = fingerprint(path=missing.format("one1one1", "aaaaaaaa"), storage_options={"secret": "one"})
    again = fingerprint(path=missing.format("two2two2", "bbbbbbbb"), storage_options={"secret": "two"})
    other = fingerprint(path=missing.format("one1one1", "aaaaaaaa").replace("a.jsonl", "b.jsonl"))

    assert first == again != other


@pytest.mark.parametrize(
    "override",
    [
        f"sft.trainer.hub_token={HUB_TOKEN}",
        f"data.storage_options={ACCESS}",
        f"data.storage_options.secret.deeper={{a: [{ACCESS}]}}",
        f"data.storage_option.secret={ACCESS}",
        f"data.path=[https://user:{PASSWORD}@host/a]",
        f"data.path=https://user:{PASSWORD}@host/a?X-Amz-Signature={SIGNATURE}",
        f"datas.path=https://user:{PASSWORD}@host/a?X-Amz-Signature={SIGNATURE}",
    ],
)
def test_no_complaint_about_a_recipe_repeats_its_secrets(
    small_base: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str], override: str
) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_yaml(values_of(small_base, path="data/arithmetic/train.jsonl")))

    code = main(["run", str(tmp_path / "recipe.yaml"), override, "--dry-run", f"output_dir={tmp_path / 'out'}"])

    captured = capfd.readouterr()
    assert not leaks(captured.out + captured.err), captured
    assert code in (0, 2)  # 0: a stream's data is not asked for in a dry run


def test_errors_of_file_systems_do_not_repeat_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    section = SourceSection(path=f"http://user:{PASSWORD}@127.0.0.1:9/a.jsonl?sig={SIGNATURE}")

    with pytest.raises(DataError) as caught:
        next(open_source(section).chunks())

    assert str(caught.value).startswith("http://***@127.0.0.1:9/a.jsonl?sig=***: cannot be read (")
    assert not leaks(str(caught.value))
    assert shown(section.path) == "http://***@127.0.0.1:9/a.jsonl?sig=***"


# ---- a whole run ----------------------------------------------------------------------------------------------------


class Guarded(http.server.SimpleHTTPRequestHandler):
    """Gives files to who has the password, the signature and the key only."""

    refused: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        wanted = (f"sig={SIGNATURE}" in self.path, self.headers.get("X-Key") == BEARER)
        if not all(wanted):
            self.refused.append(self.path)
            self.send_error(401, f"wrong: {self.path} {self.headers.get('X-Key')}")
            return
        super().do_GET()

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a server that gives out `rows.jsonl`."""
    folder = tmp_path / "served"
    folder.mkdir()
    rows = [{"question": f"{a} + 1", "answer": f"{a + 1}"} for a in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Guarded, directory=str(folder))
    ) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def test_a_run_on_two_processes_uses_the_secrets_and_keeps_them_to_itself(
    tmp_path: Path, server: str, small_base: dict[str, Any]
) -> None:
    """Its data needs the secrets, in the launched processes too; a converter prints the environment and fails with it."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "g_leaky.py").write_text(
        "import os\n"
        "def convert(row):\n"
        "    print('the token is', os.environ['HF_TOKEN'])\n"
        "    if row['question'] == '3 + 1':\n"
        "        raise ValueError('no access with ' + os.environ['WANDB_API_KEY'])\n"
        "    return row\n"
    )
    values = values_of(
        {**small_base, "tokenizer": str(ROOT / small_base["tokenizer"])},
        path=f"http://{server}/rows.jsonl?sig={SIGNATURE}",
        storage_options={"headers": {"X-Key": BEARER}},
        convert="g_leaky:convert",
        bad_rows="drop",
    )
    values["sft"]["trainer"] |= {"use_cpu": True}
    values["launch"] = {"launcher": "ddp", "num_processes": 2}
    (work / "recipe.yaml").write_text(dump_yaml(values))
    environment = {
        **os.environ,
        "HF_TOKEN": HUB_TOKEN,
        "WANDB_API_KEY": WANDB_KEY,
        "AWS_SECRET_ACCESS_KEY": ACCESS,
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(ROOT),
    }

    done = subprocess.run(
        [sys.executable, "-m", "hymba_align", "run", "recipe.yaml"],
        cwd=work, env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip

    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-3000:]
    assert "the token is ***" in output
    assert f"http://{server}/rows.jsonl?sig=***" in output
    assert not leaks(output)
    assert (work / "runs" / "planted" / "sft" / "final" / "model.safetensors").is_file()
    (work / "recipe.yaml").unlink()  # the user's own, which has them
    assert not leaking_files(tmp_path / "work")
    assert not leaking_files(tmp_path / "cache")
    data = json.loads((work / "runs" / "planted" / "sft" / "data.json").read_text())
    assert "no access with ***" in json.dumps(data)
