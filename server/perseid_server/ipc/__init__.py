"""Between the API process and the engine process: the codec, the child's main loop, the parent's supervisor."""
