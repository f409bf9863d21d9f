"""MeteoRA-style routing: gate sets, their files, training-free gates, training. See ARCHITECTURE.md."""
