"""Bytes and operations of steps against numbers made by hand."""

import pytest

from benchmarks.engine import counting, specs
from benchmarks.engine.counting import Counter, Weights, Work
from jserve.core.model_spec import ModelSpec
from jserve.core.step import Chunk, Program, ProgramKind, StepPlan

# Two layers, the second with a window of 4 tokens.
SPEC = ModelSpec(
    family="llama",
    vocab=10,
    layers=2,
    model_dim=4,
    ffn_dim=6,
    q_heads=2,
    kv_heads=1,
    head_dim=2,
    max_position=64,
    norm_eps=1e-5,
    rope_theta=10000.0,
    sliding_window=4,
    local_layers=(False, True),
)
LAYER_PARAMETERS = 2 * (4 * 4 + 4 * 2 + 4 * 2 + 4 * 4 + 3 * 4 * 6)  # q, k, v, o, three of the FFN
COUNTER = Counter(SPEC, Weights(layers_bytes=1000, head_bytes=100, embedding_bytes=50), kv_bytes=16)
MIXED, DECODE = Program(ProgramKind.MIXED, 16, 4), Program(ProgramKind.DECODE, 4, 4, 8)


def plan(program, num_steps, *chunks):
    return StepPlan(step_id=0, program=program, num_steps=num_steps, chunks=chunks)


def test_parameters_in_matmuls():
    assert counting.layer_parameters(SPEC) == LAYER_PARAMETERS == 240
    assert counting.head_parameters(SPEC) == 40


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("smollm2-135m", 134_515_008),  # the published counts
        ("gemma3-270m", 268_098_176),
        ("qwen3-8b", 8_190_735_360),
        ("llama-3.1-8b", 8_030_261_248),
    ],
)
def test_models_have_their_published_sizes(name, parameters):
    spec, _ = specs.MODELS[name]
    norms = {"llama": 2, "qwen3": 2, "gemma3": 4}[spec.family] * spec.model_dim
    if spec.family != "llama":
        norms += 2 * spec.head_dim
    embedding = 0 if spec.tied_embeddings else counting.head_parameters(spec)
    multiplied = counting.layer_parameters(spec) + counting.head_parameters(spec)
    assert multiplied + embedding + spec.layers * norms + spec.model_dim == parameters


@pytest.mark.parametrize(
    ("start", "end", "full", "windowed"),
    [
        (0, 1, 1, 1),
        (0, 3, 1 + 2 + 3, 1 + 2 + 3),
        (0, 6, 21, 1 + 2 + 3 + 4 + 4 + 4),
        (2, 6, 3 + 4 + 5 + 6, 3 + 4 + 4 + 4),
        (9, 11, 10 + 11, 4 + 4),
    ],
)
def test_operations_of_attention(start, end, full, windowed):
    # q·k and the weighted sum of v: two operations each, for 2 heads of 2.
    assert counting.attention_operations(SPEC, start, end) == 4 * 2 * 2 * (full + windowed)


@pytest.mark.parametrize(
    ("start", "end", "full", "windowed"),
    [(0, 1, 1, 1), (0, 6, 6, 6), (9, 10, 10, 4), (8, 10, 10, 5), (3, 4, 4, 4)],
)
def test_tokens_in_view(start, end, full, windowed):
    assert counting.tokens_in_view(SPEC, start, end) == full + windowed


def test_a_decode_step():
    work = COUNTER.step([(9, 10), (0, 1)], num_sampled=2)
    in_view = (10 + 4) + (1 + 1)
    assert work.bytes == 1000 + 100 + 16 * in_view
    assert work.operations == 2 * 2 * (240 + 40) + 16 * in_view


def test_a_window_is_its_decode_steps():
    rows = Chunk(slot=0, request_id="a", start=9, num_tokens=1), Chunk(1, "b", 0, 1)
    steps = [COUNTER.step([(9 + n, 10 + n), (n, n + 1)], 2) for n in range(3)]
    assert COUNTER.plan(plan(DECODE, 3, *rows)) == steps[0] + steps[1] + steps[2]


def test_a_mixed_step_runs_the_head_for_rows_that_sample():
    prompt = Chunk(0, "a", start=2, num_tokens=4, tokens=(1, 2, 3, 4), max_new=0)
    work = COUNTER.plan(plan(MIXED, 1, prompt))
    assert work == Work(
        bytes=1000 + 16 * (6 + 6), operations=2 * 4 * 240 + 16 * (3 + 4 + 5 + 6 + 3 + 4 + 4 + 4)
    )
    both = COUNTER.plan(plan(MIXED, 1, Chunk(1, "b", 0, 1), prompt))
    assert both == work + Work(bytes=100 + 16 * 2, operations=2 * (240 + 40) + 16 * 2)


def test_weights_by_name():
    nbytes = {
        "model.embed_tokens.weight": 50,
        "model.layers.0.mlp.up_proj.weight.codes": 30,
        "model.layers.0.mlp.up_proj.weight.scales": 5,
        "model.norm.weight": 1,
    }
    assert counting.weights_of(nbytes, tied=True) == Weights(36, 50, 0)
    untied = counting.weights_of({**nbytes, "lm_head.weight": 60}, tied=False)
    assert untied == Weights(36, 60, 50)
    assert untied.total_bytes == 146
