"""The fields of OpenAI's generating routes: honoured, accepted without effect, or refused."""

from dataclasses import fields as dataclass_fields

from jserve.gateway.http.fields import Fields
from jserve.gateway.validation import SamplingFields

# Fields of both routes that go to `SamplingFields` under their own names and are checked there.
SAMPLING = tuple(
    it.name for it in dataclass_fields(SamplingFields) if it.name not in ("logprobs", "max_tokens")
)

# Fields accepted without effect, with any value of their type.
WITHOUT_EFFECT = {
    "user": Fields.string,
    "metadata": Fields.mapping,
    "store": Fields.boolean,
    "service_tier": Fields.string,
}

# Fields of the OpenAI API or of vLLM that are not served, with the values that ask for nothing;
# null always asks for nothing.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "early_stopping": (False,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "logprob_token_ids": ([],),
    "bad_words": ([],),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "request_id": (),  # the header X-Request-Id serves
    "session_id": (),
    "cache_salt": (),
    "kv_transfer_params": (),
    "vllm_xargs": (),
    "repetition_detection": (),
    "stream_interval": (1,),
}
UNSUPPORTED_COMPLETION = _UNSUPPORTED | {
    "suffix": ("",),
    "prompt_embeds": (),
}
UNSUPPORTED_CHAT = _UNSUPPORTED | {
    "echo": (False,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),  # without effect when there are no tools
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "include_reasoning": (True, False),
    "thinking_token_budget": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    "moderation": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "safety_identifier": (),
    "add_special_tokens": (False,),  # the template writes them
    "continue_final_message": (False,),
    "documents": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
}

_SHARED_FIELDS = (
    *SAMPLING,
    *WITHOUT_EFFECT,
    *("model", "n", "stop", "stream", "stream_options", "logprobs", "max_tokens", "priority"),
    *("response_format", "skip_special_tokens", "include_stop_str_in_output"),
)
COMPLETION_FIELDS = (*_SHARED_FIELDS, "prompt", "echo", "best_of", "add_special_tokens")
CHAT_FIELDS = (
    *_SHARED_FIELDS,
    *("messages", "top_logprobs", "max_completion_tokens", "add_generation_prompt"),
)
