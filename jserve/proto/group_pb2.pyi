from jserve.proto import engine_pb2 as _engine_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FollowerMessage(_message.Message):
    __slots__ = ("join", "ready", "failed")
    JOIN_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    join: Join
    ready: ProcessFacts
    failed: str
    def __init__(self, join: _Optional[_Union[Join, _Mapping]] = ..., ready: _Optional[_Union[ProcessFacts, _Mapping]] = ..., failed: _Optional[str] = ...) -> None: ...

class Join(_message.Message):
    __slots__ = ("process", "facts")
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    process: int
    facts: ProcessFacts
    def __init__(self, process: _Optional[int] = ..., facts: _Optional[_Union[ProcessFacts, _Mapping]] = ...) -> None: ...

class ProcessFacts(_message.Message):
    __slots__ = ("values",)
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.ScalarMap[str, str]
    def __init__(self, values: _Optional[_Mapping[str, str]] = ...) -> None: ...

class LeaderMessage(_message.Message):
    __slots__ = ("refused", "start", "step", "stop")
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    refused: str
    start: Start
    step: Step
    stop: Stop
    def __init__(self, refused: _Optional[str] = ..., start: _Optional[_Union[Start, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., stop: _Optional[_Union[Stop, _Mapping]] = ...) -> None: ...

class Start(_message.Message):
    __slots__ = ("coordinator_address",)
    COORDINATOR_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    coordinator_address: str
    def __init__(self, coordinator_address: _Optional[str] = ...) -> None: ...

class Stop(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Step(_message.Message):
    __slots__ = ("number", "checksum", "program", "num_steps", "slots", "starts", "chunk_rows", "chunk_tokens", "chunk_targets", "limit_rows", "limits", "page_rows", "page_groups", "page_firsts", "page_counts", "page_ids", "admissions", "draft_rows", "draft_counts", "drafts", "moves", "masks")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    PROGRAM_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    STARTS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_ROWS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_TARGETS_FIELD_NUMBER: _ClassVar[int]
    LIMIT_ROWS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    PAGE_ROWS_FIELD_NUMBER: _ClassVar[int]
    PAGE_GROUPS_FIELD_NUMBER: _ClassVar[int]
    PAGE_FIRSTS_FIELD_NUMBER: _ClassVar[int]
    PAGE_COUNTS_FIELD_NUMBER: _ClassVar[int]
    PAGE_IDS_FIELD_NUMBER: _ClassVar[int]
    ADMISSIONS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_ROWS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_COUNTS_FIELD_NUMBER: _ClassVar[int]
    DRAFTS_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    MASKS_FIELD_NUMBER: _ClassVar[int]
    number: int
    checksum: int
    program: int
    num_steps: int
    slots: _containers.RepeatedScalarFieldContainer[int]
    starts: _containers.RepeatedScalarFieldContainer[int]
    chunk_rows: _containers.RepeatedScalarFieldContainer[int]
    chunk_tokens: _containers.RepeatedScalarFieldContainer[int]
    chunk_targets: _containers.RepeatedScalarFieldContainer[bool]
    limit_rows: _containers.RepeatedScalarFieldContainer[int]
    limits: _containers.RepeatedScalarFieldContainer[int]
    page_rows: _containers.RepeatedScalarFieldContainer[int]
    page_groups: _containers.RepeatedScalarFieldContainer[int]
    page_firsts: _containers.RepeatedScalarFieldContainer[int]
    page_counts: _containers.RepeatedScalarFieldContainer[int]
    page_ids: _containers.RepeatedScalarFieldContainer[int]
    admissions: _containers.RepeatedCompositeFieldContainer[StepAdmission]
    draft_rows: _containers.RepeatedScalarFieldContainer[int]
    draft_counts: _containers.RepeatedScalarFieldContainer[int]
    drafts: _containers.RepeatedScalarFieldContainer[int]
    moves: _containers.RepeatedCompositeFieldContainer[StepMove]
    masks: _containers.RepeatedCompositeFieldContainer[StepMask]
    def __init__(self, number: _Optional[int] = ..., checksum: _Optional[int] = ..., program: _Optional[int] = ..., num_steps: _Optional[int] = ..., slots: _Optional[_Iterable[int]] = ..., starts: _Optional[_Iterable[int]] = ..., chunk_rows: _Optional[_Iterable[int]] = ..., chunk_tokens: _Optional[_Iterable[int]] = ..., chunk_targets: _Optional[_Iterable[bool]] = ..., limit_rows: _Optional[_Iterable[int]] = ..., limits: _Optional[_Iterable[int]] = ..., page_rows: _Optional[_Iterable[int]] = ..., page_groups: _Optional[_Iterable[int]] = ..., page_firsts: _Optional[_Iterable[int]] = ..., page_counts: _Optional[_Iterable[int]] = ..., page_ids: _Optional[_Iterable[int]] = ..., admissions: _Optional[_Iterable[_Union[StepAdmission, _Mapping]]] = ..., draft_rows: _Optional[_Iterable[int]] = ..., draft_counts: _Optional[_Iterable[int]] = ..., drafts: _Optional[_Iterable[int]] = ..., moves: _Optional[_Iterable[_Union[StepMove, _Mapping]]] = ..., masks: _Optional[_Iterable[_Union[StepMask, _Mapping]]] = ...) -> None: ...

class StepMove(_message.Message):
    __slots__ = ("kind", "group", "source", "target")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        OUT: _ClassVar[StepMove.Kind]
        IN: _ClassVar[StepMove.Kind]
        COPY: _ClassVar[StepMove.Kind]
    OUT: StepMove.Kind
    IN: StepMove.Kind
    COPY: StepMove.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    kind: StepMove.Kind
    group: int
    source: int
    target: int
    def __init__(self, kind: _Optional[_Union[StepMove.Kind, str]] = ..., group: _Optional[int] = ..., source: _Optional[int] = ..., target: _Optional[int] = ...) -> None: ...

class StepMask(_message.Message):
    __slots__ = ("slot", "words")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    WORDS_FIELD_NUMBER: _ClassVar[int]
    slot: int
    words: bytes
    def __init__(self, slot: _Optional[int] = ..., words: _Optional[bytes] = ...) -> None: ...

class StepAdmission(_message.Message):
    __slots__ = ("slot", "request", "output", "num_computed", "last_token", "adapter")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPUTED_FIELD_NUMBER: _ClassVar[int]
    LAST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    slot: int
    request: _engine_pb2.EngineRequest
    output: _containers.RepeatedScalarFieldContainer[int]
    num_computed: int
    last_token: int
    adapter: int
    def __init__(self, slot: _Optional[int] = ..., request: _Optional[_Union[_engine_pb2.EngineRequest, _Mapping]] = ..., output: _Optional[_Iterable[int]] = ..., num_computed: _Optional[int] = ..., last_token: _Optional[int] = ..., adapter: _Optional[int] = ...) -> None: ...
