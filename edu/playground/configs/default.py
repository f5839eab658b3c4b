"""The default run: every key there is, at the value that it has anyway.

`tp train --list-keys` says what each takes and means. This file is data: it is parsed and never
executed, so plain values only. In place of a section, `model.n_layer = 4` sets a single key.
"""

seed = 1337

data = {
    "path": "phrases.txt",
    "val_fraction": 0.1,
    "split_seed": 0,
}

tokenizer = {
    "kind": "unigram",  # unigram, bpe
    "vocab_size": 1024,
}

model = {
    "n_layer": 3,
    "n_embd": 96,
    "block_size": 32,
    "dropout": 0.1,
    "attention_enabled": True,
    "n_head": 4,
    "n_kv_head": None,
    "qk_norm": False,
    "window": None,
    "mlp_enabled": True,
    "mlp_kind": "gelu",  # gelu, relu2, swiglu
    "mlp_ratio": 4.0,
    "norm": "layernorm",  # layernorm, rmsnorm, none
    "norm_position": "pre",  # pre, post
    "residual": True,
    "positional_encoding": "learned",  # learned, sinusoidal, rope, alibi, none
    "tied_embeddings": True,
    "logit_softcap": None,
    "init": "scaled",  # normal, scaled, zero_projection
    "init_std": 0.05,
}

train = {
    "steps": 400,
    "batch_size": 64,
    "optimizer": "muon",  # adamw, muon, sgd
    "lr": 0.005,
    "muon_lr": 0.03,
    "weight_decay": 0.1,
    "momentum": 0.9,
    "beta2": 0.99,
    "grad_clip": 1.0,
    "schedule": "cosine",  # constant, cosine, linear, wsd
    "warmup_steps": 20,
    "decay_fraction": 0.3,
    "min_lr_fraction": 0.1,
    "eval_every": 40,
    "patience": None,
    "threads": 1,
}

sample = {
    "prompt": None,
    "n_samples": 3,
    "max_new_tokens": 24,
    "temperature": 0.8,
    "top_k": None,
    "top_p": 0.95,
}
