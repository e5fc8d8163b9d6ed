"""`lm-eval` on local files: checkpoints in, a table or one JSON object out, bad input in one line."""

import json
import math
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dllm.cli import lm_eval
from dllm.errors import ConfigError, ModelError
from dllm.lm_eval.generation_arguments import override
from tests.arch.source_tree import ROOT
from tests.borders.sockets import Watch
from tests.lm_eval.local_tasks import HYBRID, of_one_word, write_task
from tests.models.diffusion import remote_code

TEXTS = ["How many hours does it take?", "One page a day, by hand."]
ADDS = {"doc_to_text": "{{question}}", "doc_to_target": "{{answer}}"}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    plain = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    write_task(folder, "held-out", [{"text": text} for text in TEXTS], **plain)
    known = {"choices": ["hours", "water", "letters"], "answer": 1}
    choices = [{"question": f"{n}. What is in the sea?", **known} for n in range(3)]
    write_task(folder, "sea", choices, **ADDS, output_type="multiple_choice", doc_to_choice="{{choices}}")
    answers = [{"question": f"{n}. Say it twice:", "answer": "water water" if n else "hours"} for n in range(4)]
    write_task(
        folder, "twice", answers, **ADDS,
        output_type="generate_until",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 2},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        filter_list=[{"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, odds, config in [
        ("uniform", {}, None),
        ("wet", {" water": 20.0}, None),
        ("wet-hybrid", {" water": 20.0}, HYBRID),
    ]:
        of_one_word(odds, config).save(folder / name)
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Let nothing leave this machine, and stay away from the project's own results."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "DISABLE_MULTIPROC", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1")

    def refused(*_: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refused)


def run(tasks: Path, checkpoint: Path | str, *names: str, capsys=None, **options) -> dict:
    lm_eval.run(
        checkpoint=str(checkpoint),
        tasks=",".join(names),
        include_path=tasks,
        root=tasks,
        samples=8,
        as_json=True,
        **options,
    )
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1, "one object, and nothing that the harness prints"
    return json.loads(out)


def figures(found: dict) -> dict[tuple[str, str], float]:
    return {(row["task"], row["metric"]): row["value"] for row in found["results"]}


def test_a_uniform_model_needs_the_logarithm_of_its_vocabulary(tasks, checkpoints, capsys) -> None:
    from dllm.lm_eval import texts
    from dllm.models.diffusion.families import load_checkpoint

    model = load_checkpoint(checkpoints / "uniform")
    tokens = sum(len(texts.encode(model.tokenizer, text)) for text in TEXTS)
    found = run(tasks, checkpoints / "uniform", "held-out", "sea", capsys=capsys)
    bits = math.log2(len(model.head_VD)) * tokens / sum(len(text.encode()) for text in TEXTS)
    assert figures(found)["held-out", "bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    assert found["likelihood"]["kind"] == "bound"
    # Choices of one token each are equally likely, and the first of equals is taken.
    assert figures(found)["sea", "acc"] == 0
    assert {row["documents"] for row in found["results"] if row["task"] == "sea"} == {3}


@pytest.mark.ranks
def test_processes_share_the_documents_and_listen_on_loopback(tasks, checkpoints, capsys) -> None:
    alone = run(tasks, checkpoints / "wet-hybrid", "sea", "twice", capsys=capsys)
    argv = [sys.executable, "-m", "dllm", "lm-eval", "--checkpoint", checkpoints / "wet-hybrid", "--tasks", "sea,twice"]
    argv += ["--include-path", tasks, "--root", tasks, "--samples", "8", "--json", "--nproc", "2"]
    with (
        subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as ranks,
        Watch(ranks.pid) as watch,
    ):
        out, said = ranks.communicate()
    assert ranks.returncode == 0, said
    assert figures(json.loads(out)) == figures(alone)
    assert watch.found and not watch.beyond_loopback, "gloo's own"
    argv[argv.index("sea,twice")] = "no-such-task"
    refused = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.count("no task no-such-task") == 1, refused.stderr


@pytest.mark.parametrize("name", ["wet", "wet-hybrid"])
def test_a_model_that_knows_the_answer_is_always_right(tasks, checkpoints, name, capsys) -> None:
    found = run(tasks, checkpoints / name, "sea", "twice", limit=3, capsys=capsys)
    assert figures(found)["sea", "acc"] == 1.0
    assert figures(found)["twice", "exact_match"] == pytest.approx(2 / 3)
    assert found["likelihood"]["kind"] == {"wet": "bound", "wet-hybrid": "exact"}[name]


def test_gen_goes_before_the_task_and_shots_and_chats_are_taken(tasks, checkpoints, capsys) -> None:
    found = run(
        tasks, checkpoints / "wet", "twice",
        gen=["max_gen_toks=1", "steps=1"], num_fewshot=1, apply_chat_template=True, capsys=capsys,
    )  # fmt: skip
    assert figures(found) == {("twice", "exact_match"): 0.0}
    assert found["results"][0]["shots"] == 1


@pytest.mark.parametrize(
    ("own", "named", "merged"),
    [
        ({"max_gen_toks": 8, "until": ["x"]}, {"max_new_tokens": 32}, {"max_new_tokens": 32, "until": ["x"]}),
        ({"max_gen_toks": 8}, {"max_gen_toks": 4}, {"max_gen_toks": 4}),
        ({"do_sample": False, "top_p": 0.9}, {"temperature": 0.8}, {"temperature": 0.8, "top_p": 0.9}),
        ({"do_sample": False}, {"temperature": 0.8, "do_sample": True}, {"temperature": 0.8, "do_sample": True}),
        ({"steps": 8}, {"seed": 3}, {"steps": 8, "seed": 3}),
    ],
)
def test_gen_goes_before_other_names_for_the_same_thing(own, named, merged) -> None:
    assert override(own, named) == merged


@pytest.mark.parametrize("check", [None, True, False])
def test_greedy_continuations_are_checked_where_a_task_needs_it(checkpoints, tmp_path, check, capsys) -> None:
    """Else the accuracy would read 0, and no model's."""
    last = {"output_type": "loglikelihood", **ADDS}
    write_task(tmp_path, "last", [{"question": "What is in the sea?", "answer": " water"}], **last)
    found = figures(run(tmp_path, checkpoints / "wet", "last", check_greedy=check, capsys=capsys))
    assert found["last", "acc"] == (None if check is False else 1.0)
    assert found["last", "perplexity"] is not None


def test_a_task_that_cannot_be_run_is_one_line(tasks, checkpoints, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"cannot run sea: ValueError: Sample larger than population.*fix"):
        run(tasks, checkpoints / "wet", "sea", num_fewshot=20)
    write_task(tmp_path, "null", [{"question": None, "answer": "x"}], doc_to_text="question", doc_to_target="answer",
               output_type="loglikelihood")  # fmt: skip
    with pytest.raises(ConfigError, match="cannot run null: "):
        run(tmp_path, checkpoints / "wet", "null")


def test_generated_code_is_run_only_where_that_was_confirmed(checkpoints, tmp_path, capsys) -> None:
    write_task(tmp_path, "code", [{"question": "q", "answer": "x"}], **ADDS, output_type="generate_until",
               generation_kwargs={"until": ["\n"], "max_gen_toks": 2}, unsafe_code=True,
               metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}])  # fmt: skip
    with pytest.raises(ConfigError, match=r"cannot run code: .*--confirm-run-unsafe-code"):
        run(tmp_path, checkpoints / "wet", "code")
    found = run(tmp_path, checkpoints / "wet", "code", confirm_run_unsafe_code=True, capsys=capsys)
    assert figures(found) == {("code", "exact_match"): 0.0}


