"""Load on a server: what is asked, when, by which client, and what came of it."""
