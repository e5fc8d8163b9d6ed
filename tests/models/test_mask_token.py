import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from dllm.config.params import Target
from dllm.errors import ConfigError, ModelError
from dllm.models import targets
from dllm.models.mask_token import draft_mask_id


def tokenizer_with(*special: str, template: str = "", **roles: str) -> PreTrainedTokenizerFast:
    """Two words (ids 0 and 1), then special tokens from id 2 on."""
    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    inner.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **roles)
    tokenizer.chat_template = template
    return tokenizer


def test_the_tokenizers_mask_token_goes_first() -> None:
    tokenizer = tokenizer_with("<unused>", "<mask>", "<other>", mask_token="<other>")
    assert draft_mask_id(None, tokenizer, 10) == 4


def test_then_special_tokens_by_name() -> None:
    assert draft_mask_id(None, tokenizer_with("<unused>", "<|MASK|>", "<x>"), 10) == 3
    assert draft_mask_id(None, tokenizer_with("<x>", "<|reserved_7|>"), 10) == 3


def test_then_the_first_row_past_the_tokenizer_as_qwen3_drafts_do() -> None:
    tokenizer = tokenizer_with("<eos>", "<repo>", eos_token="<eos>")
    assert draft_mask_id(None, tokenizer, vocab_rows=6) == len(tokenizer) == 4


def test_then_the_last_special_token_that_no_text_uses() -> None:
    tokenizer = tokenizer_with("<eos>", "<repo>", "<turn>", "<pad>", template="<turn>", eos_token="<eos>")
    tokenizer.pad_token = "<pad>"
    assert draft_mask_id(None, tokenizer, len(tokenizer)) == 3
    with pytest.raises(ModelError, match="leaves no special token unused"):
        draft_mask_id(None, tokenizer, len(tokenizer), stop_ids={3})


def test_the_built_in_targets() -> None:
    tiny = targets.load_tokenizer(Target(model="builtin:tiny"))
    assert tiny.convert_ids_to_tokens(draft_mask_id(None, tiny, 1408)) == "<|reserved_0|>"


def test_a_given_id_is_checked() -> None:
    tokenizer = tokenizer_with("<eos>", "<turn>", template="<turn>", eos_token="<eos>")
    assert draft_mask_id(7, tokenizer, 8) == 7
    with pytest.raises(ConfigError, match=r"8 is outside the target's embedding of 8 rows.*mask_token_id.*null"):
        draft_mask_id(8, tokenizer, 8)
    for used in (2, 3):
        with pytest.raises(ConfigError, match="ends or frames the target's text"):
            draft_mask_id(used, tokenizer, 8)
    with pytest.raises(ConfigError, match="ends or frames"):
        draft_mask_id(1, tokenizer, 8, stop_ids={1})
