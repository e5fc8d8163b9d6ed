"""dllm: train, measure and register models that write in parallel."""

__version__ = "0.1.0"
