"""`python -m perseid_server` is the `perseid` command."""

from perseid_server.cli import main

main()
