"""Chat templates in processes of their own: bounds, restarts, and who outlives whom."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from jserve.core.errors import ConfigError, RequestError
from jserve.gateway.chat import ChatTemplate
from jserve.gateway.job_process import JobLimits
from jserve.gateway.template_process import TemplateProcess

LIMITS = JobLimits(cpu_s=0.2, memory_bytes=512 << 20)
FORBIDDEN = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% endfor %}{% endfor %}",
    "doubling": "{% set ns = namespace(s='x' * 1000) %}{% for i in range(99) %}"
    "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "joining": "{% set ns = namespace(s='x' * 1000) %}{% for i in range(99) %}"
    "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "a wide constant": "{{ '%1000000000d' % 1 }}",
    "a wide number": "{{ '%1000000000d' % messages | length }}",
    "padding": "{{ messages[0].role.ljust(1000000000) }}",
    "centring": "{{ messages[0].role | center(1000000000) }}",
    "squared lists": "{% set ns = namespace(s=messages) %}{% for i in range(99) %}"
    "{% set ns.s = ns.s + ns.s %}{% endfor %}",
}
SAFE = "{{ messages[0].content }}"


def template(bad: str = "") -> ChatTemplate:
    source = f"{{% if messages[0].content == 'bad' %}}{bad}{{% endif %}}{SAFE}"
    return ChatTemplate(source, special_tokens={"bos_token": "<s>"})


def said(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


async def rendered(processes: TemplateProcess, content: str) -> str:
    return await processes.render(said(content), add_generation_prompt=True)


@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_template_without_end_is_a_400_and_ends_nothing_else(name):
    async def main():
        processes = TemplateProcess(template(FORBIDDEN[name]), LIMITS)
        try:
            with pytest.raises(RequestError) as caught:
                await rendered(processes, "bad")
            assert caught.value.param == "messages"
            assert "chat template" in str(caught.value)
            if name != "a wide constant":  # which the compiler already computes, for everybody
                assert await rendered(processes, "good") == "good"
        finally:
            processes.close()

    asyncio.run(main())


def test_many_endless_renderings_leave_chat_to_others():
    async def main():
        processes = TemplateProcess(template(FORBIDDEN["nested loops"]), LIMITS)
        try:
            answers = await asyncio.gather(
                *(rendered(processes, "bad") for _ in range(4)),
                rendered(processes, "good"),
                return_exceptions=True,
            )
            assert [type(it) for it in answers] == [RequestError] * 4 + [str]
        finally:
            processes.close()

    asyncio.run(main())


def test_rendering_is_the_same_as_in_this_process():
    messages = [*said("ä\u2028\x00\x7f'\"<&>"), {"role": "assistant", "content": "🙂\n"}]
    source = "{{ messages | tojson }}{{ bos_token }}{{ add_generation_prompt }}{{ tools }}"
    here = ChatTemplate(source, special_tokens={"bos_token": "<s>"})

    async def main():
        processes = TemplateProcess(here)
        try:
            there = await processes.render(messages, add_generation_prompt=False)
            assert there == here.render(messages, add_generation_prompt=False)
            assert json.loads(there[: there.index("<s>")]) == messages
            lone = await asyncio.gather(rendered(processes, "\ud800"), return_exceptions=True)
            assert isinstance(lone[0], RequestError)
        finally:
            processes.close()

    asyncio.run(main())


def test_a_killed_process_is_replaced():
    async def main():
        processes = TemplateProcess(template())
        try:
            assert await rendered(processes, "one") == "one"
            (child,) = processes._processes._all
            child.send_signal(signal.SIGKILL)
            child.wait()
            assert await rendered(processes, "two") == "two"
        finally:
            processes.close()

    asyncio.run(main())


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_process_ends_with_its_parent():
    """The parent is killed while one process is idle and the other is in an endless template."""
    script = textwrap.dedent(
        """
        import asyncio, sys
        from tests.gateway.test_template_process import *
        async def main():
            processes = TemplateProcess(template(FORBIDDEN["nested loops"]))
            await rendered(processes, "good")
            asyncio.get_running_loop().create_task(rendered(processes, "bad"))
            await asyncio.sleep(0.1)
            await rendered(processes, "good")
            print(*(child.pid for child in processes._processes._all), flush=True)
            await asyncio.sleep(60)
        asyncio.run(main())
        """
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        children = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(children) == 2
    deadline = time.monotonic() + 10
    while any(map(is_alive, children)):
        assert time.monotonic() < deadline, f"of {children} some are alive"
        time.sleep(0.02)


def test_a_template_is_parsed_but_not_computed_at_the_start():
    with pytest.raises(ConfigError, match="line 2"):
        ChatTemplate("x\n{% if %}", special_tokens={})
    with pytest.raises(ConfigError, match="nested"):
        ChatTemplate("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", special_tokens={})
    ChatTemplate("{{ '%10000000000d' % 1 }}", special_tokens={})  # 10 GB


def test_closing_leaves_no_process():
    async def main():
        processes = TemplateProcess(template())
        await rendered(processes, "good")
        pids = [child.pid for child in processes._processes._all]
        processes.close()
        return pids

    for pid in asyncio.run(main()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
