"""The server. Run from the checkout's root: `python -m serve.server`."""
