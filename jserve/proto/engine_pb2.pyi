from jserve.proto import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SessionRequest(_message.Message):
    __slots__ = ("submit", "abort", "proof")
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    submit: EngineRequest
    abort: str
    proof: bytes
    def __init__(self, submit: _Optional[_Union[EngineRequest, _Mapping]] = ..., abort: _Optional[str] = ..., proof: _Optional[bytes] = ...) -> None: ...

class EngineRequest(_message.Message):
    __slots__ = ("id", "prompt", "sampling", "choice", "priority", "output", "resumed", "deadline_s", "tenant", "tenant_slots", "cache_salt", "constraint")
    ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    TENANT_SLOTS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    CONSTRAINT_FIELD_NUMBER: _ClassVar[int]
    id: str
    prompt: _containers.RepeatedScalarFieldContainer[int]
    sampling: _types_pb2.SamplingParams
    choice: int
    priority: int
    output: _containers.RepeatedScalarFieldContainer[int]
    resumed: bool
    deadline_s: float
    tenant: str
    tenant_slots: int
    cache_salt: str
    constraint: Constraint
    def __init__(self, id: _Optional[str] = ..., prompt: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_types_pb2.SamplingParams, _Mapping]] = ..., choice: _Optional[int] = ..., priority: _Optional[int] = ..., output: _Optional[_Iterable[int]] = ..., resumed: _Optional[bool] = ..., deadline_s: _Optional[float] = ..., tenant: _Optional[str] = ..., tenant_slots: _Optional[int] = ..., cache_salt: _Optional[str] = ..., constraint: _Optional[_Union[Constraint, _Mapping]] = ...) -> None: ...

class Constraint(_message.Message):
    __slots__ = ("grammar", "reasoning_start", "reasoning_end", "max_reasoning_tokens", "fit", "bad_sequences")
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    REASONING_START_FIELD_NUMBER: _ClassVar[int]
    REASONING_END_FIELD_NUMBER: _ClassVar[int]
    MAX_REASONING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FIT_FIELD_NUMBER: _ClassVar[int]
    BAD_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    grammar: str
    reasoning_start: _containers.RepeatedScalarFieldContainer[int]
    reasoning_end: _containers.RepeatedScalarFieldContainer[int]
    max_reasoning_tokens: int
    fit: bool
    bad_sequences: _containers.RepeatedCompositeFieldContainer[_types_pb2.TokenIds]
    def __init__(self, grammar: _Optional[str] = ..., reasoning_start: _Optional[_Iterable[int]] = ..., reasoning_end: _Optional[_Iterable[int]] = ..., max_reasoning_tokens: _Optional[int] = ..., fit: _Optional[bool] = ..., bad_sequences: _Optional[_Iterable[_Union[_types_pb2.TokenIds, _Mapping]]] = ...) -> None: ...

