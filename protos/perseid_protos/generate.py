"""Generate the gRPC stubs: `python -m perseid_protos.generate` (needs the `dev` extra).

The descriptors are named `perseid/v1/….proto`, as every client sees them; the Python modules live in
`perseid_protos.perseid.v1`, so the imports between generated files are rewritten.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent


def generate(target: Path) -> list[Path]:
    """Write the stubs of all protos below `target`; returns the files."""
    from grpc_tools import protoc  # noqa: PLC0415  a development tool, absent where stubs are only used

    protos = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("perseid/**/*.proto"))
    options = [f"--{kind}_out={target}" for kind in ("python", "pyi", "grpc_python")]
    status = protoc.main(["protoc", f"--proto_path={ROOT}", *options, *protos])
    if status:
        raise RuntimeError(f"protoc ended with status {status}")
    written = sorted(path for path in target.glob("perseid/**/*_pb2*") if path.suffix in {".py", ".pyi"})
    for path in written:
        text = path.read_text()
        path.write_text(re.sub(r"^from perseid\.", "from perseid_protos.perseid.", text, flags=re.MULTILINE))
    return written


if __name__ == "__main__":
    for file in generate(ROOT):
        sys.stdout.write(f"{file.relative_to(ROOT)}\n")
