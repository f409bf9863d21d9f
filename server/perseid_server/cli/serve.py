from perseid_server.config import ServeConfig
from typing import Annotated
from cyclopts import Parameter
def serve(config: Annotated[ServeConfig, Parameter(name="*")] = ServeConfig()) -> int:
    """Serve a base model and its adapters over gRPC and HTTP."""
    print(config)
    return 0
