"""The wire of Perseid: perseid/v1/*.proto and the stubs generated from them."""
