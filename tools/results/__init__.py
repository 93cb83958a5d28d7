"""Train and compare many settings, and write what came of it as a page."""
