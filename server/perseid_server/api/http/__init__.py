"""The OpenAI- and vLLM-shaped HTTP API."""
