"""The fields by which requests bind an answer to a grammar, of every API → `GrammarSource`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jserve.core.errors import RequestError
from jserve.core.request import ConstraintSpec, EngineInfo, SamplingParams
from jserve.core.request_check import leaves_no_token
from jserve.grammar.source import GrammarKind, GrammarSource, Whitespace

# Fields that hold a source themselves: of older vLLM, SGLang and llama.cpp.
_DIRECT = {
    "guided_json": GrammarKind.JSON,
    "guided_regex": GrammarKind.REGEX,
    "guided_choice": GrammarKind.CHOICE,
    "guided_grammar": GrammarKind.GRAMMAR,
    "regex": GrammarKind.REGEX,
    "ebnf": GrammarKind.GRAMMAR,
    "grammar": GrammarKind.GRAMMAR,
    "json_schema": GrammarKind.JSON,
}
_WHITESPACE_PATTERN = "guided_whitespace_pattern"
STRUCTURED_FIELDS = ("response_format", "structured_outputs", *_DIRECT, _WHITESPACE_PATTERN)

_KINDS = {kind.value: kind for kind in GrammarKind}
# Fields of vLLM's structured_outputs about its backends, with the values that ask for nothing.
_NEUTRAL = {
    "disable_fallback": (True, False),
    "disable_additional_properties": (False,),
}
# The field of a response_format, by its type, that holds the source.
_FORMATS = {
    "regex": (GrammarKind.REGEX, ("regex", "pattern", "value")),
    "grammar": (GrammarKind.GRAMMAR, ("grammar", "value")),
    "ebnf": (GrammarKind.GRAMMAR, ("ebnf", "grammar", "value")),
}


def read_structured(given: Mapping[str, Any]) -> GrammarSource | None:
    """Reads the fields of `STRUCTURED_FIELDS`; None if they bind nothing.

    Raises RequestError for a wrong form, and for two bindings at once, naming both.
    """
    found: list[GrammarSource] = []
    if (value := given.get("response_format")) is not None:
        fit = isinstance(value, dict) and _fit(value := dict(value), "response_format")
        found += [replace(source, fit=fit) for source in _response_format(value)]
    if (value := given.get("structured_outputs")) is not None:
        found += _structured_outputs(value)
    whitespace: Whitespace | str = Whitespace.ONE
    if (value := given.get(_WHITESPACE_PATTERN)) is not None:
        whitespace = _pattern(value, _WHITESPACE_PATTERN)
    for field, kind in _DIRECT.items():
        if (value := given.get(field)) is not None:
            source = GrammarSource(kind=kind, value=value, field=field, whitespace=whitespace)
            found.append(source)
    if len(found) > 1:
        first, second = found[0].field, found[1].field
        message = f"{first} and {second} bind the answer twice; send one of them"
        raise RequestError(message, param=second)
    return found[0] if found else None


def check_sampling(sampling: SamplingParams, constraint: ConstraintSpec, info: EngineInfo) -> None:
    """Raises RequestError for rules of sampling that contradict any grammar, or the bad words.

    The grammar says where the answer ends, and which tokens may come next. `logit_bias` only
    prefers among them; what forbids tokens could leave none in the middle of an answer.
    """
    never = tuple(ids[0] for ids in constraint.bad_sequences if len(ids) == 1)
    masked = replace(sampling, bad_token_ids=(*sampling.bad_token_ids, *never))
    if never and leaves_no_token(masked, info):
        message = "bad_words and the other rules of sampling leave no token to generate"
        raise RequestError(message, param="bad_words")
    if not constraint.grammar:
        return
    ends = "the grammar says where the answer ends"
    forbids = "together they could leave no token to generate"
    reasons = {"min_tokens": ends, "ignore_eos": ends}
    reasons |= {"allowed_token_ids": forbids, "bad_token_ids": forbids}
    for name, reason in reasons.items():
        if getattr(sampling, name):
            message = f"{name} does not go with a grammar or a schema of the answer: {reason}"
            raise RequestError(message, param=name)


def _response_format(value: Any) -> list[GrammarSource]:
    name = "response_format"
    if not isinstance(value, dict):
        raise _wrong(name, "an object")
    kind = value.get("type")
    match kind:
        case "text" | None if kind or not value:
            return []
        case "json_object" if value.get("schema") is None:
            return [GrammarSource(kind=GrammarKind.JSON_OBJECT, value=True, field=name)]
        case "json_object":  # as llama.cpp has it
            field = f"{name}.schema"
            return [GrammarSource(kind=GrammarKind.JSON, value=value["schema"], field=field)]
        case "json_schema":
            return [_json_schema(value, f"{name}.json_schema")]
        case "structural_tag":
            return [GrammarSource(kind=GrammarKind.STRUCTURAL_TAG, value=value, field=name)]
        case "regex" | "grammar" | "ebnf":
            grammar, keys = _FORMATS[kind]
            key = next((key for key in keys if value.get(key) is not None), None)
            if key is None:
                raise RequestError(f"{name}.{keys[0]} is missing", param=f"{name}.{keys[0]}")
            return [GrammarSource(kind=grammar, value=value[key], field=f"{name}.{key}")]
    known = "text, json_object, json_schema, structural_tag, regex, grammar and ebnf"
    message = f"{name}.type {str(kind)[:40]!r} is not supported; {known} are"
    raise RequestError(message, param=f"{name}.type")


def _json_schema(value: Mapping[str, Any], name: str) -> GrammarSource:
    """OpenAI's form. `strict` or not, the answer follows the schema."""
    form = value.get("json_schema")
    if not isinstance(form, dict):
        raise _wrong(name, "an object with a schema")
    for key, kind, words in (
        ("name", str, "a string"),
        ("description", str, "a string"),
        ("strict", bool, "true or false"),
    ):
        if form.get(key) is not None and not isinstance(form[key], kind):
            raise _wrong(f"{name}.{key}", words)
    if form.get("schema") is None:
        raise RequestError(f"{name}.schema is missing", param=f"{name}.schema")
    return GrammarSource(kind=GrammarKind.JSON, value=form["schema"], field=f"{name}.schema")


