from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Location(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LOCATION_UNSPECIFIED: _ClassVar[Location]
    LOCATION_DISK: _ClassVar[Location]
    LOCATION_HOST: _ClassVar[Location]
    LOCATION_DEVICE: _ClassVar[Location]
LOCATION_UNSPECIFIED: Location
LOCATION_DISK: Location
LOCATION_HOST: Location
LOCATION_DEVICE: Location

class LoadAdapterRequest(_message.Message):
    __slots__ = ("name", "source", "replace", "pin", "adapter")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    name: str
    source: str
    replace: bool
    pin: bool
    adapter: str
    def __init__(self, name: _Optional[str] = ..., source: _Optional[str] = ..., replace: _Optional[bool] = ..., pin: _Optional[bool] = ..., adapter: _Optional[str] = ...) -> None: ...

class LoadAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...

class UnloadAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class UnloadAdapterResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...

class ListAdaptersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAdaptersResponse(_message.Message):
    __slots__ = ("adapters",)
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    def __init__(self, adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ...) -> None: ...

class PinAdapterRequest(_message.Message):
    __slots__ = ("name", "pinned")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    name: str
    pinned: bool
    def __init__(self, name: _Optional[str] = ..., pinned: _Optional[bool] = ...) -> None: ...

class PinAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...

class Adapter(_message.Message):
    __slots__ = ("name", "version", "source", "kind", "rank", "targets", "num_layers", "num_parameters", "size_bytes", "location", "pinned", "loaded_at", "trained_on", "warnings", "error", "gate_set", "heads")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOCATION_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    LOADED_AT_FIELD_NUMBER: _ClassVar[int]
    TRAINED_ON_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    GATE_SET_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    source: str
    kind: str
    rank: int
    targets: _containers.RepeatedScalarFieldContainer[str]
    num_layers: int
    num_parameters: int
    size_bytes: int
    location: Location
    pinned: bool
    loaded_at: float
    trained_on: str
    warnings: _containers.RepeatedScalarFieldContainer[str]
    error: str
    gate_set: GateSet
    heads: Heads
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., source: _Optional[str] = ..., kind: _Optional[str] = ..., rank: _Optional[int] = ..., targets: _Optional[_Iterable[str]] = ..., num_layers: _Optional[int] = ..., num_parameters: _Optional[int] = ..., size_bytes: _Optional[int] = ..., location: _Optional[_Union[Location, str]] = ..., pinned: _Optional[bool] = ..., loaded_at: _Optional[float] = ..., trained_on: _Optional[str] = ..., warnings: _Optional[_Iterable[str]] = ..., error: _Optional[str] = ..., gate_set: _Optional[_Union[GateSet, _Mapping]] = ..., heads: _Optional[_Union[Heads, _Mapping]] = ...) -> None: ...

class Heads(_message.Message):
    __slots__ = ("adapter", "adapter_version", "in_use", "num_heads", "layout", "shares_lm_head", "num_draft_tokens", "accuracy", "accuracy_measured")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_VERSION_FIELD_NUMBER: _ClassVar[int]
    IN_USE_FIELD_NUMBER: _ClassVar[int]
    NUM_HEADS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    SHARES_LM_HEAD_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_MEASURED_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    adapter_version: str
    in_use: bool
    num_heads: int
    layout: str
    shares_lm_head: bool
    num_draft_tokens: int
    accuracy: _containers.RepeatedCompositeFieldContainer[HeadAccuracy]
    accuracy_measured: bool
    def __init__(self, adapter: _Optional[str] = ..., adapter_version: _Optional[str] = ..., in_use: _Optional[bool] = ..., num_heads: _Optional[int] = ..., layout: _Optional[str] = ..., shares_lm_head: _Optional[bool] = ..., num_draft_tokens: _Optional[int] = ..., accuracy: _Optional[_Iterable[_Union[HeadAccuracy, _Mapping]]] = ..., accuracy_measured: _Optional[bool] = ...) -> None: ...

class HeadAccuracy(_message.Message):
    __slots__ = ("candidates",)
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    candidates: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, candidates: _Optional[_Iterable[float]] = ...) -> None: ...

class GateSet(_message.Message):
    __slots__ = ("columns", "null", "method", "k", "temperature", "has_request_router")
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    NULL_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    HAS_REQUEST_ROUTER_FIELD_NUMBER: _ClassVar[int]
    columns: _containers.RepeatedCompositeFieldContainer[GateColumn]
    null: bool
    method: str
    k: int
    temperature: float
    has_request_router: bool
    def __init__(self, columns: _Optional[_Iterable[_Union[GateColumn, _Mapping]]] = ..., null: _Optional[bool] = ..., method: _Optional[str] = ..., k: _Optional[int] = ..., temperature: _Optional[float] = ..., has_request_router: _Optional[bool] = ...) -> None: ...

class GateColumn(_message.Message):
    __slots__ = ("name", "version", "loaded", "training_free")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FREE_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    loaded: bool
    training_free: bool
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., loaded: _Optional[bool] = ..., training_free: _Optional[bool] = ...) -> None: ...
