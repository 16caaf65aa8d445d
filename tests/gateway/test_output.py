"""OutputProcessor: text, stop strings, usage, log-probabilities, however updates are cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jserve.core.request import FinishReason, SamplingParams, SequenceUpdate, TokenLogprobs
from jserve.gateway.output import GenerationRequest, OutputDelta, OutputProcessor, Prompt
from jserve.gateway.tokenizer import TextTokenizer
from tests.gateway.tiny_tokenizers import END_OF_TURN, byte_level_json, sentencepiece_json

TOKENIZER = TextTokenizer(byte_level_json())
END = TOKENIZER.token_id(END_OF_TURN)


def generation(**fields) -> GenerationRequest:
    sampling = fields.pop("sampling", {})
    prompt = fields.pop("prompt", Prompt((5, 6), "%&"))
    return GenerationRequest(
        id="g", prompt=prompt, sampling=SamplingParams(max_tokens=1000, **sampling), **fields
    )


def updates(ids, sizes, finish=FinishReason.LENGTH, logprobs=False) -> list[SequenceUpdate]:
    """`ids` in updates of the given sizes; the last one finishes."""
    cut, start = [], 0
    for size in (*sizes, len(ids)):
        tokens = tuple(ids[start : start + size])
        start += size
        last = start >= len(ids)
        made = tuple(TokenLogprobs(t, -1.0 * t, 1, ()) for t in tokens) if logprobs else None
        cut.append(SequenceUpdate("r", tokens, finish if last else None, made))
        if last:
            break
    return cut


def feed(
    asked: GenerationRequest, updates: list[SequenceUpdate], tokenizer: TextTokenizer = TOKENIZER
) -> list[OutputDelta]:
    """Feeds updates up to the delta that finishes, as `OutputStream` does."""
    choice = OutputProcessor(asked, 0, tokenizer)
    deltas = []
    for update in updates:
        deltas.append(choice.feed(update))
        if deltas[-1].finish is not None:
            break
    return deltas


def text_of(deltas: list[OutputDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def ids_of(deltas: list[OutputDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


IDS = st.lists(st.integers(3, 400), min_size=1, max_size=40)
CUTS = st.lists(st.integers(1, 6), max_size=40)


@given(
    text=st.text("abcé你 ", min_size=1, max_size=40),
    stops=st.lists(st.text("abcé你 ", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=CUTS,
    min_tokens=st.sampled_from([0, 0, 3]),
)
def test_stop_strings_cut_text_tokens_and_logprobs_wherever_updates_are_cut(
    text, stops, cuts, min_tokens
):
    ids = TOKENIZER.encode(text)
    asked = generation(
        stop=tuple(stops), sampling={"logprobs": 0, "min_tokens": min(min_tokens, len(ids))}
    )
    deltas = feed(asked, updates(ids, cuts, logprobs=True))
    # Reference: whole decodes and str.find, in text that comes after the first min_tokens tokens.
    skipped = len(TOKENIZER.decode(ids[: asked.sampling.min_tokens]).rstrip("\ufffd"))
    hits = [(text.find(s, skipped), len(s), s) for s in stops if text.find(s, skipped) >= 0]
    if hits:
        start, size, stop = min(hits)
        lengths = [len(TOKENIZER.decode(ids[: i + 1]).rstrip("\ufffd")) for i in range(len(ids))]
        num = next(i for i, length in enumerate(lengths) if length >= start + size) + 1
        assert text_of(deltas) == text[:start]
        assert (deltas[-1].finish, deltas[-1].stop_reason) == (FinishReason.STOP, stop)
        assert ids_of(deltas) == ids[:num]
    else:
        assert text_of(deltas) == text
        assert (deltas[-1].finish, deltas[-1].stop_reason) == (FinishReason.LENGTH, None)
        assert ids_of(deltas) == ids
    for delta in deltas:
        assert [lp.token_id for lp in delta.logprobs] == list(delta.token_ids)


@given(ids=IDS, cuts=CUTS, skip=st.booleans())
def test_without_stop_strings_the_text_is_the_whole_decode(ids, cuts, skip):
    deltas = feed(generation(skip_special_tokens=skip), updates(ids, cuts))
    assert text_of(deltas) == TOKENIZER.decode(ids, skip_special_tokens=skip)
    assert ids_of(deltas) == ids


def test_stop_token_is_counted_but_not_shown():
    ids = [*TOKENIZER.encode("Hello"), END]
    for stop in ((), ("zzz",)):
        asked = generation(skip_special_tokens=False, stop=stop)
        deltas = feed(asked, updates(ids, [1], FinishReason.STOP))
        assert text_of(deltas) == "Hello"
        assert ids_of(deltas) == ids
        assert deltas[-1].stop_reason is None
    asked = generation(
        skip_special_tokens=False,
        include_stop_str_in_output=True,
        sampling={"stop_token_ids": (END,)},
    )
    deltas = feed(asked, updates(ids, [1], FinishReason.STOP))
    assert text_of(deltas) == f"Hello{END_OF_TURN}"
    assert deltas[-1].stop_reason == END


def test_stop_string_can_be_included():
    ids = TOKENIZER.encode("Hello, world! and more")
    asked = generation(stop=("wor",), include_stop_str_in_output=True)
    assert text_of(feed(asked, updates(ids, [1] * 20))) == "Hello, wor"


SENTENCEPIECE = TextTokenizer(sentencepiece_json())
NEWLINE = SENTENCEPIECE.token_id("<0x0A>")


@pytest.mark.parametrize(("stop", "used"), [("\n", 1), ("\n\n", 2), ("\n\n\n", 3)])
def test_stop_string_of_byte_tokens_ends_at_the_token_that_completes_it(stop, used):
    asked = generation(prompt=Prompt((NEWLINE,) * 4), stop=(stop,), sampling={"logprobs": 0})
    deltas = feed(asked, updates([NEWLINE] * 40, [1] * 40, logprobs=True), SENTENCEPIECE)
    assert (text_of(deltas), ids_of(deltas)) == ("", [NEWLINE] * used)
    assert sum(len(delta.logprobs) for delta in deltas) == used
    assert (deltas[-1].finish, deltas[-1].stop_reason) == (FinishReason.STOP, stop)


def test_byte_tokens_stream_and_a_cut_spoils_only_its_own_character():
    half = [SENTENCEPIECE.token_id(f"<0x{byte:02X}>") for byte in "éé".encode()[:3]]
    deltas = feed(generation(), updates([NEWLINE, NEWLINE, *half], [1] * 5), SENTENCEPIECE)
    assert [delta.text for delta in deltas] == ["\n", "\n", "", "é", "\ufffd"]
    asked = generation(prompt=Prompt(tuple(half)), echo=True, prompt_only=True)
    (delta,) = feed(asked, updates([9], [1]), SENTENCEPIECE)
    assert delta.text == "é\ufffd"


def test_echo_puts_the_prompt_first():
    ids = TOKENIZER.encode("Hello")
    asked = generation(echo=True, prompt=Prompt((5, 6), "as written"))
    assert text_of(feed(asked, updates(ids, [1]))) == "as writtenHello"
    thumb = TOKENIZER.encode("x👍")
    asked = generation(echo=True, prompt=Prompt(tuple(thumb[:3])))
    assert text_of(feed(asked, updates([*thumb[3:], *ids], [1]))) == "x👍Hello"
    # The prompt as it was given: special tokens are text there, as in vLLM.
    asked = generation(echo=True, prompt=Prompt((*ids, END)))
    assert text_of(feed(asked, updates([END, *ids], [1]))) == f"Hello{END_OF_TURN}Hello"


def test_prompt_only_shows_no_output():
    asked = generation(echo=True, prompt_only=True, sampling={"logprobs": 1})
    scores = (None, TokenLogprobs(6, -1.0, 1, ()))
    update = SequenceUpdate("r", (9,), FinishReason.STOP, (scores[1],), scores)
    (delta,) = feed(asked, [update])
    assert (delta.text, delta.token_ids, delta.logprobs) == ("%&", (), ())
    assert (delta.finish, delta.prompt_logprobs) == (FinishReason.LENGTH, scores)
