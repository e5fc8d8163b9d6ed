"""Secrets are hidden in every form, by one function, at every door."""

import base64
import io
import json
import logging
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect.exceptions import ParameterTypeError
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import ValidationError, validate

from dllm import secrets
from dllm.config.load import load_params
from dllm.errors import ConfigError, ServerError
from flows import artifacts, regenerate_parts
from flows.parameters import Request
from flows.pipeline import pipeline
from flows.regenerate_parts import regenerate_part
from tests.flows.conftest import Project, copy_project

ROOT = Path(__file__).parents[2]
CLOSED = "http://ann-7:s3cret-word@127.0.0.1:9"

PLANTED = {
    "MLFLOW_TRACKING_URI": "http://ann-7:s3cret-word@127.0.0.1:9/mlflow",
    "DLLM_TARGET_URL": "http://bo:p@ss4@127.0.0.1:1/v1,http://cy:slash/5@127.0.0.1:2/v1",
    "OPENAI_API_KEY": "sk-a key+with/odd=signs",
    "HF_TOKEN": "hf_0123456789abcdefgh",
    "AWS_SECRET_ACCESS_KEY": "aws/secret+7",
    "PREFECT_API_AUTH_STRING": "admin:auth-pw-8",
    "PGPASSWORD": "pgpw-9\n",
}
VALUES = (
    "s3cret-word",
    "p@ss4",
    "slash/5",
    "sk-a key+with/odd=signs",
    "hf_0123456789abcdefgh",
    "aws/secret+7",
    "auth-pw-8",
    "pgpw-9",
)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Mapping[str, str]:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    return PLANTED


FORMS = {
    "raw": lambda value: value,
    "percent": lambda value: quote(value, safe=""),
    "json": json.dumps,
    "repr": repr,
    "base64": lambda value: base64.b64encode(value.encode()).decode(),
    "in the middle": lambda value: f"x{value}y",
    "cut": lambda value: f"failed with {value}"[:-1],
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("value", VALUES)
def test_values_of_the_environment_are_hidden_in_every_form(planted, value: str, form) -> None:
    text = form(value)
    hidden = secrets.hide(text)
    assert secrets.HIDDEN in hidden
    assert value[:-1] not in hidden and text not in hidden


def test_what_http_clients_make_of_user_and_password_is_hidden(planted, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "dora")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pw-of-dora")
    for pair in ("ann-7:s3cret-word", "bo:p@ss4", "admin:auth-pw-8", "dora:pw-of-dora"):
        assert secrets.hide(base64.b64encode(pair.encode()).decode()) == secrets.HIDDEN


@pytest.mark.parametrize(
    "text",
    [
        "http://ann:pw7@host:1/x",
        "https://tok7@host",
        "postgresql+psycopg://ann:pw7@host/db",
        "http://ann:p@pw7@host",
        "http://ann:x/pw7@host/y",
        "http://ann:x#pw7@host",
        "http:\\/\\/ann:pw7@host\\/x",
        "http%3A%2F%2Fann%3Apw7%40host",
        "see HTTP://Ann:PW7@HOST.",
        "https://h/x?a=1&access_token=pw7",
        "https://h/x?X-Amz-Signature=pw7&y=2",
        "https://h/x?api_key=pw7#z",
        "Authorization: Bearer abcpw7",
        "'--api-key', 'pw7'",
        "--api-key=pw7",
        "host=h user=u password=pw7",
        "cut short: http://ann:pw7",
        "token hf_pw7aaaaaaaaaaaaaaaaaaa",
        "--target-server ann:pw7@host:8000/v1",
        "['ann:pw7@10.0.0.1']",
        "ann:pw7@host.example/v1",
        "at //ann:pw7@host/x",
        "X-Api-Key: pw7",
        "{'api_key': 'pw7'}",
        '{\\"api_key\\": \\"pw7\\"}',
        '"access_token":"pw7"',
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJwdzcifQ.pw7aaaaaaaaaaaaa",
        *(f"sent {prefix}pw7{'a' * 40}" for prefix in ("nvapi-", "gsk_", "xai-", "AIza", "ya29.", "pypi-", "r8_")),
    ],
)
def test_credentials_are_known_by_their_form(text: str) -> None:
    hidden = secrets.hide(text)
    assert "pw7" not in hidden.lower() and "tok7" not in hidden and secrets.HIDDEN in hidden
    assert secrets.hide(hidden) == hidden
    assert secrets.holds_secret(text)


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:5000/#/experiments/1/runs/abc",
        "http://[::1]:8000/v1",
        "models:/name@champion",
        "sqlite:////tmp/a@b/mlflow.db",
        "http://127.0.0.1:8000/v1/files/a@b",
        "unexpected token: foo at 4096",
        "git@github.com:x/y.git",
        "docker.io/lmsysorg/sglang:v0.5@sha256:0123456789abcdef",
        "models:/name@1, cais/mmlu:all@test[:9], mailto:ann@host.example",
        "{'mask_token': '[MASK]', 'api_key': None}",
        "at 12:30@4096, //x/y",
        "a basic settings file; none, false",
        "set train.max_length=512 or --tokenizer-path x",
        "x[0:n]@W.mT, lambda q:q@k.transpose(1, 2), {0:a@b.mean()}, [rows:r@w.t]",
        "rank:0@node1:29500, 12:30@cafe.com, Contact:john@example.com, From:a.b@example.com",
        "data/2026-11-30T12:30@node1.cluster/rows.jsonl, /data/run:v1@cluster.local/rows",
    ],
)
def test_text_without_secrets_stays(monkeypatch, text: str) -> None:
    for name, value in (("OPENAI_API_KEY", "none"), ("TOKENIZERS_PARALLELISM", "false"), ("MAX_TOKENS", "4096")):
        monkeypatch.setenv(name, value)
    assert secrets.hide(text) == text
    assert not re.search(secrets.pattern(), text)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs", "Zs", "Cc"]), min_size=4), st.text(), st.text())
