"""The ops in C++ for the CPU, compiled for this machine at first use.

    build.py     sources → a cached shared library
    pack.py      canonical weights → panels
    library.py   its functions
    backend.py   `Backend` on them
    weight.h, matmul.cpp, lora.cpp, routing.cpp, attention.cpp, rows.cpp, slots.cpp    the ops
    decoder.cpp, draft_heads.cpp                                                      many of them in one call
    low_rank.h, simd.h, threads.h                                                     beneath them

`PERSEID_NATIVE=0` turns it off. Oracles are those of the Triton kernels: one file per op in the package above.
"""

import os
import warnings

from perseid_kernels.backend import Activations, Backend


def load_native_backend(activations: Activations = "exact") -> Backend | None:
    """The native backend; None where it is turned off, or (with a warning) where no library can be made."""
    if os.environ.get("PERSEID_NATIVE") == "0":
        return None
    from perseid_kernels.native.backend import NativeBackend  # noqa: PLC0415 (backend_for imports us on the way)
    from perseid_kernels.native.build import BuildError, build_library  # noqa: PLC0415

    try:
        return NativeBackend(build_library(), activations=activations)
    except (BuildError, OSError) as error:
        advice = "install g++ (Debian: apt-get install g++) or 'perseid[compiler]' for a server many times faster"
        warnings.warn(f"CPU kernels not available, falling back to plain torch: {error}; {advice}", stacklevel=2)
        return None
