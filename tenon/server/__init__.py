"""The OpenAI-compatible server: HTTP process, engine process, protocol, limits, metrics, events, the live page."""
