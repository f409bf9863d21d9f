"""`perseid train medusa`: heads that learn to foresee the served model's own answers."""
