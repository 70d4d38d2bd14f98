"""From an adapter to a served model: GGUF, llama.cpp, Ollama, parity (Chapter 6)."""

from helpers.serving.ollama import ollama_chat, ollama_modelfile
from helpers.serving.parity import template_parity
from helpers.serving.server import LlamaServer

__all__ = ["LlamaServer", "ollama_chat", "ollama_modelfile", "template_parity"]
