"""Headwater at its edges: topics, agents, the pipeline, HTTP and the command line."""