class SessionResponse(_message.Message):
    __slots__ = ("hello", "updates", "stats", "rejections", "heartbeat")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    REJECTIONS_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    hello: EngineHello
    updates: _containers.RepeatedCompositeFieldContainer[SequenceUpdate]
    stats: EngineStats
    rejections: _containers.RepeatedCompositeFieldContainer[Rejection]
    heartbeat: Heartbeat
    def __init__(self, hello: _Optional[_Union[EngineHello, _Mapping]] = ..., updates: _Optional[_Iterable[_Union[SequenceUpdate, _Mapping]]] = ..., stats: _Optional[_Union[EngineStats, _Mapping]] = ..., rejections: _Optional[_Iterable[_Union[Rejection, _Mapping]]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("num_steps", "unchanged_s", "num_running", "compiling")
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    UNCHANGED_S_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    COMPILING_FIELD_NUMBER: _ClassVar[int]
    num_steps: int
    unchanged_s: float
    num_running: int
    compiling: bool
    def __init__(self, num_steps: _Optional[int] = ..., unchanged_s: _Optional[float] = ..., num_running: _Optional[int] = ..., compiling: _Optional[bool] = ...) -> None: ...

class EngineHello(_message.Message):
    __slots__ = ("model", "vocab", "max_model_len", "num_slots", "num_pages", "page_size", "max_queue", "eos_token_ids", "numerics", "weights", "kv_dtype")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VOCAB_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    NUM_SLOTS_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUE_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    model: str
    vocab: int
    max_model_len: int
    num_slots: int
    num_pages: int
    page_size: int
    max_queue: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    numerics: str
    weights: str
    kv_dtype: str
    def __init__(self, model: _Optional[str] = ..., vocab: _Optional[int] = ..., max_model_len: _Optional[int] = ..., num_slots: _Optional[int] = ..., num_pages: _Optional[int] = ..., page_size: _Optional[int] = ..., max_queue: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., numerics: _Optional[str] = ..., weights: _Optional[str] = ..., kv_dtype: _Optional[str] = ...) -> None: ...

class SequenceUpdate(_message.Message):
    __slots__ = ("request_id", "tokens", "finish", "logprobs", "prompt_logprobs", "queue_s", "error", "cached_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    tokens: _containers.RepeatedScalarFieldContainer[int]
    finish: _types_pb2.FinishReason
    logprobs: PackedLogprobs
    prompt_logprobs: PackedLogprobs
    queue_s: float
    error: str
    cached_tokens: int
    def __init__(self, request_id: _Optional[str] = ..., tokens: _Optional[_Iterable[int]] = ..., finish: _Optional[_Union[_types_pb2.FinishReason, str]] = ..., logprobs: _Optional[_Union[PackedLogprobs, _Mapping]] = ..., prompt_logprobs: _Optional[_Union[PackedLogprobs, _Mapping]] = ..., queue_s: _Optional[float] = ..., error: _Optional[str] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class PackedLogprobs(_message.Message):
    __slots__ = ("ids", "values", "ranks", "ends")
    IDS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    ENDS_FIELD_NUMBER: _ClassVar[int]
    ids: bytes
    values: bytes
    ranks: bytes
    ends: bytes
    def __init__(self, ids: _Optional[bytes] = ..., values: _Optional[bytes] = ..., ranks: _Optional[bytes] = ..., ends: _Optional[bytes] = ...) -> None: ...

class Rejection(_message.Message):
    __slots__ = ("request_id", "kind", "message", "retry_after_s")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[Rejection.Kind]
        KIND_INVALID: _ClassVar[Rejection.Kind]
        KIND_TOO_LONG: _ClassVar[Rejection.Kind]
        KIND_OVERLOADED: _ClassVar[Rejection.Kind]
        KIND_DRAINING: _ClassVar[Rejection.Kind]
    KIND_UNSPECIFIED: Rejection.Kind
    KIND_INVALID: Rejection.Kind
    KIND_TOO_LONG: Rejection.Kind
    KIND_OVERLOADED: Rejection.Kind
    KIND_DRAINING: Rejection.Kind
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    kind: Rejection.Kind
    message: str
    retry_after_s: float
    def __init__(self, request_id: _Optional[str] = ..., kind: _Optional[_Union[Rejection.Kind, str]] = ..., message: _Optional[str] = ..., retry_after_s: _Optional[float] = ...) -> None: ...

class EngineStats(_message.Message):
    __slots__ = ("num_waiting", "num_running", "free_slots", "free_pages", "num_preemptions", "num_steps", "prompt_tokens", "output_tokens", "num_compiles_after_warmup", "num_finished", "num_aborted", "recomputed_tokens", "cached_pages", "prefix_query_tokens", "prefix_hit_tokens", "prefix_evicted_pages")
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    FREE_SLOTS_FIELD_NUMBER: _ClassVar[int]
    FREE_PAGES_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPILES_AFTER_WARMUP_FIELD_NUMBER: _ClassVar[int]
    NUM_FINISHED_FIELD_NUMBER: _ClassVar[int]
    NUM_ABORTED_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_PAGES_FIELD_NUMBER: _ClassVar[int]
    PREFIX_QUERY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_EVICTED_PAGES_FIELD_NUMBER: _ClassVar[int]
    num_waiting: int
    num_running: int
    free_slots: int
    free_pages: int
    num_preemptions: int
    num_steps: int
    prompt_tokens: int
    output_tokens: int
    num_compiles_after_warmup: int
    num_finished: int
    num_aborted: int
    recomputed_tokens: int
    cached_pages: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    prefix_evicted_pages: int
    def __init__(self, num_waiting: _Optional[int] = ..., num_running: _Optional[int] = ..., free_slots: _Optional[int] = ..., free_pages: _Optional[int] = ..., num_preemptions: _Optional[int] = ..., num_steps: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., num_compiles_after_warmup: _Optional[int] = ..., num_finished: _Optional[int] = ..., num_aborted: _Optional[int] = ..., recomputed_tokens: _Optional[int] = ..., cached_pages: _Optional[int] = ..., prefix_query_tokens: _Optional[int] = ..., prefix_hit_tokens: _Optional[int] = ..., prefix_evicted_pages: _Optional[int] = ...) -> None: ...
