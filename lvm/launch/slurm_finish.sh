#!/bin/bash
# Run {{name}}: writes the manifest once all tasks of the array have ended, or names the shards that are missing.
set -uo pipefail
{{exports}}
{{setup}}
cd {{folder}} || exit 1
python -m tokenizer.encode --finish --out={{store}}
