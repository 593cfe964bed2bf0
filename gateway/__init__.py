"""How the world talks to us: HTTP, admission, the serving use case, state, telemetry, CLI."""
