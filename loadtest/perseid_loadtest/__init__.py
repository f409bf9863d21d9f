"""The load-test harness and the offline benchmark. They talk the wire like any client."""