def _structured_outputs(value: Any) -> list[GrammarSource]:
    name = "structured_outputs"
    if not isinstance(value, dict):
        raise _wrong(name, "an object")
    left = {key: it for key, it in value.items() if it is not None}
    whitespace, fit = _whitespace(left, name), _fit(left, name)
    for key, neutral in _NEUTRAL.items():
        if left.pop(key, neutral[0]) not in neutral:
            message = f"{name}.{key}: not supported yet; leave it out"
            raise RequestError(message, param=f"{name}.{key}")
    found = [key for key in left if key in _KINDS]
    for key in left:
        if key not in _KINDS:
            known = ", ".join((*_KINDS, "whitespace", "whitespace_pattern", "fit"))
            message = f"unknown field {name}.{key[:60]!r}; known are {known}"
            raise RequestError(message, param=f"{name}.{key[:60]}")
    if left.get("json_object") is False:
        found.remove("json_object")
    if len(found) != 1:
        which = f"not {found[0]} and {found[1]}" if found else "none is there"
        message = f"{name} must have exactly one of {', '.join(_KINDS)}; {which}"
        raise RequestError(message, param=name)
    (key,) = found
    if key == "json_object" and left[key] is not True:
        raise _wrong(f"{name}.{key}", "true or false")
    return [
        GrammarSource(
            kind=_KINDS[key],
            value=left[key],
            field=f"{name}.{key}",
            whitespace=whitespace,
            fit=fit,
        )
    ]


def _fit(left: dict[str, Any], name: str) -> bool:
    """Takes whether the answer has to end within max_tokens."""
    fit = left.pop("fit", None)
    if fit not in (None, True, False):
        raise _wrong(f"{name}.fit", "true or false")
    return bool(fit)


def _whitespace(left: dict[str, Any], name: str) -> Whitespace | str:
    """Takes what says how JSON is spaced from the fields of structured_outputs."""
    given = left.pop("whitespace", None)
    pattern = left.pop("whitespace_pattern", None)
    compact = left.pop("disable_any_whitespace", None)
    if compact not in (None, True, False):
        raise _wrong(f"{name}.disable_any_whitespace", "true or false")
    if sum(it not in (None, False) for it in (given, pattern, compact)) > 1:
        message = f"{name}: whitespace, whitespace_pattern and disable_any_whitespace exclude each "
        raise RequestError(message + "other", param=f"{name}.whitespace")
    if pattern is not None:
        return _pattern(pattern, f"{name}.whitespace_pattern")
    if compact:
        return Whitespace.NONE
    if given is None:
        return Whitespace.ONE
    try:
        return Whitespace(given)
    except ValueError:
        names = ", ".join(it.value for it in Whitespace)
        raise _wrong(f"{name}.whitespace", f"one of {names}") from None


def _pattern(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _wrong(name, "a string")
    return value


def _wrong(name: str, expected: str) -> RequestError:
    return RequestError(f"{name} must be {expected}", param=name)
