"""The fields of OpenAI's generating routes: honoured, accepted without effect, or refused."""

from dataclasses import fields as dataclass_fields

from jserve.gateway.http.fields import Fields
from jserve.gateway.structured import STRUCTURED_FIELDS
from jserve.gateway.validation import SamplingFields

# Fields of both routes that go to `SamplingFields` under their own names and are checked there.
SAMPLING = tuple(
    it.name for it in dataclass_fields(SamplingFields) if it.name not in ("logprobs", "max_tokens")
)

# Fields whose numbers are integers, which some clients write as 4.0.
INTEGERS = ("top_k", "seed", "min_tokens", "max_tokens", "logprobs", "prompt_logprobs")
INTEGER_LISTS = ("stop_token_ids", "allowed_token_ids", "bad_token_ids")

# Fields accepted without effect, with any value of their type: hints and labels, which cannot
# change what this server answers.
WITHOUT_EFFECT = {
    "user": Fields.string,
    "safety_identifier": Fields.string,
    "metadata": Fields.mapping,
    "store": Fields.boolean,
    "service_tier": Fields.string,
    "verbosity": Fields.string,
    "prediction": Fields.mapping,
    "prompt_cache_key": Fields.string,
    "prompt_cache_options": Fields.mapping,
    "prompt_cache_retention": Fields.string,
    "session_id": Fields.string,
    "request_id": Fields.string,  # the header X-Request-Id names a request
    "guided_decoding_backend": Fields.string,
}

# Fields of the OpenAI API or of vLLM that are not served, with the values that ask for nothing;
# null always asks for nothing.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "early_stopping": (False,),
    "spaces_between_special_tokens": (True,),
    "stop_regex": ([], ""),
    "logprob_token_ids": ([],),
    "kv_transfer_params": (),
    "vllm_xargs": (),
    "repetition_detection": (),
    "stream_interval": (1,),
}
UNSUPPORTED_COMPLETION = _UNSUPPORTED | {
    "prompt_embeds": (),
}
UNSUPPORTED_CHAT = _UNSUPPORTED | {
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "moderation": (),
    "add_special_tokens": (False,),  # the template writes them
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
}

_SHARED_FIELDS = (
    *SAMPLING,
    *WITHOUT_EFFECT,
    *("model", "n", "stop", "stream", "stream_options", "logprobs", "max_tokens", "priority"),
    *STRUCTURED_FIELDS,
    *("skip_special_tokens", "include_stop_str_in_output", "cache_salt", "echo"),
    *("return_token_ids", "return_tokens_as_token_ids", "bad_words"),
    *("truncate_prompt_tokens", "truncation_side"),
)
COMPLETION_FIELDS = (*_SHARED_FIELDS, "prompt", "suffix", "best_of", "add_special_tokens")
CHAT_FIELDS = (
    *_SHARED_FIELDS,
    *("messages", "top_logprobs", "max_completion_tokens", "add_generation_prompt"),
    *("chat_template_kwargs", "reasoning_effort", "include_reasoning", "thinking_token_budget"),
    *("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call"),
    *("continue_final_message", "documents", "chat_template"),
)
