"""The answer of `/tokenizer_info`: what a tokenizer_config.json says, as vLLM has it."""

from typing import Any

from jserve.gateway.request_plane import RequestPlane


def tokenizer_info(plane: RequestPlane) -> dict[str, Any]:
    """Names as in Hugging Face's file; `chat_template` is absent where the model has none.

    Raises Unavailable before the engine was reached: it says how long texts may be.
    """
    tokenizer, template, info = plane.tokenizer, plane.chat_template, plane.info
    special: dict[str, str] = {}
    if tokenizer.bos_token_id is not None:
        special["bos_token"] = tokenizer.token_name(tokenizer.bos_token_id)
    if info.eos_token_ids:
        special["eos_token"] = tokenizer.token_name(info.eos_token_ids[0])
    if template is not None:
        special |= template.special_tokens
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": info.max_model_len,
        "clean_up_tokenization_spaces": False,
        **special,
        "added_tokens_decoder": tokenizer.added_tokens(),
        **({} if template is None else {"chat_template": template.source}),
    }
