"""Training of gates from what a decoder shows of its linears' inputs. Needs torch, and nothing of the server."""
