"""The Prefect flows, and what runs around them."""

from dllm.process.interpreter import exit_without

exit_without("prefect")
