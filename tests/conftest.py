"""What all tests share: which examples Hypothesis draws.

The same ones in every run, so that a change is judged by what it changed; `make test-laws` draws others.
"""

from hypothesis import settings

settings.register_profile("same", derandomize=True)
settings.register_profile("other", derandomize=False, print_blob=True)
settings.load_profile("same")
