"""Drive a server with a stated load and record what it does: plan, client, cells, files."""