def test_the_table_says_what_the_likelihoods_are(tasks, checkpoints, capsys) -> None:
    lm_eval.run(checkpoint=str(checkpoints / "wet"), tasks="sea", include_path=tasks, root=tasks, samples=8)
    out = capsys.readouterr().out
    assert "acc" in out and "1.0000" in out and "lower bounds, averaged over masks (8 each; 100% had no more" in out


def test_a_plain_causal_model_is_scored_too(tasks, capsys) -> None:
    found = run(tasks, "builtin:tiny", "held-out", capsys=capsys)
    assert found["likelihood"] == {"kind": "exact", "scored": 2}
    with pytest.raises(ConfigError, match="is for diffusion models"):
        run(tasks, "builtin:tiny", "held-out", sampler="llada")


@pytest.mark.parametrize(
    ("family", "kind"), [("llada", "bound"), ("llada2_moe", "block bound"), ("nemotron_labs_diffusion", "exact")]
)
def test_models_with_code_of_their_own_run_only_with_trust(tasks, tmp_path, family, kind, capsys) -> None:
    """Nemotron's code is built one way to score and another to generate, and refuses what it was not built for."""
    remote_code.checkpoint(tmp_path, family, every_word=True)
    if family == "llada":  # a Llama to transformers
        assert run(tasks, tmp_path, "sea", limit=2, capsys=capsys)["likelihood"]["kind"] == kind
    else:
        with pytest.raises(ConfigError, match="give --trust-remote-code"):
            run(tasks, tmp_path, "sea")
    found = run(tasks, tmp_path, "sea", "twice", limit=2, trust_remote_code=True, capsys=capsys)
    assert found["likelihood"]["kind"] == kind and found["likelihood"]["scored"] == 6
    assert {row["task"] for row in found["results"]} == {"sea", "twice"}


def test_bad_input_is_one_line(tasks, checkpoints, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"no task see .*there are: held-out, sea, twice"):
        run(tasks, checkpoints / "wet", "see")
    with pytest.raises(ConfigError, match="no such folder of task files"):
        run(tmp_path / "absent", checkpoints / "wet", "sea")
    with pytest.raises(ConfigError, match="expected KEY=VALUE"):
        run(tasks, checkpoints / "wet", "sea", gen=["steps"])
    with pytest.raises(ModelError):
        run(tasks, tmp_path, "sea")
    write_task(tmp_path, "lost", [{"a": 1}], output_type="generate_until", doc_to_text="{{b.c}}", doc_to_target="x")
    (tmp_path / "lost.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"cannot load lost: \w+: .*; fix the task's file"):
        run(tmp_path, checkpoints / "wet", "lost")
