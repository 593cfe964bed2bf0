"""The console: one page, served by the admin port."""
