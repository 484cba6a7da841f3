# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Dynamic sparse training for any `nn.Module` and any torch optimizer.

```python
sparsifier = Sparsifier(model, optimizer, SparsityConfig(density=0.9, method="rigl"), total_steps=10_000)
for batch in batches:
    model(**batch).loss.backward()
    optimizer.step()
    sparsifier.step()
    optimizer.zero_grad()
```
"""

from .config import SparsityConfig
from .sparsifier import Sparsifier, SparsitySummary, TensorSummary, planned_nonzeros


__all__ = ["Sparsifier", "SparsityConfig", "SparsitySummary", "TensorSummary", "planned_nonzeros"]
