"""A prompt made richer by a language model: over HTTP (`chat`), or on this machine (`local`)."""

METHODS = ("local_qwen", "dashscope", "openai")
LANGUAGES = ("zh", "en")
