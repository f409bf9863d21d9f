"""The gRPC API, package perseid.v1, with health and reflection."""
