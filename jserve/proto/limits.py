"""Limits that both ends of a connection must agree on."""

# Prompt log-probabilities of a long prompt are the largest message: 21 entries per token.
MAX_SESSION_MESSAGE_BYTES = 512 << 20

# A step between processes carries the prompts of all that it admits.
MAX_STEP_BYTES = 512 << 20

# Processes of an engine ping each other to notice a frozen peer or a lost host.
KEEPALIVE_OPTIONS = (
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.ping_timeout_ms", 10_000),  # the key that newer versions of gRPC read
    ("grpc.http2.max_ping_strikes", 0),
)

# An engine says at least this often how far it is, and a gateway counts its silence by it.
HEARTBEAT_S = 1.0
