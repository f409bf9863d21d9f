"""What an operator is told of each call: one log line, and a trace where that is asked for."""
