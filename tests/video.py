"""Queries and keys of a video whose attention is sparse by construction: local, with sinks."""

import math

import torch


def local_video(latent, heads=2, dim=64, text=0, sinks=4, reach=3.0, sharpness=14.0, seed=0):
    """q, k, v [1, heads, text + t * h * w, dim], float32, text first.

    Scores (after the usual scale) fall off with the distance in t, h and w like a sum of cosines of
    random frequencies, which is a Gaussian of width ``reach`` in expectation (Bochner); a few keys,
    the sinks, score well with every query. Text tokens and values are random.

    Args:
        latent: (t, h, w).
        heads: N; each head has frequencies of its own.
        dim: D, even.
        text: text tokens at the front.
        sinks: video tokens at the front that everybody attends to.
        reach: how far, in tokens, attention reaches.
        sharpness: score of a token with itself.
        seed: of all random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    t, h, w = latent
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in latent), indexing="ij")
    places = torch.stack(axes, -1).reshape(-1, 3)
    pairs = dim // 2 - 1
    frequencies = torch.randn(heads, 3, pairs, generator=generator) / reach
    phases = places @ frequencies
    scale = math.sqrt(sharpness * math.sqrt(dim) / pairs)
    features = torch.cat([phases.cos(), phases.sin()], -1) * scale
    length = t * h * w
    sink = torch.zeros(heads, length, 2)
    queries = torch.cat([features, sink], -1)
    keys = queries.clone()
    queries[..., -1] = 1.0
    keys[:, :sinks, -1] = 0.8 * sharpness * math.sqrt(dim)
    words = torch.randn(2, heads, text, dim, generator=generator)
    q = torch.cat([words[0], queries], 1)[None]
    k = torch.cat([words[1], keys], 1)[None]
    noise = torch.randn(2, *q.shape, generator=generator) * 0.1
    v = torch.randn(q.shape, generator=generator)
    return q + noise[0], k + noise[1], v
