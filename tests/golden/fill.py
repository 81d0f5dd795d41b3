"""Deterministic synthetic weights for the golden data.

A weight is a pure function of its checkpoint key and shape, so a whole
checkpoint can be rebuilt from a manifest (a JSON file {key: shape}) without
shipping any weight.  The generator is numpy's legacy MT19937 RandomState, whose
stream is frozen (NEP 19), seeded with the CRC-32 of the key in UTF-8.

    python fill.py manifests/small_gligen_text.json     # prints a summary
"""

import json
import math
import sys
import zlib

import numpy as np


def fill(name: str, shape: tuple) -> np.ndarray:
    """Return the float32 (int64/int32 for integer buffers) array of one key."""
    shape = tuple(int(s) for s in shape)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "position_ids":  # integer buffer [1, n]
        return np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)
    if leaf == "num_updates":  # integer EMA counter
        return np.zeros(shape, dtype=np.int32)
    rng = np.random.RandomState(zlib.crc32(name.encode("utf-8")))
    x = np.asarray(rng.standard_normal(shape), dtype=np.float64)
    if leaf in ("alpha_attn", "alpha_dense"):  # gates, 0-dim
        x = 0.5 + 0.1 * x
    elif leaf == "pos_embedding":  # (1, tokens, dim)
        x = 0.5 * x
    elif len(shape) >= 2:  # linear, conv, embedding
        x = x / math.sqrt(math.prod(shape[1:]))
    elif len(shape) == 1 and name.endswith("weight"):  # norm scales
        x = 1.0 + 0.1 * x
    else:  # biases, null features,
        x = 0.1 * x  # layer scales, other
    return x.astype(np.float32)


def fill_state_dict(manifest: dict) -> dict:
    """{key: shape} -> {key: array}, with the keys exactly as in the manifest."""
    return {k: fill(k, tuple(s)) for k, s in manifest.items()}


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as f:
        man = json.load(f)
    n = sum(math.prod(s) for s in man.values())
    total = sum(float(np.abs(fill(k, s)).sum(dtype=np.float64)) for k, s in man.items())
    print(f"{len(man)} keys, {n} elements, sum of |w| = {total:.6f}")
