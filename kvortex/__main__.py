"""`python -m kvortex`, the same as the `kvortex` command."""

import sys
from pathlib import Path

# From the root of a checkout, `-m` puts that folder on the path, and with it a `triton_kernels`
# that is not the one vLLM looks for. KVortex itself is already found.
root = str(Path(__file__).resolve().parent.parent)
sys.path[:] = [entry for entry in sys.path if str(Path(entry or ".").resolve()) != root]

from kvortex.cli import main

sys.exit(main())
