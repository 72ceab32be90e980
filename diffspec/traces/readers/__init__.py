"""Readers of other tools' files, one module a format; `diffspec.traces.formats` lists and recognises them."""
