"""Where speculation pays: maps of what it gains over two axes, and the lines on which it gains nothing."""
