"""Settings every test folder shares."""

import os

# Triton reads this when it is first imported, and a test elsewhere may import it before the kernels' tests do.
# TRITON_INTERPRET=0 in the environment runs the kernels' tests on a GPU instead.
os.environ.setdefault("TRITON_INTERPRET", "1")
