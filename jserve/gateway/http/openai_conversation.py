"""A request of OpenAI's chat completions → the conversation that every API has."""

from jserve.core.errors import RequestError
from jserve.gateway.conversation import Conversation
from jserve.gateway.http.openai_request import ChatRequest
from jserve.gateway.request_plane import RequestPlane


def conversation_of(plane: RequestPlane, asked: ChatRequest) -> Conversation:
    """Makes the conversation that a request asks to continue.

    Raises RequestError for a budget of reasoning that nothing here can keep.
    """
    if asked.max_reasoning_tokens and not plane.formats.bounds_reasoning:
        raise RequestError(
            "thinking_token_budget: no reasoning of this model is known here; leave it out, "
            "or name a parser with gateway.reasoning_parser",
            param="thinking_token_budget",
        )
    return Conversation(
        messages=asked.messages,
        tools=asked.tools.tools,
        tool_choice=asked.tools.choice,
        parallel_tool_calls=asked.tools.parallel,
        structured=asked.structured,
        max_reasoning_tokens=asked.max_reasoning_tokens,
        sampling=asked.sampling,
        bad_words=asked.bad_words,
        stop=asked.stop,
        n=asked.n,
        priority=asked.priority,
        cache_salt=asked.cache_salt,
        default_max_tokens=plane.info.max_model_len if asked.unlimited else None,
        skip_special_tokens=asked.skip_special_tokens,
        include_stop_str_in_output=asked.include_stop_str_in_output,
        add_generation_prompt=asked.add_generation_prompt,
        continue_final_message=asked.continue_final_message,
        variables=asked.template_variables,
        documents=asked.documents,
        chat_template=asked.chat_template,
        truncation=asked.truncation,
    )
