"""Settings of the router's tests."""

from hypothesis import settings

settings.register_profile("perseid", deadline=None)  # machines differ; the suite's timeout is the limit
settings.load_profile("perseid")
