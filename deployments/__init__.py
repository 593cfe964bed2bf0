"""Where experts run: expert host, swap scheduler, registry, Ray Serve application."""
