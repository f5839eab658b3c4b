"""The default run. Every key stands here, at the value it has anyway; `tp train --list-keys` says
what each takes and means. This file is data: it is parsed and never executed, so plain values only.
"""

seed = 1337

data = {
    "path": "phrases.txt",
    "val_fraction": 0.1,
    "split_seed": 0,
}
