"""How a chat template may get the content of messages. In a file of its own, because the command line's help needs the
names, and `chats.py` imports vLLM."""

CONTENT_FORMATS = ("auto", "string", "openai")
"""The values of vLLM's `--chat-template-content-format`; the first is the default."""
