"""`export --push`: through the hub's own client, with nothing secret asked for or told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import HfApi, constants

from hymba_align.cli import main

TOKEN = "hf_" + "x" * 34


class Hub:
    """What stands in for the hub behind the client's class: it remembers calls, and has one public repository."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.error: Exception | None = None
        self.uploaded: set[str] = set()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        hub = self

        def create_repo(_: HfApi, repo_id: str, *, private: bool | None = None, exist_ok: bool = False) -> None:
            hub.calls.append(("create_repo", {"repo_id": repo_id, "private": private, "exist_ok": exist_ok}))

        def repo_info(_: HfApi, repo_id: str) -> SimpleNamespace:
            return SimpleNamespace(private=repo_id != "me/public")

        def upload_folder(_: HfApi, *, repo_id: str, folder_path: Path, commit_message: str) -> SimpleNamespace:
            if hub.error is not None:
                raise hub.error
            hub.calls.append(("upload_folder", {"repo_id": repo_id, "commit_message": commit_message}))
            hub.uploaded = {file.name for file in Path(folder_path).iterdir()}
            return SimpleNamespace(repo_url=f"https://huggingface.co/{repo_id}")

        for method in (create_repo, repo_info, upload_folder):
            monkeypatch.setattr(HfApi, method.__name__, method)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    made.install(monkeypatch)
    return made


def test_a_folder_is_pushed_in_one_commit_and_its_card_names_the_repository(
    hub: Hub, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(base), str(tmp_path / "out"), "--push", "me/mine", "--private"]) == 0

    assert hub.calls == [
        ("create_repo", {"repo_id": "me/mine", "private": True, "exist_ok": True}),
        ("upload_folder", {"repo_id": "me/mine", "commit_message": "Model exported by hymba-align"}),
    ]
    assert hub.uploaded == {file.name for file in (tmp_path / "out").iterdir()}
    assert 'name = "me/mine"' in (tmp_path / "out" / "README.md").read_text()
    told = capsys.readouterr()
    assert "Pushed to https://huggingface.co/me/mine" in told.out
    assert TOKEN not in told.out + told.err


def test_what_should_be_private_is_never_uploaded_to_a_public_repository(
    hub: Hub, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(base), str(tmp_path / "out"), "--push", "me/public", "--private"]) == 2

    assert "me/public is there and public, and --private was asked for; nothing was uploaded" in capsys.readouterr().err
    assert hub.uploaded == set()


@pytest.mark.parametrize(
    "kind", [OSError, type("ConnectError", (Exception,), {"__module__": "httpx2"})], ids=["refused", "no network"]
)
def test_a_hub_that_refuses_leaves_the_folder_and_says_how_to_go_on(
    kind: type[Exception], hub: Hub, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.error = kind(f"403 Forbidden for {TOKEN}")

    assert main(["export", str(base), str(tmp_path / "out"), "--push", "me/mine"]) == 1

    told = capsys.readouterr().err
    assert (
        f"{tmp_path}/out is written, and could not be pushed to me/mine: 403 Forbidden for ***; push it later with "
        f"'hf upload me/mine {tmp_path}/out'"
    ) in told
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_without_a_token_nothing_is_begun(
    hub: Hub, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)

    assert main(["export", str(base), str(tmp_path / "out"), "--push", "me/mine"]) == 2

    assert (
        "me/mine cannot be pushed to without a token that may write: set the environment variable HF_TOKEN"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_offline_a_push_is_refused_in_a_sentence(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)

    assert main(["export", str(base), str(tmp_path / "out"), "--push", "me/mine"]) == 2

    told = "Error: me/mine cannot be pushed to: HF_HUB_OFFLINE is set; unset it, or leave --push out"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--push", "mine"], ["--push", "a/b/c"], ["--private"]])
def test_a_push_without_a_proper_repository_is_refused(base: Path, tmp_path: Path, words: list[str]) -> None:
    assert main(["export", str(base), str(tmp_path / "out"), *words]) == 2
    assert not (tmp_path / "out").exists()
