"""Secrets are not in what a run writes, and what only looks like one is."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra._internal.utils import get_args_parser

from symbiotic.callbacks.events import read_events, record_event
from symbiotic.config import compose, save_config
from symbiotic.launch import launch
from symbiotic.redact import REDACTED, RedactedFile, redacted, redacted_text
from symbiotic.studies.member import OUTPUT, output_to, told

CANARY = "canary-0123456789"


@pytest.mark.parametrize(
    "value",
    [
        {"api_key": CANARY},
        {"wandb": {"settings": [{"HF_TOKEN": CANARY}]}},
        {"credentials": {"user": CANARY, "more": [CANARY]}},
        {"proxy": f"http://me:{CANARY}@localhost:8080/x"},
        {"headers": [f"Authorization: Bearer {CANARY}"]},
        {"storage": {"client-secret": CANARY, "access_key": f"{CANARY}x", "s3.password": CANARY}},
        {"note": f"key {CANARY}-of-the-environment"},
    ],
)
def test_nothing_is_left_of_a_secret(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", f"{CANARY}-of-the-environment")
    assert CANARY not in str(redacted(value))
    assert REDACTED in str(redacted(value))


@pytest.mark.parametrize(
    "text",
    [
        f"GET https://{CANARY}@host/x failed",
        f"https://me:p@{CANARY}@host:8080/x",
        f"redis://:{CANARY}@host",
        f"https://host/x?X-Amz-Credential={CANARY}&X-Amz-Signature={CANARY}&X-Amz-Date=1",
        f"https://host/x?a=1&GoogleAccessId={CANARY}&Signature={CANARY}",
        f"https://host/x?Policy={CANARY}&Key-Pair-Id={CANARY}",
        f"https://host/cb#access_token={CANARY}",
        f"{{'Authorization': 'Token {CANARY}'}}",
        f'"authorization": "{CANARY}"',
        f"proxy-authorization: Basic {CANARY}",
        f"Cookie: a={CANARY}; b={CANARY}",
        f"x-api-key: {CANARY}",
        f"connect(password='{CANARY}', port=1)",
        f"api_key={CANARY} was refused",
        "hf_" + "aB" * 17,
        "ghp_" + "aB1" * 12,
        "AKIA" + "ABCD1234" * 2,
        "eyJhbGciOiJI.eyJzdWIiOiIx.c2lnbmF0dXJl",
    ],
)
def test_nothing_is_left_of_a_secret_in_a_text(text: str) -> None:
    found = redacted_text(text)
    assert REDACTED in found
    for part in (CANARY, "aBaB", "aB1aB1", "ABCD", "c2ln"):
        assert part not in found


def test_what_is_no_secret_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORT_TOKEN", "1")
    plain = {"row_tokens": 80, "caption_tokens": "4096", "tokenizer": "a.json", "author": "b", "token": None, "x": "1"}
    plain |= {"keys": ["a"], "url": "https://example.org:8080/a@b", "max_tokens": 3, "top_k": 1, "secret": 7}
    plain |= {"token_kind": "prompt", "token_rows": "80", "n_token_type": "a"}
    assert redacted(plain) == plain


@pytest.mark.parametrize(
    "text",
    [
        "Basic colours and bearer bonds",
        "step 123456: loss 0.123456 1.234567e-05, 1_234_567 tokens",
        "joint 5/6  ce 6.304  flow 0.6886  10,063 tok/s",
        "s3 bucket at https://example.org/a?page=123456&size=3",
        "mail me@example.org; see https://example.org:8080/a@b",
        "rates.lr=0.0003: must be positive; password: too short",
        "tests must pass: the pass rate",
        "sk-learn, hf_datasets, AKIA",
    ],
)
def test_ordinary_lines_and_numbers_stay(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for n, value in enumerate(("123456", "0.123456", "1.234567e-05", "pass", "est", "10,063")):
        monkeypatch.setenv(f"A{n}_TOKEN", value)
    assert redacted_text(text) == text


def test_short_values_of_the_environment_are_words_and_long_ones_are_found_everywhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("A_TOKEN", "hunter")
    monkeypatch.setenv("B_TOKEN", "hunter-and-more")
    monkeypatch.setenv("C_PASSWORD", "123456789012")
    assert redacted_text("huntersome hunter, xhunter-and-morex 123456789012") == (
        f"huntersome {REDACTED}, x{REDACTED}x {REDACTED}"
    )


def test_a_number_that_is_a_password_is_redacted_below_its_key() -> None:
    assert redacted({"password": 12345678, "seed": 12345678}) == {"password": REDACTED, "seed": 12345678}


def test_the_config_of_a_run_folder_holds_no_secret(tmp_path: Path) -> None:
    target = "lightning.pytorch.loggers.WandbLogger"
    config = compose([f"+logger.wandb={{_target_:{target},project:mine,api_key:{CANARY}}}"])
    save_config(config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert CANARY not in text
    assert yaml.safe_load(text)["logger"]["wandb"] == {"_target_": target, "project": "mine", "api_key": REDACTED}
    assert redacted_text(f"the logger says: {CANARY} is no key") == f"the logger says: {REDACTED} is no key"


def test_output_tracebacks_and_events_of_a_run_hold_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STORE_SECRET", CANARY)

    def run(config: Any) -> float:
        print("key", CANARY, "used", end=" ")
        print("here")
        raise RuntimeError(f"https://host/x?sig={CANARY} refused {CANARY}")

    with pytest.raises(RuntimeError), output_to(tmp_path / OUTPUT):
        told(run, None)  # type: ignore[arg-type]
    text = (tmp_path / OUTPUT).read_text()
    assert CANARY not in text
    assert f"key {REDACTED} used here\n" in text
    assert f"RuntimeError: https://host/x?sig={REDACTED} refused {REDACTED}\n" in text
    trainer: Any = type("Trainer", (), {"is_global_zero": True, "default_root_dir": str(tmp_path)})
    record_event(trainer, 3, "skipped", f"sample {CANARY}", samples=[CANARY], token_kind="prompt", auth="a plain word")
    (event,) = read_events(tmp_path)
    assert event == {
        **{"step": 3, "kind": "skipped", "text": f"sample {REDACTED}", "samples": [REDACTED]},
        **{"token_kind": "prompt", "auth": "a plain word"},
    }
    assert redacted_text("a prompt, a plain word") == "a prompt, a plain word"
    assert CANARY not in capsys.readouterr().out


def test_what_is_no_line_yet_is_written_in_the_end() -> None:
    inner = io.StringIO()
    file = RedactedFile(inner)
    file.write("a\nhttps://me:pass")
    file.write("word1@host")
    assert inner.getvalue() == "a\n"
    file.close()
    assert inner.getvalue() == f"a\nhttps://{REDACTED}@host"


def test_a_bug_is_shown_without_secrets(project_root: Path) -> None:
    """The command's own hook for what nothing expected."""
    script = (
        "import sys; sys.path.insert(0, 'src'); sys.argv = ['train.py', '--foo']\n"
        "from symbiotic.launch import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"raise ValueError('password={CANARY} in a bug')"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=project_root, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"ValueError: password={REDACTED} in a bug" in done.stderr
    assert json.dumps(CANARY).strip('"') not in done.stderr


def test_what_a_multirun_writes_has_no_secret(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logger = f"+logger.more={{_target_: lightning.pytorch.loggers.CSVLogger, save_dir: x, api_key: {CANARY}, "
    logger += f"name: 'https://user:{CANARY}@host/x?token={CANARY}'}}"
    paths = [f"paths.{name}={tmp_path / name}" for name in ("runs", "data", "cache")]
    arguments = ["-m", "experiment=smoke", "dry_run=true", "seed=0,1", logger, *paths]
    assert launch(get_args_parser().parse_args(arguments)) == 0
    (written,) = (tmp_path / "runs").rglob("multirun.yaml")
    assert REDACTED in written.read_text()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]
