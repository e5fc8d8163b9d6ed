"""Features of configurations that nobody trains any more go, and only those."""

import os
from pathlib import Path

from dllm.methods.dflash.features import LOCK, CachedFeatures, forget_old
from dllm.training.batches import Example


def cache(root: Path, number: int, age_s: float) -> CachedFeatures:
    """Open the cache of one configuration, and make as if that were so long ago."""
    rows = [Example(id="x", input_ids=[number, 1, 2], prompt_length=1)]
    made = CachedFeatures(root, {"train": rows, "heldout": []}, identity={}, layer_ids=[0], dtype="float32")
    (made.cache.directory / "part-00000-0123456789abcdef.safetensors").write_bytes(b"features")
    lock = made.cache.directory / LOCK
    os.utime(lock, (lock.stat().st_mtime - age_s,) * 2)
    return made


def left(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def test_the_caches_used_last_and_those_in_use_stay(tmp_path: Path) -> None:
    names = []
    for number in range(4):
        closed = cache(tmp_path, number, age_s=100.0 - number)
        names.append(closed.cache.directory.name)
        closed._lock.close()
    in_use = cache(tmp_path, 9, age_s=500.0)
    forget_old(tmp_path)
    assert left(tmp_path) == {*names[2:], in_use.cache.directory.name}
    in_use._lock.close()
    forget_old(tmp_path)
    assert left(tmp_path) == set(names[2:])


def test_an_old_cache_that_is_used_again_is_young(tmp_path: Path) -> None:
    for number, age_s in enumerate((300.0, 200.0, 100.0)):
        cache(tmp_path, number, age_s)._lock.close()
    again = cache(tmp_path, 0, age_s=0.0)
    name = again.cache.directory.name
    again._lock.close()
    forget_old(tmp_path)
    assert name in left(tmp_path) and len(left(tmp_path)) == 2


def test_no_caches_at_all_are_fine(tmp_path: Path) -> None:
    forget_old(tmp_path / "absent")
