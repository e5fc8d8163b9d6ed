"""The stages, in the order of the pipeline: each is a module here, a verb, a section of params.yaml and a folder of
out/."""

STAGES = ("prepare", "regenerate", "train", "evaluate", "register")
DVC_STAGES = STAGES[:-1]
"""The stages that DVC runs; `register` changes the registry, which is outside out/."""
