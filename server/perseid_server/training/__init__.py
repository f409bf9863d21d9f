"""`perseid train`: gates trained on the served base itself, with its adapters on the device."""
