"""How results are made, as numbers: one a stage.

Raise a stage's number in the commit that changes what the stage writes for the same parameters and inputs. DVC
tracks these numbers as parameters and the fingerprint of `work/` contains them, so results made the old way are made
again. Files of code are no dependency of a stage: a docstring must not cost an hour of training.
"""

SCHEMA = {
    "prepare": 9,
    "regenerate": 5,
    "train": 4,
    "evaluate": 8,
    "register": 1,
}
