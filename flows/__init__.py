"""The Prefect flows, and what runs around them."""

from dllm.process.interpreter import exit_without

exit_without("prefect")  # one line, before a module here imports it