def test_any_password_is_hidden_wherever_it_stands(password: str, before: str, after: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOME_PASSWORD", password)
        hidden = secrets.hide(f"{before}{password}{after}")
        is_word = password.isalpha() or password.isdigit()
        assert is_word or password not in hidden.replace(secrets.HIDDEN, "\0")


def test_records_are_hidden_at_any_depth(planted) -> None:
    record = {"servers": [{"url": "http://a:b@h/v1"}], "n": 1, "why": ("s3cret-word", None)}
    assert secrets.hide_in(record) == {"servers": [{"url": "http://***@h/v1"}], "n": 1, "why": ["***", None]}


def test_errors_hold_no_secret(planted) -> None:
    error = ServerError("no s3cret-word", where="http://a:b7@h", hint="try pgpw-9")
    assert str(error) == "no *** (http://***@h); try ***"
    assert error.args == ("no ***",)


def test_what_a_process_prints_and_logs_is_hidden(planted, monkeypatch) -> None:
    out, error = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", error)
    before = logging.getLogRecordFactory()
    try:
        secrets.install()
        secrets.install()
        print("View run at http://ann-7:s3cret-word@127.0.0.1:9/#/x", file=sys.stdout)
        sys.stderr.writelines(["aws/secret+7\n"])
        handler = logging.StreamHandler(logged := io.StringIO())
        logger = logging.getLogger("test of secrets")
        logger.addHandler(handler)
        logger.propagate = False
        logger.warning("%s failed", "http://ann-7:s3cret-word@h")
        try:
            raise ValueError("pgpw-9")
        except ValueError:
            logger.exception("at %d", 7)
    finally:
        logging.setLogRecordFactory(before)
    assert out.getvalue() == "View run at http://***@127.0.0.1:9/#/x\n"
    assert error.getvalue() == "***\n"
    assert "http://***@h failed" in logged.getvalue() and "at 7" in logged.getvalue()
    assert "ValueError: ***" in logged.getvalue() and "pgpw" not in logged.getvalue()


def test_a_password_made_at_a_start_can_be_remembered(monkeypatch) -> None:
    monkeypatch.setattr(secrets, "_remembered", set())
    secrets.remember("made-at-start")
    assert secrets.hide("made-at-start") == secrets.HIDDEN


@pytest.mark.parametrize(
    "override",
    [
        "regenerate.servers=['http://ann:pw7@host:1/v1']",
        "regenerate.servers=['ann:pw7@host:8000/v1']",
        "target.model=https://hf_pw7aaaaaaaaaaaaaaaaaaa@host/x",
        "regenerate.sglang.args=['--api-key', pw7]",
        "regenerate.sglang.args=['--api-key=pw7']",
        "prepare.sources=[{name: 'https://host/x.json?token=pw7'}]",
        "register.model_name=s3cret-word",
        "train.no_such_key=s3cret-word",
    ],
)
def test_params_hold_no_secret(planted, override: str) -> None:
    """params.yaml and dvc.lock are committed."""
    with pytest.raises(ConfigError, match=r"holds a secret.*leave it out") as refusal:
        load_params(ROOT / "params.yaml", [override])
    assert "pw7" not in str(refusal.value) and "s3cret" not in str(refusal.value)


def test_what_prefect_keeps_holds_no_secret(planted, monkeypatch) -> None:
    given = {"input_data": "a", "output_dir": "b", "part": 0, "parts": 1}
    schema = parameter_schema(regenerate_part.fn).model_dump_for_openapi()
    validate({**given, "options": "--target-server http://host:1/v1"}, schema, raise_on_error=True)
    with pytest.raises(ValidationError):
        validate({**given, "options": "--target-server http://ann:pw7@host/v1"}, schema, raise_on_error=True)
    with pytest.raises(ParameterTypeError):
        regenerate_part.validate_parameters({**given, "options": "--target-server http://ann:pw7@host/v1"})
    with pytest.raises(SystemExit):
        regenerate_parts.main(
            ["--input-data", "a", "--output-dir", "b", "--parts", "2", "--target-server=http://a:pw7@h"]
        )
    run = {"mlflow_run_id": "0" * 32, "mlflow_experiment_id": "1", "seconds": 1.0}
    text = artifacts.summary([], {"aliases": [], "model_name": "m", "version": 1}, {"train": run})
    assert "http://127.0.0.1:9/mlflow/#/experiments/1/runs/" in text


@pytest.mark.parametrize(
    "value",
    [
        "s3://b/p?token=pw7",
        "s3://b/p?X-Amz-Signature=pw7",
        "--API-KEY=pw7",
        "hf_pw7aaaaaaaaaaaaaaaaaaa",
        "sk-pw7aaaaaaaaaaaaaaaaaaa",
        "HTTP://ann:pw7@h",
        "ann:pw7@host:8000",
        ["a", "--api-key", "pw7"],
        {"x": {"y": ["https://ann:pw7@h"]}},
    ],
)
def test_what_prefect_s_server_is_given_is_refused_before_it_is_kept(value: Any) -> None:
    schema = parameter_schema(pipeline.fn).model_dump_for_openapi()
    overrides = {"regenerate.sglang.args": value}
    validate({"overrides": overrides | {"regenerate.sglang.args": ["--tp", "2"]}}, schema, raise_on_error=True)
    with pytest.raises(ValidationError):
        validate({"overrides": overrides}, schema, raise_on_error=True)
    with pytest.raises(ParameterTypeError, match="holds a secret"):
        pipeline.validate_parameters({"overrides": overrides})
    assert "pw7" not in Request(overrides=overrides).name(ROOT)
    if isinstance(value, str):
        schema = parameter_schema(regenerate_part.fn).model_dump_for_openapi()
        given = {"input_data": "a", "output_dir": "b", "part": 0, "parts": 1, "options": f"--x {value}"}
        with pytest.raises(ValidationError):
            validate(given, schema, raise_on_error=True)


def test_texts_under_the_name_of_a_key_are_hidden_in_records() -> None:
    record = {
        "api_key": "pw7",
        "deep": [{"client_secret": "pw7", "mask_token": "[MASK]", "password": None}, "--token", "pw7"],
    }
    assert secrets.hide_in(record) == {
        "api_key": "***",
        "deep": [{"client_secret": "***", "mask_token": "[MASK]", "password": None}, "--token", "***"],
    }


def forms_of(environment: Mapping[str, str]) -> dict[bytes, str]:
    """Return each planted secret in every form in which a file could hold it."""
    values = [*VALUES, "ann-7:s3cret-word", "bo:p@ss4", "admin:auth-pw-8"]
    forms = {form: value for value in values for form in secrets._forms(value)}
    return {form.encode(): value for form, value in forms.items()}


def leaks(folder: Path, printed: str, environment: Mapping[str, str]) -> list[str]:
    """Search what was printed and every file, databases and their logs too, for a secret."""
    places = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}
    places[Path("printed")] = printed.encode()
    forms = forms_of(environment)
    return [
        f"{value} in {path}" for path, content in places.items() for form, value in forms.items() if form in content
    ]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / "project").mkdir()
    copy_project(tmp_path / "project")
    return Project(tmp_path / "project", tmp_path / "prefect")


