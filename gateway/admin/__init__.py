"""The admin API and the console: what operators see and change, on a port of its own."""
