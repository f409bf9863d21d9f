"""The transports: messages in, messages out. Errors are mapped to the wire once for each."""