@pytest.mark.outage
def test_a_stage_leaves_no_secret_whether_it_succeeds_or_fails(project: Project, mlflow_server: int) -> None:
    environment = {**PLANTED, "MLFLOW_TRACKING_URI": f"http://ann-7:s3cret-word@127.0.0.1:{mlflow_server}"}
    environment["DLLM_TARGET_URL"] = "http://bo:p@ss4@127.0.0.1:1/v1"
    printed, dllm = "", [sys.executable, "-m", "dllm"]
    openai = ["--set", "regenerate.engine=openai", "--set", "regenerate.timeout_s=1"]
    runs = [
        (["dvc", "repro", "prepare"], environment, 0),
        ([*dllm, "regenerate", "--debug", *openai], environment, 4),
        ([*dllm, "prepare", "--debug"], {**environment, "MLFLOW_TRACKING_URI": CLOSED}, 4),
        ([*dllm, "train", "--set", "train.x=http://a:s3cret-word@h"], environment, 2),
    ]
    for argv, variables, code in runs:
        done = project.run(*argv, **variables)
        assert done.returncode == code, done.stdout
        printed += done.stdout
    assert "http://***@" in printed and "Traceback" in printed
    assert leaks(project.folder.parent, printed, environment) == []


@pytest.mark.outage
@pytest.mark.flows
def test_a_flow_that_fails_leaves_no_secret(project: Project) -> None:
    done = project.run(sys.executable, "-m", "flows.pipeline", **{**PLANTED, "MLFLOW_TRACKING_URI": CLOSED})
    assert done.returncode == 4 and "MLflow out of reach" in done.stdout, done.stdout
    assert (project.folder.parent / "prefect" / "prefect.db").is_file()
    assert leaks(project.folder.parent, done.stdout, PLANTED) == []
