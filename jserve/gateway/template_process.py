"""Renders chat templates in processes of their own: a model's template is a program of a stranger.

Jinja's sandbox keeps it from reaching Python, but not from looping for ever or filling the memory.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from jserve.core.errors import RequestError
from jserve.gateway.chat import ChatTemplate
from jserve.gateway.job_child import Handler
from jserve.gateway.job_process import JobLimits, JobProcesses, JobStopped

_LIMITS = JobLimits(cpu_s=1.0, memory_bytes=512 << 20)
_GIVEN = ("chat_template", "chat_template")  # as errors name one that a request brought
_MOST = 2  # so that one conversation that takes its second does not hold up the others


class TemplateProcess:
    """A chat template whose every rendering is bounded in time and memory.

    The processes start at need, or at `warm`, and end with this object.
    """

    def __init__(self, template: ChatTemplate, limits: JobLimits = _LIMITS) -> None:
        start = {"source": template.source, "special_tokens": template.special_tokens}
        self._processes = JobProcesses(__name__, orjson.dumps(start), limits, most=_MOST)

    def warm(self) -> None:
        """Starts a process ahead of the first conversation; does not wait for it."""
        self._processes.warm()

    def close(self) -> None:
        """Ends the processes."""
        self._processes.close()

    async def render(
        self, messages: Sequence[Mapping[str, Any]], *, tenant: str = "", **variables: Any
    ) -> str:
        """Returns the prompt text, once it was the turn of `tenant`.

        `variables` are those of `ChatTemplate.render`.

        Raises:
            RequestError: the template refuses the messages, or exceeds its time or memory.
        """
        try:
            job = orjson.dumps({"messages": messages, **variables})
        except orjson.JSONEncodeError as error:
            raise RequestError(
                f"the messages are no valid JSON: {error}", param="messages"
            ) from error
        try:
            text = await self._processes.call(job, tenant)
        except JobStopped as error:
            own = variables.get("source") is None
            which, param = ("the model's chat template", "messages") if own else _GIVEN
            message = f"{which} cannot render these messages: {error}"
            raise RequestError(message, param=param) from None
        return text.decode("utf-8", "surrogatepass")


def make_handler(start: bytes) -> Handler:
    """Makes what runs in the process: JSON of the variables in, text out."""
    template = ChatTemplate(**orjson.loads(start))
    with contextlib.suppress(Exception):  # each conversation is told what is wrong
        template.compile()

    def render(job: bytes) -> bytes:
        return template.render(**orjson.loads(job)).encode("utf-8", "surrogatepass")

    return render
